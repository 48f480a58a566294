"""Prometheus metrics that every service has."""

import functools

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class HttpMetrics:
    """Counts requests; each application has a registry of its own, so that several can live in one process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("sodaops_requests", "Requests answered.", ("method", "path", "status"), registry=registry)
        self.seconds = Histogram(
            "sodaops_request_seconds", "Time from a request's head to its answer.", ("path",), buckets=SECONDS,
            registry=registry,
        )  # fmt: skip
        self.in_flight = Gauge("sodaops_requests_in_flight", "Requests being answered.", registry=registry)
        # labels() takes a lock for each look-up; the cache spares every request that
        self.answered = functools.cache(self.requests.labels)
        self.seconds_of = functools.cache(self.seconds.labels)

    def render(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self.registry)
