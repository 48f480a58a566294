"""Prometheus metrics of the predictor."""

import functools

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary

from sodaops.request_log.journal import JournalMetrics
from sodaops.web.metrics import SECONDS, HttpMetrics


class Metrics(HttpMetrics):
    """Metrics of the queue, the bundle, the predictions and the request log, beside those of HTTP."""

    def __init__(self) -> None:
        super().__init__()
        registry = self.registry
        self.queue = Gauge("sodaops_queue_texts", "Texts that wait for a thread.", registry=registry)
        self.batch = Histogram(
            "sodaops_batch_texts", "Texts computed together.", buckets=(1, 2, 4, 8, 16, 32, 64, 128), registry=registry
        )
        self.refused = Counter("sodaops_refused", "Requests refused because the queue was full.", registry=registry)
        self.bundle = Gauge("sodaops_bundle_info", "The bundle in use.", ("bundle_id", "variant"), registry=registry)
        self.loads = Counter("sodaops_bundle_loads", "Loads of a bundle, by outcome.", ("outcome",), registry=registry)
        self.predictions = Counter("sodaops_predictions", "Predictions by label.", ("label",), registry=registry)
        self.confidence = Histogram(
            "sodaops_confidence", "Probability of the predicted label.", buckets=[n / 20 for n in range(1, 21)],
            registry=registry,
        )  # fmt: skip
        self.abstained = Counter("sodaops_abstained", "Answers below the bundle's thresholds.", registry=registry)
        self.others = Counter("sodaops_context_others", "Context values logged as other.", ("column",), registry=registry)
        self.feedback = Counter("sodaops_feedback", "Feedback received, by label.", ("label",), registry=registry)
        self.journal = JournalMetrics(registry)
        self.predicted = functools.cache(self.predictions.labels)  # labels() takes a lock for each look-up

    def set_bundle(self, bundle_id: str, variant: str) -> None:
        """Sets the bundle in use."""
        self.bundle.clear()
        self.bundle.labels(bundle_id, variant).set(1)


class ShadowMetrics:
    """Metrics of a challenger. What it is compared by has the labels ``role`` (live, canary or shadow) and ``bundle_id``."""

    def __init__(self, registry: CollectorRegistry) -> None:
        of = ("role", "bundle_id")
        self.share = Gauge("sodaops_canary_share", "Share of requests that the challenger answers.", registry=registry)
        self.restarts = Counter("sodaops_shadow_restarts", "Ends of the shadow's process.", registry=registry)
        self.dropped = Counter("sodaops_shadow_dropped", "Texts that it left out.", ("reason",), registry=registry)
        self.disagreements = Counter("sodaops_shadow_disagreements", "Other answers than the live ones.", registry=registry)
        predicted = Counter("sodaops_compared_predictions", "Predictions by label.", (*of, "label"), registry=registry)
        confidence = Summary("sodaops_compared_confidence", "Probability of the predicted label.", of, registry=registry)
        seconds = Histogram(
            "sodaops_compared_seconds", "Time for a request, or the shadow's text.", of, buckets=SECONDS, registry=registry
        )
        self.predicted, self.confidence = functools.cache(predicted.labels), functools.cache(confidence.labels)
        self.seconds = functools.cache(seconds.labels)
        self.estimate = Gauge(
            "sodaops_compared_estimate",
            "Estimated accuracy and macro-F1 of the last texts.",
            ("role", "metric"),
            registry=registry,
        )
        self.journal = JournalMetrics(registry, "sodaops_shadow_log")
