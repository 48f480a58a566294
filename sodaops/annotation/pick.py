"""Which requests are worth a person's time: unsure answers, texts unlike the reference, texts unlike each other, and chance."""

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
from sodaops.drift.statistics import witness
from sodaops.errors import DataError

_TASK = ("text", "text_sha256", "label", "score", "request_id", "place", "bundle_id")


@dataclass(frozen=True)
class Picked:
    """What was chosen, and from how much."""

    tasks: list[dict[str, Any]]
    n_candidates: int  # different texts that nobody knows yet
    n_known: int  # texts that are in the data, or tasks already
    n_hidden: int  # requests whose text is not logged


def pick(
    info: BundleInfo,
    reference: Reference,
    rows: pa.Table,
    store: Store,
    known: Collection[str],
    n: int,
    shares: dict[str, float],
) -> Picked:
    """Chooses texts to annotate from a window of the request log.

    ``random`` texts come first, out of all candidates, so that what people say of them is an honest estimate; the others
    are drawn from what is left. Requests with feedback whose text is no task yet come along whatever ``n`` is.

    Args:
        info: of the bundle that answered.
        reference: its own.
        rows: of the request log, as :func:`~sodaops.request_log.window.read_window` gives them.
        store: with the tasks that are there already.
        known: SHA-256 of cleaned texts that need no label any more: those of the data.
        n: how many.
        shares: uncertain, drifted, diverse, random -> part of n; they sum to 1.

    Raises:
        DataError: no request of this bundle in the window, or none whose text is logged.
    """
    mine = rows.filter(pc.and_(pc.equal(rows["bundle_id"], info.bundle_id), pc.is_valid(rows["label"])))
    if not len(mine):
        raise DataError(f"the window holds no request that bundle {info.bundle_id} answered; see drift.last and drift.since.")
    shown = mine.filter(pc.is_valid(mine["text"]))
    if not len(shown):
        raise DataError("the request log holds hashes and no texts; serve with serve.log_texts=true to have texts to annotate.")
    known = set(known) | {task.text_sha256 for task in store.state().tasks}
    texts_of = _texts_by_request(shown)
    asked_for = _feedback(shown, texts_of, store, known)
    candidates = _unknown(shown, known | {task["text_sha256"] for task in asked_for})
    ends = [0, *(round(n * part) for part in itertools.accumulate(shares.values()))]
    counts = {why: end - begin for why, (begin, end) in zip(shares, itertools.pairwise(ends), strict=True)}
    places = _choose(candidates, reference, info, counts)
    chosen = [{**_fields(candidates, place, info), "why": why} for place, why in places.items()]
    for task in chosen:
        if len(texts_of[task["request_id"], task["place"]]) > 1:
            task |= {"request_id": None, "place": None}  # feedback on such a request would be feedback on every one of them
    tasks = [*asked_for, *chosen]
    different = len(pc.unique(shown["text_sha256"]))
    return Picked(tasks, len(candidates), different - len(candidates), len(mine) - len(shown))


def _choose(rows: pa.Table, reference: Reference, info: BundleInfo, counts: dict[str, int]) -> dict[int, str]:
    """Place -> why, in random order, so that nobody labels a block of one kind."""
    if not len(rows):
        return {}
    rng = np.random.default_rng(0)
    chosen = dict.fromkeys(rng.permutation(len(rows))[: counts["random"]].tolist(), "random")
    sketches = _sketches(rows)
    ways: dict[str, Callable[[], np.ndarray]] = {"uncertain": lambda: _margin(rows)}
    if sketches is not None:
        ways["drifted"] = lambda: -_strange(rows, sketches, reference, info)
    for why, order in ways.items():
        left = [place for place in np.argsort(order(), kind="stable").tolist() if place not in chosen]
        chosen |= dict.fromkeys(left[: counts[why]], why)
    if sketches is not None:
        chosen |= dict.fromkeys(_farthest(sketches, list(chosen), counts["diverse"]), "diverse")
    return {place: chosen[place] for place in rng.permutation(list(chosen)).tolist()} if chosen else {}


def _margin(rows: pa.Table) -> np.ndarray:
    """The gap between the two most probable labels, float [n]; the smallest are the least sure."""
    ordered = np.sort(np.array(rows["probs"].to_pylist()), axis=1)
    return ordered[:, -1] - ordered[:, -2]


def _strange(rows: pa.Table, sketches: np.ndarray, reference: Reference, info: BundleInfo) -> np.ndarray:
    """How much more at home a text is in the window than in the reference, among answers of its label; float [n]."""
    labels = pc.index_in(rows["label"], pa.array(info.labels)).to_numpy()
    fresh = ~reference.seen
    before, found = reference.sketches[fresh].astype(np.float32), np.zeros(len(rows), dtype=np.float32)
    for label in np.unique(labels):
        mine, theirs = labels == label, before[reference.label_ids[fresh] == label]
        found[mine] = witness(theirs if len(theirs) else before, sketches[mine], sketches[mine])
    return found


def _farthest(sketches: np.ndarray, chosen: list[int], n: int) -> list[int]:
    """Places whose sketches are farthest from all that is chosen, one after another (Gonzalez 1985)."""
    found: list[int] = []
    nearest = np.full(len(sketches), np.inf)
    for place in chosen:
        nearest = np.minimum(nearest, np.linalg.norm(sketches - sketches[place], axis=1))
    nearest[chosen] = -1
    while len(found) < n and len(sketches) > len(chosen) + len(found):
        place = int(nearest.argmax())
        found.append(place)
        nearest = np.minimum(nearest, np.linalg.norm(sketches - sketches[place], axis=1))
        nearest[[place, *found]] = -1
    return found


def _sketches(rows: pa.Table) -> np.ndarray | None:
    if not len(rows) or rows["sketch"].null_count:
        return None
    return np.array(rows["sketch"].combine_chunks().flatten(), dtype=np.float32).reshape(len(rows), -1)


def _unknown(rows: pa.Table, known: set[str]) -> pa.Table:
    """The first row of each text that is not known."""
    places, seen = [], set(known)
    for place, digest in enumerate(rows["text_sha256"].to_pylist()):
        if digest not in seen:
            seen.add(digest)
            places.append(place)
    return rows.take(pa.array(places, pa.int64()))


def _texts_by_request(rows: pa.Table) -> dict[tuple[str, int], dict[str, int]]:
    """Request id and place -> SHA-256 of each text asked under them -> its first row. Clients may choose request ids, so one
    may stand for several texts."""
    found: dict[tuple[str, int], dict[str, int]] = defaultdict(dict)
    keys = zip(rows["request_id"].to_pylist(), rows["place"].to_pylist(), strict=True)
    for row, (key, digest) in enumerate(zip(keys, rows["text_sha256"].to_pylist(), strict=True)):
        found[key].setdefault(digest, row)
    return found


def _feedback(
    rows: pa.Table, texts_of: dict[tuple[str, int], dict[str, int]], store: Store, known: set[str]
) -> list[dict[str, Any]]:
    """The requests of the window that somebody gave feedback on, as tasks: their label is in the store already. A request
    that stands for several texts tells nothing of any of them, and is left out."""
    asked = [texts_of[key] for key in store.feedback_without_task() if key in texts_of]
    found = {digest: row for texts in asked if len(texts) == 1 for digest, row in texts.items() if digest not in known}
    return [{**_fields(rows, row, None), "why": "feedback"} for row in found.values()]


def _fields(rows: pa.Table, place: int, info: BundleInfo | None) -> dict[str, Any]:
    row = rows.slice(place, 1).to_pylist()[0]
    probs = dict(zip(info.labels, row["probs"], strict=True)) if info is not None else None
    return {**{name: row[name] for name in _TASK}, "probs": probs}
