"""Drift by segment: requests with one value of a slice column, compared with the reference's texts that have it too."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import pyarrow as pa

from sodaops.bundle.files import printable
from sodaops.bundle.reference import Reference
from sodaops.drift.features import TITLES, Feature

MAX_SEGMENTS = 20  # values of a column, the most frequent ones


@dataclass(frozen=True)
class Segment:
    """The requests with a value of a slice column."""

    column: str
    value: str
    n_texts: int  # distinct ones
    n_val: int  # texts of val in the reference
    drifted: bool | None  # None: too few of either
    features: list[str]  # names of those that drifted
    level: float  # a p-value below it is significant

    @property
    def title(self) -> str:
        """The name to show to people."""
        return f"{self.column}={printable(self.value)}"

    @property
    def verdict(self) -> str:
        """What was found, in words."""
        if self.drifted is None:
            return f"too few texts for a verdict ({self.n_val} of val)"
        return f"drift in {', '.join(TITLES.get(name, name) for name in self.features)}" if self.drifted else "no drift"


def compare_segments(
    columns: Sequence[str], known: Reference, rows: pa.Table, min_rows: int, level: float,
    compare: Callable[[Reference, pa.Table, float], list[Feature]],
) -> list[Segment]:  # fmt: skip
    """Compares each segment with at least ``min_rows`` texts, and as many of val.

    Each of k segments is tested at level / k (Bonferroni), so false alarms in any of them are as rare as in one window.

    Args:
        columns: the bundle's slice columns.
        known: the bundle's reference.
        rows: requests that the bundle answered; ``context`` has JSON objects, column -> value.
        min_rows: as in conf/drift.
        level: of each feature's test in a window.
        compare: rows of the reference, requests and a level -> the features.
    """
    contexts = rows["context"].combine_chunks().dictionary_encode()
    ids = contexts.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    objects = [*map(json.loads, contexts.dictionary.to_pylist()), {}]  # the last one for rows without
    parts = []
    for i, column in enumerate(columns):
        values = np.array([context.get(column) for context in objects], dtype=object)[ids]
        for value, _ in Counter(value for value in values if value is not None).most_common(MAX_SEGMENTS):
            kept = np.zeros(len(known.seen), bool) if known.segments is None else known.segments[:, i] == value
            parts.append((column, value, kept, distinct_texts(rows.filter(pa.array(values == value)))))
    n_val = [int((kept & ~known.seen).sum()) for _, _, kept, _ in parts]
    enough = [min(n, len(texts)) >= min_rows for n, (_, _, _, texts) in zip(n_val, parts, strict=True)]
    level /= max(1, sum(enough))
    segments = []
    for n, judged, (column, value, kept, texts) in zip(n_val, enough, parts, strict=True):
        features = compare(_part(known, kept), texts, level) if judged else []
        drifted = [feature.name for feature in features if feature.drifted]
        segments.append(Segment(column, value, len(texts), n, bool(drifted) if judged else None, drifted, level))
    return segments


def distinct_texts(rows: pa.Table) -> pa.Table:
    """The first row of each text, since the reference also has each text once."""
    digests = rows["text_sha256"].combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
    return rows.take(np.sort(np.unique(digests, return_index=True)[1]))


def _part(known: Reference, kept: np.ndarray) -> Reference:
    """Some rows of a reference, bool [n_rows]."""
    arrays = {each.name: getattr(known, each.name) for each in fields(known) if each.name not in ("center", "axes")}
    return replace(known, **{name: array[kept] for name, array in arrays.items() if array is not None})
