"""What the service counts, for Prometheus."""

import functools

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class HttpMetrics:
    """What every service counts; one registry an application, so that several may live in a process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("sodaops_requests", "Requests answered.", ("method", "path", "status"), registry=registry)
        self.seconds = Histogram(
            "sodaops_request_seconds",
            "Time from a request's head to its answer.",
            ("path",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.in_flight = Gauge("sodaops_requests_in_flight", "Requests being answered.", registry=registry)
        # labels() looks a child up under a lock each time; on the way of every request, once for each is enough
        self.answered = functools.cache(self.requests.labels)
        self.seconds_of = functools.cache(self.seconds.labels)

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)


class Metrics(HttpMetrics):
    """What the predictor counts beside that."""

    def __init__(self) -> None:
        super().__init__()
        registry = self.registry
        self.queue = Gauge("sodaops_queue_texts", "Texts that wait for a thread.", registry=registry)
        self.batch = Histogram(
            "sodaops_batch_texts", "Texts computed together.", buckets=(1, 2, 4, 8, 16, 32, 64, 128), registry=registry
        )
        self.refused = Counter("sodaops_refused", "Requests refused because the queue was full.", registry=registry)
        self.bundle = Gauge("sodaops_bundle_info", "The bundle that answers.", ("bundle_id", "variant"), registry=registry)
        self.loads = Counter("sodaops_bundle_loads", "Bundles tried, by how it ended.", ("outcome",), registry=registry)
        self.predictions = Counter("sodaops_predictions", "Answers by label.", ("label",), registry=registry)
        self.confidence = Histogram(
            "sodaops_confidence",
            "Probability of the answered label.",
            buckets=[n / 20 for n in range(1, 21)],
            registry=registry,
        )
        self.feedback = Counter("sodaops_feedback", "Answers that somebody corrected or confirmed, by label.", ("label",),
                                registry=registry)  # fmt: skip
        self.logged = Counter("sodaops_request_log_rows", "Answers written to the journal.", registry=registry)
        self.lost = Counter("sodaops_request_log_lost", "Answers that the journal could not take.", registry=registry)
        self.journal_bytes = Gauge("sodaops_request_log_journal_bytes", "Journal not in a Parquet part yet.", registry=registry)
        self.parts = Counter(
            "sodaops_request_log_parts", "Parquet parts, by how writing ended.", ("outcome",), registry=registry
        )

        self.predicted = functools.cache(self.predictions.labels)

    def serves(self, bundle_id: str, variant: str) -> None:
        """Names the bundle that answers from now on."""
        self.bundle.clear()
        self.bundle.labels(bundle_id, variant).set(1)
