"""From the text of /metrics to the numbers that rules look at.

Each scrape of a process adds a point to its :class:`Target`: counters added up since the first look, restarts taken out. A
signal is made of the points that lie in a window, as PromQL's ``rate`` makes it of its samples.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from sodaops.errors import DeliveryError

_WHOLE = {
    "sodaops_confidence_sum": "confidence_sum",
    "sodaops_confidence_count": "confidence_count",
    "sodaops_request_log_lost_total": "lost",
}


@dataclass(frozen=True)
class Scrape:
    """What one process said.

    Attributes:
        counters: ``QUANTITY|SERIES`` -> value; several series make a quantity, ``le:0.5`` is one bucket of the latency.
        drift: the largest ``sodaops_drift_detected``; None where it is not told.
    """

    counters: dict[str, float]
    drift: float | None = None


@dataclass
class Target:
    """A process that is scraped: its counters as last seen, their sums without resets, and those sums over time."""

    seen: float | None = None
    raw: dict[str, float] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)
    points: list[tuple[float, dict[str, float]]] = field(default_factory=list)

    def add(self, scrape: Scrape, now: float, window_s: float) -> None:
        """Takes a scrape in.

        A counter that is lower than before began anew at 0, and one that was not there before was 0. What happened in a
        gap longer than the window is not counted: no window holds both of its ends.
        """
        goes_on = self.seen is not None and 0 < now - self.seen <= window_s
        for key, value in scrape.counters.items():
            quantity = key.partition("|")[0]
            before = self.raw.get(key, 0.0) if goes_on else value
            grown = value - before if value >= before else value
            self.totals[quantity] = self.totals.get(quantity, 0.0) + grown
        self.seen, self.raw = now, dict(scrape.counters)
        self.points.append((now, dict(self.totals)))

    def forget(self, before: float, now: float) -> None:
        """Drops the points before a time, and those of a clock that was ahead."""
        self.points = [point for point in self.points if before <= point[0] < now]


def parse(text: str) -> Scrape:
    """Reads Prometheus' text format.

    Raises:
        DeliveryError: it is not that, or holds nothing of this project.

    >>> parse('sodaops_drift_detected 1').drift
    1.0
    """
    counters: dict[str, float] = {}
    drift, ours = [], False
    try:
        for sample in itertools.chain.from_iterable(family.samples for family in text_string_to_metric_families(text)):
            ours |= sample.name.startswith("sodaops_")
            if sample.name == "sodaops_drift_detected":
                drift.append(float(sample.value))
            for key in _keys(sample.name, sample.labels):
                if math.isfinite(sample.value):
                    counters[key] = counters.get(key, 0.0) + sample.value
    except (ValueError, IndexError, KeyError) as error:  # what the parser says of anything else
        raise DeliveryError("what came is not in Prometheus' text format") from error
    if not ours:
        raise DeliveryError("there is no metric of sodaops in what came")
    drift = [value for value in drift if math.isfinite(value)]
    return Scrape(counters, max(drift) if drift else None)


def _keys(name: str, labels: Mapping[str, str]) -> Iterable[str]:
    if name in _WHOLE:
        yield f"{_WHOLE[name]}|"
    elif labels.get("path", "").startswith("/predict"):
        if name == "sodaops_requests_total":
            series = " ".join(labels.get(label, "") for label in ("method", "path", "status"))
            yield f"requests|{series}"
            if labels.get("status", "").startswith("5"):
                yield f"errors|{series}"
        elif name == "sodaops_request_seconds_bucket":
            yield f"le:{labels['le']}|{labels['path']}"


def over(targets: Iterable[Target], start: float, end: float) -> tuple[dict[str, float], dict[str, float]]:
    """How much each quantity grew over the points in (start, end], and how fast, added up over targets.

    A target with fewer than two points there says nothing.

    Returns:
        quantity -> growth, and quantity -> growth a second between the first point and the last.
    """
    grown: dict[str, float] = {}
    rates: dict[str, float] = {}
    for target in targets:
        points = [point for point in target.points if start < point[0] <= end]
        if len(points) < 2:
            continue
        (began, first), (ended, last) = points[0], points[-1]
        for quantity, total in last.items():
            growth = total - first.get(quantity, 0.0)
            grown[quantity] = grown.get(quantity, 0.0) + growth
            rates[quantity] = rates.get(quantity, 0.0) + growth / (ended - began)
    return grown, rates


@dataclass(frozen=True)
class Windows:
    """Where rates are taken: see AlertsConfig."""

    window_s: float
    traffic_offset_s: float
    traffic_min_requests: int

    @property
    def kept_s(self) -> float:
        """How old a point may get."""
        return self.traffic_offset_s + self.window_s


def signals(targets: Sequence[Target], scrapes: Sequence[Scrape | None], now: float, windows: Windows) -> dict[str, float]:
    """The signals that have a value now.

    Args:
        targets: with the newest scrapes taken in.
        scrapes: one for each metrics URL; None where it did not answer.
        now: seconds since 1970.
        windows: over which rates are taken.

    Returns:
        Of drift, error_rate, latency_p99_s, mean_confidence, traffic, log_lost and up those that can be told.
    """
    found = {"up": float(all(scrape is not None for scrape in scrapes))}
    drift = [scrape.drift for scrape in scrapes if scrape is not None and scrape.drift is not None]
    if drift:
        found["drift"] = max(drift)
    grown, rates = over(targets, now - windows.window_s, now)
    if rates.get("requests"):
        found["error_rate"] = rates.get("errors", 0.0) / rates["requests"]
    buckets = {float(name[3:]): rate for name, rate in rates.items() if name.startswith("le:")}
    latency = quantile(0.99, buckets)
    if latency is not None:
        found["latency_p99_s"] = latency
    if rates.get("confidence_count") and "confidence_sum" in rates:
        found["mean_confidence"] = rates["confidence_sum"] / rates["confidence_count"]
    if "lost" in grown:
        found["log_lost"] = grown["lost"]
    then = now - windows.traffic_offset_s
    grown_then, rates_then = over(targets, then - windows.window_s, then)
    if "requests" in rates and grown_then.get("requests", 0.0) >= windows.traffic_min_requests:
        found["traffic"] = rates["requests"] / rates_then["requests"]
    return found


def quantile(q: float, buckets: Mapping[float, float]) -> float | None:
    """A quantile of a histogram, linear inside its bucket, as PromQL's ``histogram_quantile`` has it.

    Args:
        q: in (0, 1).
        buckets: upper bound -> how many were at or under it, or how many a second.

    Returns:
        None without observations; the last finite bound where the quantile lies past it.

    >>> quantile(0.5, {0.1: 2, 0.2: 6, math.inf: 8})
    0.15000000000000002
    """
    bounds = sorted(buckets)
    if len(bounds) < 2 or bounds[-1] != math.inf or not buckets[math.inf]:
        return None
    rank = q * buckets[math.inf]
    lower, under = 0.0, 0.0
    for bound in bounds[:-1]:
        if buckets[bound] >= rank:
            return lower + (bound - lower) * (rank - under) / (buckets[bound] - under)
        lower, under = bound, buckets[bound]
    return bounds[-2]
