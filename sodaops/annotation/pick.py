"""Picks requests to annotate: disagreements of two bundles, uncertain predictions, drifted, diverse and random texts."""

import itertools
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sodaops.annotation.store import Store
from sodaops.annotation.tasks import normal_form
from sodaops.bundle import layout
from sodaops.bundle.layout import BundleInfo
from sodaops.bundle.reference import Reference
from sodaops.drift.measure import answer_groups
from sodaops.drift.statistics import drift_scores
from sodaops.errors import DataError

_FIELDS = ("text", "text_sha256", "label", "score", "request_id", "place", "bundle_id")
RequestKey = tuple[str, int]  # request id and position in the request


@dataclass(frozen=True)
class PickResult:
    """The new tasks, and the numbers of texts considered.

    Attributes:
        tasks: the fields of each task.
        n_candidates: number of distinct texts that are new.
        n_known: number of distinct texts that are already in the data or the store, or have feedback.
        n_hidden: number of rows whose text is not in the log.
    """

    tasks: list[dict[str, Any]]
    n_candidates: int
    n_known: int
    n_hidden: int


def pick_tasks(
    info: BundleInfo,
    reference: Reference,
    rows: pa.Table,
    store: Store,
    known: Collection[str],
    n: int,
    shares: dict[str, float],
    disagreed: Collection[str] = (),
) -> PickResult:
    """Picks texts to annotate from a window of the request log.

    ``random`` texts are drawn first, from all candidates, so that their labels give an unbiased estimate of the accuracy. Then
    come disagreements, in random order too, and the other kinds share what is left of n. New texts with
    feedback are always added, in addition to the n texts.

    Args:
        info: the bundle whose answers are considered.
        reference: the drift reference of that bundle.
        rows: rows of the request log, from :func:`~sodaops.request_log.window.read_window`.
        store: the annotation store; its tasks are not picked again.
        known: SHA-256 of the cleaned texts that are in the data.
        n: number of texts to pick.
        shares: fraction of n for each kind (uncertain, drifted, diverse, random); the fractions sum to 1.
        disagreed: SHA-256 of the cleaned texts to which a challenger gave another answer.

    Raises:
        DataError: the window has no request answered by this bundle, or none with a text.
    """
    answered = rows.filter(pc.and_(pc.equal(rows["bundle_id"], info.bundle_id), pc.is_valid(rows["label"])))
    if not len(answered):
        raise DataError(f"no request in the window was answered by bundle {info.bundle_id}; see drift.last and drift.since.")
    with_text = answered.filter(pc.is_valid(answered["text"]))
    if not len(with_text):
        raise DataError("the request log has hashes but no texts; set serve.log_texts=true for the service to log them.")
    in_store = store.state().tasks
    known = set(known) | {task.text_sha256 for task in in_store} | {normal_form(task.text) for task in in_store}
    texts = _texts_of_requests(with_text)
    feedback = _feedback_tasks(with_text, texts, store, known)
    candidates = _first_of_each_text(with_text, known | {task["text_sha256"] for task in feedback})
    picked = [
        {**_fields(candidates, row, info), "why": why}
        for row, why in _pick(candidates, reference, info, n, shares, disagreed).items()
    ]
    for task in picked:
        if len(texts[task["request_id"], task["place"]]) > 1:  # feedback on this request id could concern another text
            task |= {"request_id": None, "place": None}
    n_distinct = len(pc.unique(with_text["text_sha256"]))
    return PickResult([*feedback, *picked], len(candidates), n_distinct - len(candidates), len(answered) - len(with_text))


def _counts(n: int, shares: dict[str, float]) -> dict[str, int]:
    """Kind -> number of texts. Rounding the cumulative shares instead of each share makes the counts sum to n."""
    total = sum(shares.values()) or 1.0
    ends = [0, *(round(n * part / total) for part in itertools.accumulate(shares.values()))]
    return {kind: end - start for kind, (start, end) in zip(shares, itertools.pairwise(ends), strict=True)}


def _pick(
    rows: pa.Table, reference: Reference, info: BundleInfo, n: int, shares: dict[str, float], disagreed: Collection[str]
) -> dict[int, str]:
    """Picked row -> kind, in random order, so that the kinds are mixed for annotators."""
    if not len(rows):
        return {}
    rng, counts = np.random.default_rng(0), _counts(n, shares)
    order, n_random = rng.permutation(len(rows)).tolist(), counts["random"]
    picked = dict.fromkeys(order[:n_random], "random")
    digests = rows["text_sha256"].to_pylist()
    first = [row for row in order[n_random:] if digests[row] in disagreed][: n - n_random]
    picked |= dict.fromkeys(first, "disagreed")
    if first:
        counts = _counts(n - len(picked), {**shares, "random": 0.0})
    sketches, task = _sketches(rows), layout.task_of(info.bundle_id, info)
    scores: dict[str, Callable[[], np.ndarray]] = {  # the lowest scores are picked
        "uncertain": lambda: -task.uncertainty(np.array(rows["probs"].to_pylist())) - 2.0 * _abstained(rows)
    }
    if sketches is not None:
        scores["drifted"] = lambda: -_drift_scores(sketches, reference, answer_groups(info, rows, task))
    for kind, score in scores.items():
        rest = [row for row in np.argsort(score(), kind="stable").tolist() if row not in picked]
        picked |= dict.fromkeys(rest[: counts[kind]], kind)
    if sketches is not None:
        picked |= dict.fromkeys(_farthest(sketches, list(picked), counts["diverse"]), "diverse")
    return {row: picked[row] for row in rng.permutation(list(picked)).tolist()} if picked else {}


def _abstained(rows: pa.Table) -> np.ndarray:
    """Whether the bundle abstained, bool [n]; those texts come first, as differences of probabilities are at most 1."""
    return pc.fill_null(rows["abstained"], False).to_numpy()


def _drift_scores(sketches: np.ndarray, reference: Reference, groups: np.ndarray) -> np.ndarray:
    """How much closer each text is to the window than to the reference, within its predicted label; float [n]."""
    unseen = ~reference.seen  # texts of the reference that the model was not trained on
    reference_sketches = reference.sketches[unseen].astype(np.float32)
    scores = np.zeros(len(sketches), dtype=np.float32)
    for label in np.unique(groups):
        of_label = groups == label
        compared = reference_sketches[reference.label_ids[unseen] == label]
        if not len(compared):  # the reference has no text with this predicted label
            compared = reference_sketches
        scores[of_label] = drift_scores(compared, sketches[of_label], sketches[of_label])
    return scores


def _farthest(sketches: np.ndarray, picked: list[int], n: int) -> list[int]:
    """Picks n rows, each farthest from all rows picked before (farthest-first traversal, Gonzalez 1985)."""
    new: list[int] = []
    # distance of each row to the nearest picked one; -1 for picked rows, so that they are not picked again
    distances = np.full(len(sketches), np.inf)
    for row in picked:
        distances = np.minimum(distances, np.linalg.norm(sketches - sketches[row], axis=1))
    distances[picked] = -1
    while len(new) < n and len(sketches) > len(picked) + len(new):
        new.append(int(distances.argmax()))
        distances = np.minimum(distances, np.linalg.norm(sketches - sketches[new[-1]], axis=1))
        distances[[*picked, *new]] = -1
    return new


def _sketches(rows: pa.Table) -> np.ndarray | None:
    """The embedding sketches, float32 [n, n_axes]; None if a row has none."""
    if not len(rows) or rows["sketch"].null_count:
        return None
    return np.array(rows["sketch"].combine_chunks().flatten(), dtype=np.float32).reshape(len(rows), -1)


def _first_of_each_text(rows: pa.Table, known: set[str]) -> pa.Table:
    """The first row of each text that is not known, neither its hash nor its normal form."""
    first, seen = [], set(known)
    for row, (digest, text) in enumerate(zip(rows["text_sha256"].to_pylist(), rows["text"].to_pylist(), strict=True)):
        names = {digest, normal_form(text)}
        if not names & seen:
            first.append(row)
        seen |= names
    return rows.take(pa.array(first, pa.int64()))


def _texts_of_requests(rows: pa.Table) -> dict[RequestKey, dict[str, int]]:
    """Request key -> SHA-256 of text -> first row. Clients may choose request ids, so several texts may share a key."""
    texts: dict[RequestKey, dict[str, int]] = defaultdict(dict)
    keys = zip(rows["request_id"].to_pylist(), rows["place"].to_pylist(), strict=True)
    for row, (key, digest) in enumerate(zip(keys, rows["text_sha256"].to_pylist(), strict=True)):
        texts[key].setdefault(digest, row)
    return texts


def _feedback_tasks(
    rows: pa.Table, texts: dict[RequestKey, dict[str, int]], store: Store, known: set[str]
) -> list[dict[str, Any]]:
    """Tasks for texts with feedback, whose label is already in the store. Keys that several texts share are left out."""
    with_feedback = [texts[key] for key in store.feedback_without_task() if key in texts]
    first = {digest: row for by_text in with_feedback if len(by_text) == 1 for digest, row in by_text.items()}
    return [{**_fields(rows, row, None), "why": "feedback"} for digest, row in first.items() if digest not in known]


def _fields(rows: pa.Table, row: int, info: BundleInfo | None) -> dict[str, Any]:
    values = rows.slice(row, 1).to_pylist()[0]
    probs = dict(zip(info.labels, values["probs"], strict=True)) if info is not None else None
    return {**{name: values[name] for name in _FIELDS}, "probs": probs}
