"""What every service counts, for Prometheus."""

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
