"""What the service counts, for Prometheus."""

import functools

from prometheus_client import Counter, Gauge, Histogram

from sodaops.request_log.journal import JournalMetrics
from sodaops.web.metrics import HttpMetrics


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
        self.journal = JournalMetrics(registry)
        self.predicted = functools.cache(self.predictions.labels)

    def serves(self, bundle_id: str, variant: str) -> None:
        """Names the bundle that answers from now on."""
        self.bundle.clear()
        self.bundle.labels(bundle_id, variant).set(1)
