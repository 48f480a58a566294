"""From a window of requests and a bundle's reference to a verdict: what has shifted, by how much, and what it looks like."""

import hashlib
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sodaops.bundle.layout import BundleInfo
from sodaops.bundle.reference import Descriptors, Reference
from sodaops.config.schema import DriftConfig
from sodaops.drift.causes import Cause, causes_of
from sodaops.drift.evidently_report import column_tests
from sodaops.drift.features import TITLES, Feature
from sodaops.drift.statistics import Embedded, embedding_test, ks_distance, total_variation
from sodaops.request_log.window import Window, count_by_bundle

if TYPE_CHECKING:
    import pandas as pd

OF_ANY_BUNDLE = ("n_chars", "letters", "non_ascii")  # what another bundle's rows can be held against as well
_EMPTY = hashlib.sha256().hexdigest()
_N_EXAMPLES = 12
_N_BINS = 16


@dataclass(frozen=True)
class Example:
    """A text of the window that is less at home in the reference than the others."""

    text: str | None  # None where only hashes are logged
    text_sha256: str
    label: str
    score: float
    request_id: str


@dataclass(frozen=True)
class Drift:
    """What was found."""

    bundle_id: str
    judged: bool  # whether there were rows enough for a verdict
    drifted: bool
    said: str  # the verdict in a line
    causes: list[Cause]
    features: list[Feature]
    level: float  # p-values below it count
    n_rows: int  # of this bundle, empty texts among them
    n_texts: int  # different ones that were compared
    n_found: int  # rows of the whole window, of which those above are a sample
    first: str | None  # time of the oldest row, ISO 8601
    last: str | None
    empty: float  # share
    repeated: float  # share of the text that came most often
    repeated_text: str | None
    examples: list[Example]
    others: dict[str, dict[str, Any]]  # other bundle -> n_rows, drifted: of the features that need no model
    ahead: int
    skipped: dict[str, str]
    reference_age_days: float
    created: str


def measure(settings: DriftConfig, info: BundleInfo, reference: Reference, window: Window) -> tuple[Drift, Any]:
    """Holds a window against a bundle's reference.

    Returns:
        What was found, and evidently's snapshot; None where there were too few rows.
    """
    rows = window.rows
    mine = rows.filter(pc.equal(rows["bundle_id"], info.bundle_id))
    level = settings.alpha / len(TITLES)
    answered = _unrepeated(mine.filter(pc.is_valid(mine["label"])))
    facts = _facts(settings, info, window, mine, answered, level)
    others = {
        bundle_id: _other(settings, reference, rows.filter(pc.equal(rows["bundle_id"], bundle_id)), level)
        for bundle_id in count_by_bundle(rows)
        if bundle_id != info.bundle_id
    }
    if len(mine) < settings.min_rows:
        said = f"too few requests to judge: {len(mine)}, and at least {settings.min_rows} are wanted"
        return Drift(judged=False, drifted=False, said=said, causes=[], features=[], examples=[], others=others, **facts), None
    features: list[Feature] = []
    embedded = snapshot = None  # of too few different texts, only how often they came can be judged
    if len(answered) >= settings.min_rows:
        features, embedded, snapshot = _features(settings, info, reference, answered, level)
    causes = causes_of(settings, features, facts["empty"], facts["repeated"], facts["repeated_text"])
    said = "; ".join(cause.said for cause in causes) or "as the reference"
    examples = _examples(answered, embedded) if causes and embedded else []
    more = {"causes": causes, "features": features, "examples": examples, "others": others, **facts}
    return Drift(judged=True, drifted=bool(causes), said=said, **more), snapshot


def _facts(
    settings: DriftConfig, info: BundleInfo, window: Window, mine: pa.Table, answered: pa.Table, level: float
) -> dict[str, Any]:
    now = datetime.now(UTC)
    times = pc.min_max(window.rows["time"]).as_py()
    most, text = _most_frequent(mine)
    return {
        "bundle_id": info.bundle_id,
        "level": level,
        "n_rows": len(mine),
        "n_texts": len(answered),
        "n_found": window.n_found,
        "first": times["min"].isoformat() if times["min"] else None,
        "last": times["max"].isoformat() if times["max"] else None,
        "empty": mine["label"].null_count / max(1, len(mine)),
        "repeated": most / max(1, len(mine)) if most > 1 else 0.0,
        "repeated_text": text if most > 1 else None,
        "ahead": window.ahead,
        "skipped": dict(window.skipped),
        "reference_age_days": round((now - datetime.fromisoformat(info.created)).total_seconds() / 86400, 2),
        "created": now.isoformat(timespec="seconds"),
    }


def _most_frequent(mine: pa.Table) -> tuple[int, str | None]:
    """How often the most frequent text came, empty ones aside, and the text where it is logged, else its hash."""
    texts = mine.filter(pc.not_equal(mine["text_sha256"], _EMPTY))
    if not len(texts):
        return 0, None
    counts = pc.value_counts(texts["text_sha256"])
    most = pc.max(counts.field("counts")).as_py()
    digest = counts.field("values")[int(np.argmax(counts.field("counts").to_numpy(zero_copy_only=False)))].as_py()
    row = texts.filter(pc.equal(texts["text_sha256"], digest)).slice(0, 1).to_pylist()[0]
    return most, row["text"] or digest


def _unrepeated(rows: pa.Table) -> pa.Table:
    """The first row of each text, since the reference holds each text once as well."""
    digests = rows["text_sha256"].combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
    return rows.take(np.sort(np.unique(digests, return_index=True)[1]))


def _features(
    settings: DriftConfig, info: BundleInfo, reference: Reference, rows: pa.Table, level: float
) -> tuple[list[Feature], Embedded | None, Any]:
    before, now = _frames(info, reference, rows)
    kept = [column for column in now.columns if now[column].notna().any()]
    p, snapshot = column_tests(before[kept], now[kept], ["label"], level) if kept else ({}, None)
    features = [_column(settings, name, before[name].dropna(), now[name].dropna(), p.get(name), level) for name in now.columns]
    embedded = _embedded(settings, info, reference, rows)
    drifted = embedded is not None and embedded.p < level
    features.append(Feature("embedding", embedded and embedded.p, None, drifted, None, None))
    return features, embedded, snapshot


def _frames(info: BundleInfo, reference: Reference, rows: pa.Table) -> tuple["pd.DataFrame", "pd.DataFrame"]:
    """Reference and window with the same columns; the confidence in texts that it has learned from is left out."""
    import pandas as pd

    before = pd.DataFrame(dict(zip(Descriptors._fields, reference.descriptors.T.astype(float), strict=True)))
    labels = np.array(info.labels, dtype=object)[reference.label_ids]
    before["label"] = labels
    before["score"] = np.where(reference.seen, np.nan, reference.scores.astype(float))
    now = rows.select([*Descriptors._fields, "label", "score"]).to_pandas()
    return before, now.astype(dict.fromkeys([*Descriptors._fields, "score"], float))


def _column(settings: DriftConfig, name: str, before: Any, now: Any, p: float | None, level: float) -> Feature:
    if p is None:
        return Feature(name, None, None, False, None, None)
    if name == "label":
        labels = sorted({*before, *now})
        counts = [np.array([(side == label).sum() for label in labels]) for side in (before, now)]
        effect, shares = total_variation(*counts), [side / side.sum() for side in counts]
        bins = [{"from": label, "before": float(b), "now": float(n)} for label, b, n in zip(labels, *shares, strict=True)]
        medians: tuple[float | None, float | None] = (None, None)
    else:
        sides = before.to_numpy(), now.to_numpy()
        effect, bins = ks_distance(*sides), _histogram(*sides)
        medians = float(np.median(sides[0])), float(np.median(sides[1]))
    return Feature(name, p, effect, p < level and effect >= settings.min_effect, *medians, bins)


def _histogram(before: np.ndarray, now: np.ndarray) -> list[dict[str, Any]]:
    """Shares in bins of equal width between the 0.5th and the 99.5th percentile; what lies outside goes to the ends."""
    low, high = np.quantile(np.concatenate([before, now]), (0.005, 0.995))
    edges = np.linspace(low, high if high > low else low + 1, _N_BINS + 1)
    shares = [np.histogram(np.clip(side, edges[0], edges[-1]), edges)[0] / len(side) for side in (before, now)]
    return [{"from": float(e), "before": float(b), "now": float(n)} for e, b, n in zip(edges, *shares, strict=False)]


def _embedded(settings: DriftConfig, info: BundleInfo, reference: Reference, rows: pa.Table) -> Embedded | None:
    rows = rows.select(["sketch", "label"])
    if not len(rows) or rows["sketch"].null_count:
        return None
    now = np.array(rows["sketch"].combine_chunks().flatten()).reshape(len(rows), -1)
    if now.shape[1] != reference.sketches.shape[1]:
        return None
    labels = pc.index_in(rows["label"], pa.array(info.labels)).to_numpy()
    fresh = ~reference.seen
    return embedding_test(
        reference.sketches[fresh].astype(np.float32), now, reference.label_ids[fresh], labels, settings.n_permutations
    )


def _examples(rows: pa.Table, embedded: Embedded) -> list[Example]:
    order = embedded.places[np.argsort(-embedded.witness)][:_N_EXAMPLES]
    names = ["text", "text_sha256", "label", "score", "request_id"]
    return [Example(**row) for row in rows.select(names).take(order).to_pylist()]


def _other(settings: DriftConfig, reference: Reference, rows: pa.Table, level: float) -> dict[str, Any]:
    """What can be said of another bundle's rows: whether their texts are others, by what needs no model."""
    import pandas as pd

    found: dict[str, Any] = {"n_rows": len(rows), "drifted": None}
    rows = rows.filter(pc.is_valid(rows["letters"]))
    if len(rows) < settings.min_rows:
        return found
    before = pd.DataFrame(dict(zip(Descriptors._fields, reference.descriptors.T.astype(float), strict=True)))
    now = _unrepeated(rows).select(list(OF_ANY_BUNDLE)).to_pandas().astype(float)
    p, _ = column_tests(before[list(OF_ANY_BUNDLE)], now, [], level)
    features = [_column(settings, name, before[name], now[name], p[name], level) for name in OF_ANY_BUNDLE]
    return {**found, "drifted": [feature.name for feature in features if feature.drifted]}


def as_dict(found: Drift) -> dict[str, Any]:
    """For drift.json."""
    return asdict(found)
