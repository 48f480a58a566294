"""The signals that alert rules refer to, computed from one or two scrapes of /metrics."""

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from sodaops.config.alerts import PREDICT
from sodaops.errors import DeliveryError

_QUANTITIES = {
    "sodaops_confidence_sum": "confidence_sum",
    "sodaops_confidence_count": "confidence_count",
    "sodaops_request_log_lost_total": "lost",
}
_ESTIMATED = ("accuracy", "macro_f1")  # values of the label ``metric`` of sodaops_quality


@dataclass(frozen=True)
class Scrape:
    """The metrics of one process at one time.

    Attributes:
        counters: (quantity, series) -> value. Several series make one quantity; ``le:0.5`` is a bucket of the latency.
        gauges: signal -> the worst value of its metric; without those that have none.
    """

    counters: dict[tuple[str, str], float]
    gauges: dict[str, float] = field(default_factory=dict)


def parse_metrics(text: str) -> Scrape:
    """Reads the Prometheus text format.

    Raises:
        DeliveryError: another format, or no metric of SoDaOps.

    >>> parse_metrics('sodaops_drift_detected 1').gauges
    {'drift': 1.0}
    """
    try:
        samples = list(itertools.chain.from_iterable(family.samples for family in text_string_to_metric_families(text)))
    except (ValueError, IndexError, KeyError) as error:  # the parser raises these for other formats
        raise DeliveryError("the answer is not in the Prometheus text format") from error
    if not any(sample.name.startswith("sodaops_") for sample in samples):
        raise DeliveryError("the answer has no metric of SoDaOps")
    finite = [sample for sample in samples if math.isfinite(sample.value)]
    counters: defaultdict[tuple[str, str], float] = defaultdict(float)
    for sample in finite:
        for key in _counter_keys(sample):
            counters[key] += sample.value
    drift = [("drift", float(sample.value)) for sample in finite if sample.name == "sodaops_drift_detected"]
    bounds = [(sample.labels.get("metric"), sample) for sample in finite if sample.labels.get("bound") == "high"]
    return Scrape(dict(counters), _worst([*drift, *((name, float(s.value)) for name, s in bounds if name in _ESTIMATED)]))


def _worst(values: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The largest value of drift, and the smallest upper bound of a quality, over series and processes."""
    worst: dict[str, float] = {}
    for name, value in values:
        worst[name] = (max if name == "drift" else min)(value, worst.get(name, value))
    return worst


def _counter_keys(sample: Sample) -> Iterable[tuple[str, str]]:
    """The quantities that a sample counts towards."""
    name, labels = sample.name, sample.labels
    if name in _QUANTITIES:
        yield _QUANTITIES[name], ""
    elif re.fullmatch(PREDICT, labels.get("path", "")):
        if name == "sodaops_requests_total":
            series = " ".join(labels.get(label, "") for label in ("method", "path", "status"))
            yield "requests", series
            if labels.get("status", "").startswith("5"):
                yield "errors", series
        elif name == "sodaops_request_seconds_bucket":
            yield f"le:{labels['le']}", labels["path"]


def growth(scrapes: Iterable[tuple[Scrape | None, Scrape | None]]) -> dict[str, float]:
    """How much each quantity grew between two scrapes, added up over processes.

    A counter that is lower in the second scrape was reset to 0 in between, and a series that only the second one has
    started at 0. A process without both scrapes counts nothing.

    Args:
        scrapes: first and second scrape of each process.
    """
    grown: defaultdict[str, float] = defaultdict(float)
    for first, second in scrapes:
        if first is None or second is None:
            continue
        for key, value in second.counters.items():
            earlier = first.counters.get(key, 0.0)
            grown[key[0]] += value - earlier if value >= earlier else value
    return dict(grown)


def signal_values(first: Sequence[Scrape | None] | None, second: Sequence[Scrape | None]) -> dict[str, float]:
    """The signals that have a value.

    Args:
        first: an earlier scrape of each process, for rates; None: there was none.
        second: the current scrape of each process; None for one that did not answer.

    Returns:
        All but traffic, which needs a history of metrics, as far as they can be computed.
    """
    values = {"up": float(None not in second)}
    values |= _worst(item for scrape in second if scrape is not None for item in scrape.gauges.items())
    grown = growth(zip(first, second, strict=True)) if first is not None else {}
    if grown.get("requests"):
        values["error_rate"] = grown.get("errors", 0.0) / grown["requests"]
    latency = histogram_quantile(0.99, {float(name[3:]): n for name, n in grown.items() if name.startswith("le:")})
    if latency is not None:
        values["latency_p99_s"] = latency
    if grown.get("confidence_count") and "confidence_sum" in grown:
        values["mean_confidence"] = grown["confidence_sum"] / grown["confidence_count"]
    if "lost" in grown:
        values["log_lost"] = grown["lost"]
    return values


def histogram_quantile(q: float, buckets: Mapping[float, float]) -> float | None:
    """A quantile of a histogram, linear within its bucket, as PromQL's ``histogram_quantile`` computes it.

    Args:
        q: in (0, 1).
        buckets: upper bound -> number of observations up to it.

    Returns:
        None without observations; the last finite bound if the quantile lies above it.

    >>> histogram_quantile(0.5, {0.1: 2, 0.2: 6, math.inf: 8})
    0.15000000000000002
    """
    bounds = sorted(buckets)
    if len(bounds) < 2 or bounds[-1] != math.inf or not buckets[math.inf]:
        return None
    rank = q * buckets[math.inf]
    lower, below = 0.0, 0.0  # of the bucket: its lower bound, and the observations up to that
    for bound in bounds[:-1]:
        if buckets[bound] >= rank:
            return lower + (bound - lower) * (rank - below) / (buckets[bound] - below)
        lower, below = bound, buckets[bound]
    return bounds[-2]
