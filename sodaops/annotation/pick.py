"""Picks requests that are worth annotating: uncertain answers, drifted texts, diverse texts, and a random share."""

import itertools
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sodaops.annotation.store import Store
from sodaops.bundle.layout import BundleInfo
from sodaops.bundle.reference import Reference
from sodaops.drift.statistics import drift_scores
from sodaops.errors import DataError

_FIELDS = ("text", "text_sha256", "label", "score", "request_id", "place", "bundle_id")
RequestKey = tuple[str, int]  # request id and position in the request


@dataclass(frozen=True)
class PickResult:
    """The new tasks, and how many texts there were.

    Attributes:
        tasks: their fields.
        n_candidates: distinct texts that are neither in the data nor tasks.
        n_known: distinct texts that are.
        n_hidden: requests whose text is not in the log.
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
) -> PickResult:
    """Picks texts to annotate from a window of the request log.

    The ``random`` ones are drawn first, from all candidates, so that their labels give an unbiased estimate of the accuracy;
    the other kinds are picked from the rest. Requests with feedback are added in any case, if their text is no task yet.

    Args:
        info: the bundle that answered.
        reference: its reference.
        rows: of the request log, from :func:`~sodaops.request_log.window.read_window`.
        store: its tasks are not picked again.
        known: SHA-256 of the cleaned texts that are in the data.
        n: number of texts.
        shares: uncertain, drifted, diverse, random -> fraction of n; they sum to 1.

    Raises:
        DataError: the window has no request of this bundle, or none with a text.
    """
    answered = rows.filter(pc.and_(pc.equal(rows["bundle_id"], info.bundle_id), pc.is_valid(rows["label"])))
    if not len(answered):
        raise DataError(f"no request in the window was answered by bundle {info.bundle_id}; see drift.last and drift.since.")
    with_text = answered.filter(pc.is_valid(answered["text"]))
    if not len(with_text):
        raise DataError("the request log has hashes, but no texts to annotate; set serve.log_texts=true for the service.")
    known = set(known) | {task.text_sha256 for task in store.state().tasks}
    texts = _texts_of_requests(with_text)
    feedback = _feedback_tasks(with_text, texts, store, known)
    candidates = _first_of_each_text(with_text, known | {task["text_sha256"] for task in feedback})
    # Rounding the ends of the shares, not each share, gives n texts in all.
    ends = [0, *(round(n * part) for part in itertools.accumulate(shares.values()))]
    counts = {kind: end - start for kind, (start, end) in zip(shares, itertools.pairwise(ends), strict=True)}
    picked = [{**_fields(candidates, row, info), "why": why} for row, why in _pick(candidates, reference, info, counts).items()]
    for task in picked:
        if len(texts[task["request_id"], task["place"]]) > 1:  # feedback on this id could be about another text
            task |= {"request_id": None, "place": None}
    n_distinct = len(pc.unique(with_text["text_sha256"]))
    return PickResult([*feedback, *picked], len(candidates), n_distinct - len(candidates), len(answered) - len(with_text))


def _pick(rows: pa.Table, reference: Reference, info: BundleInfo, counts: dict[str, int]) -> dict[int, str]:
    """Row -> kind, in random order, so that annotators do not get all texts of one kind in a row."""
    if not len(rows):
        return {}
    rng = np.random.default_rng(0)
    picked = dict.fromkeys(rng.permutation(len(rows))[: counts["random"]].tolist(), "random")
    sketches = _sketches(rows)
    scores: dict[str, Callable[[], np.ndarray]] = {"uncertain": lambda: _margins(rows)}  # the lowest are picked
    if sketches is not None:
        scores["drifted"] = lambda: -_drift_scores(rows, sketches, reference, info)
    for kind, score in scores.items():
        rest = [row for row in np.argsort(score(), kind="stable").tolist() if row not in picked]
        picked |= dict.fromkeys(rest[: counts[kind]], kind)
    if sketches is not None:
        picked |= dict.fromkeys(_farthest(sketches, list(picked), counts["diverse"]), "diverse")
    return {row: picked[row] for row in rng.permutation(list(picked)).tolist()} if picked else {}


def _margins(rows: pa.Table) -> np.ndarray:
    """The difference of the two highest probabilities, float [n]; it is small where the model is uncertain."""
    ordered = np.sort(np.array(rows["probs"].to_pylist()), axis=1)
    return ordered[:, -1] - ordered[:, -2]


def _drift_scores(rows: pa.Table, sketches: np.ndarray, reference: Reference, info: BundleInfo) -> np.ndarray:
    """How much closer each text is to the window than to the reference, among the answers of its label; float [n]."""
    labels = pc.index_in(rows["label"], pa.array(info.labels)).to_numpy()
    unseen = ~reference.seen  # of the reference's texts, those that the model was not trained on
    reference_sketches = reference.sketches[unseen].astype(np.float32)
    scores = np.zeros(len(rows), dtype=np.float32)
    for label in np.unique(labels):
        of_label = labels == label
        compared = reference_sketches[reference.label_ids[unseen] == label]
        if not len(compared):  # the reference has no answer of this label
            compared = reference_sketches
        scores[of_label] = drift_scores(compared, sketches[of_label], sketches[of_label])
    return scores


def _farthest(sketches: np.ndarray, picked: list[int], n: int) -> list[int]:
    """n rows, each the farthest from all rows picked before (farthest-first traversal, Gonzalez 1985)."""
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
    """float32 [n, n_axes]; None if a row has none."""
    if not len(rows) or rows["sketch"].null_count:
        return None
    return np.array(rows["sketch"].combine_chunks().flatten(), dtype=np.float32).reshape(len(rows), -1)


def _first_of_each_text(rows: pa.Table, known: set[str]) -> pa.Table:
    """The first row of each text that is not known."""
    first, seen = [], set(known)
    for row, digest in enumerate(rows["text_sha256"].to_pylist()):
        if digest not in seen:
            seen.add(digest)
            first.append(row)
    return rows.take(pa.array(first, pa.int64()))


def _texts_of_requests(rows: pa.Table) -> dict[RequestKey, dict[str, int]]:
    """Request -> SHA-256 of its texts -> first row. Clients may choose request ids, so several texts may share one."""
    texts: dict[RequestKey, dict[str, int]] = defaultdict(dict)
    keys = zip(rows["request_id"].to_pylist(), rows["place"].to_pylist(), strict=True)
    for row, (key, digest) in enumerate(zip(keys, rows["text_sha256"].to_pylist(), strict=True)):
        texts[key].setdefault(digest, row)
    return texts


def _feedback_tasks(
    rows: pa.Table, texts: dict[RequestKey, dict[str, int]], store: Store, known: set[str]
) -> list[dict[str, Any]]:
    """Requests with feedback as tasks; their label is in the store already. An id that several texts share is left out."""
    with_feedback = [texts[key] for key in store.feedback_without_task() if key in texts]
    first = {digest: row for by_text in with_feedback if len(by_text) == 1 for digest, row in by_text.items()}
    return [{**_fields(rows, row, None), "why": "feedback"} for digest, row in first.items() if digest not in known]


def _fields(rows: pa.Table, row: int, info: BundleInfo | None) -> dict[str, Any]:
    values = rows.slice(row, 1).to_pylist()[0]
    probs = dict(zip(info.labels, values["probs"], strict=True)) if info is not None else None
    return {**{name: values[name] for name in _FIELDS}, "probs": probs}
