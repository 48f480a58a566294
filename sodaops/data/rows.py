"""Selects the rows to keep and assigns them to splits, by their hashes, labels and positions.

Rows are numbered from 0 through all tables in order. Texts are compared by the first 128 bits of their SHA-256; among ten
million texts, the probability of a collision is about 1 in 10^25.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sodaops.config.schema import DataConfig
from sodaops.data.parts import Fault, Part, read_part
from sodaops.data.splits import SPLITS
from sodaops.errors import SHOWN, DataError, some
from sodaops.tasks.base import Targets, Task

ADDED, CORRECTED = "added", "corrected"  # in Rows.given: an added table, or one of corrections; see assign_splits
CORRECTIONS = ".corrections.csv"  # end of the name of a table whose rows replace those with the same text
Dropped = dict[str, dict[str, Any]]  # reason -> number of rows, and where the first are
_CHUNK_ROWS = 2**20  # rows that are processed at once, approximately; bounds memory
_EMPTY_HI, _EMPTY_LO = np.frombuffer(hashlib.sha256(b"").digest(), ">u8")[:2].astype(np.uint64)


@dataclass(frozen=True)
class Rows:
    """The columns by which rows are selected and assigned to splits; arrays of length n_rows."""

    tables: list[str]
    given: list[str | None]  # for each table: the split it was given as, ADDED, or None if its rows are split by hash
    starts: np.ndarray  # int64 [n_tables + 1]: the first row of each table, then n_rows
    hash_hi: np.ndarray  # uint64
    hash_lo: np.ndarray  # uint64
    label_id: np.ndarray  # int32: the target

    def table_of(self, rows: np.ndarray | int) -> np.ndarray:
        """The index in ``tables`` of each row's table, int64."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def describe(self, i: int) -> str:
        """The table and number of row ``i``, for messages."""
        return f"{self.tables[self.table_of(i)]} row {self.number(i)}"

    def number(self, i: int) -> int:
        """The row's number in its table, from 1."""
        return int(i - self.starts[self.table_of(i)]) + 1


def read_rows(config: DataConfig, sources: Mapping[str, str], parts: Sequence[Part], task: Task) -> tuple[Targets, Rows]:
    """Collects hashes and targets from the parts.

    Args:
        config: conf/data.
        sources: split, ``all`` or the path of an added table -> table.
        parts: the parts of all tables, in order.
        task: reads the targets.

    Returns:
        The targets, and the rows.

    Raises:
        DataError: invalid cells, or too few targets.
    """
    n_rows = sum(part.n_rows for part in parts)
    hash_hi, hash_lo, cell_id = np.empty(n_rows, np.uint64), np.empty(n_rows, np.uint64), np.empty(n_rows, np.int32)
    id_of: dict[str, int] = {}  # distinct cells of the targets, in order of appearance
    faults: list[dict[str, Fault]] = [{} for _ in sources]
    start = 0
    for part in parts:
        rows, part_faults = read_part(part, selection_only=True)
        span = slice(start, start + part.n_rows)
        hash_hi[span], hash_lo[span] = rows["hash_hi"].to_numpy(), rows["hash_lo"].to_numpy()
        ids = [id_of.setdefault(cell, len(id_of)) for cell in rows["label"].dictionary.to_pylist()]
        if len(id_of) > task.max_cells:
            raise DataError(
                f"{part.table}: {config.label_column} has more than {task.max_cells:,} different values in its first "
                f"{part.first + part.n_rows - 1:,} rows; expected labels. Set data.label_column to the column that holds them."
            )
        cell_id[span] = np.array(ids, np.int32)[rows["label"].indices.to_numpy()]
        table_faults = faults[part.source]
        for name, fault in part_faults.items():
            table_faults[name] = table_faults[name].merge(fault) if name in table_faults else fault
        start += part.n_rows
    counts = np.bincount(cell_id, minlength=len(id_of))
    targets = task.read_cells(", ".join(sources.values()), dict(zip(id_of, counts.tolist(), strict=True)), config)
    sizes = np.bincount([part.source for part in parts], [part.n_rows for part in parts], len(sources))
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    label_id = targets.ids[cell_id]
    for i, path in enumerate(sources.values()):
        span = slice(starts[i], starts[i + 1])
        _check_cells(path, faults[i], targets.labels, list(id_of), cell_id[span], label_id[span], config, task)
    kinds = {"all": None, **{name: name for name in SPLITS}}
    given = [kinds.get(name, CORRECTED if name.endswith(CORRECTIONS) else ADDED) for name in sources]
    return targets, Rows(list(sources.values()), given, starts, hash_hi, hash_lo, label_id)


def _check_cells(
    path: str, faults: Mapping[str, Fault], labels: Sequence[str], cells: Sequence[str], cell_id: np.ndarray,
    label_id: np.ndarray, config: DataConfig, task: Task,
) -> None:  # fmt: skip
    """Raises an error for the first fault in a table's cells."""
    if long := faults.get("long"):
        raise DataError(
            f"{path} row {long.rows[0]}: {', '.join(config.text_columns)} has {long.value:,} characters; at most "
            f"{config.max_chars:,} are allowed ({long.n_rows} rows: {_list_first(long.rows, long.n_rows)}). "
            "The usual cause is an unclosed quote; if the texts are that long, set data.max_chars."
        )
    bad = np.flatnonzero(label_id < 0)
    if len(bad):
        unknown = [cells[i] for i in dict.fromkeys(cell_id[bad].tolist())]
        raise task.bad_cells(f"{path} {config.label_column}", unknown, (bad + 1).tolist(), labels, config)
    for label in labels if config.vote_columns else ():
        if votes := faults.get(f"vote_{label}"):
            raise DataError(
                f"{path} row {votes.rows[0]}: {config.vote_columns[label]}={votes.value!r}; expected a number of votes, at "
                f"least 0 ({votes.n_rows} bad rows: {_list_first(votes.rows, votes.n_rows)})."
            )


def select_rows(rows: Rows, names: Sequence[str], config: DataConfig) -> tuple[np.ndarray, Dropped]:
    """Decides which rows are kept.

    Args:
        rows: all rows.
        names: of the targets, for messages.
        config: conf/data.

    Returns:
        The rows to keep, bool [n_rows]; and the dropped rows: empty texts, added texts that are already in another table,
        repeated texts, texts with two labels, and those that are not in the sample of ``data.max_rows``.

    Raises:
        DataError: all texts are empty, a text occurs in two given splits, or it has two labels and ``data.conflicts`` is
            ``error``.
    """
    dropped: Dropped = {}
    kept = (rows.hash_hi != _EMPTY_HI) | (rows.hash_lo != _EMPTY_LO)
    if not kept.any():
        raise DataError(
            f"{rows.tables[0]}: all {len(kept)} texts are empty after cleaning; check data.text_column and data.cleaning."
        )
    _record_dropped(dropped, "empty_text", rows, ~kept)
    if CORRECTED in rows.given:
        replaced = _corrections(rows)[1]
        _record_dropped(dropped, "replaced", rows, kept & replaced)
        kept &= ~replaced
    if ADDED in rows.given:
        known = _known(rows, kept)
        _record_dropped(dropped, "known_text", rows, known)
        kept &= ~known
    repeated, conflicting = _repeated(rows, kept, names, config)
    _record_dropped(dropped, "repeated_text", rows, repeated)
    _record_dropped(dropped, "two_labels", rows, conflicting)
    kept &= ~repeated & ~conflicting
    if config.max_rows is not None:
        sampled = _sample(rows, kept, config.max_rows)
        _record_dropped(dropped, "not_sampled", rows, kept & ~sampled)
        kept = sampled
    return kept, dropped


def _sample(rows: Rows, kept: np.ndarray, n_rows: int) -> np.ndarray:
    """At most ``n_rows`` of the kept rows of each table, bool [n_rows]: those with the lowest hashes, whatever their order."""
    sampled = np.zeros_like(kept)
    for begin, end in itertools.pairwise(rows.starts):
        places = begin + np.flatnonzero(kept[begin:end])
        # By the second half of the hash, since the first one decides the split.
        order = np.lexsort((rows.hash_hi[places], rows.hash_lo[places]))
        sampled[places[order[:n_rows]]] = True
    return sampled


def assign_splits(rows: Rows, config: DataConfig) -> np.ndarray:
    """The split of each row, int8, as an index of SPLITS.

    A table that was given as a split keeps it. Added rows go to train or, if the other rows are split by hash, to val by their
    hash. They never go to test, so that models trained before and after the addition can be compared on it. All other rows
    are assigned as by :func:`sodaops.data.splits.assign_split`. A correction has the split of the row that it replaces.
    """
    splits = np.empty(len(rows.label_id), np.int8)
    train, val = config.fractions[0], config.fractions[0] + config.fractions[1]
    for given, begin, end in zip(rows.given, rows.starts[:-1], rows.starts[1:], strict=True):
        for start in range(begin, end, _CHUNK_ROWS):
            span = slice(start, min(start + _CHUNK_ROWS, end))
            position = rows.hash_hi[span] / 2.0**64  # in [0, 1)
            by_hash: Any = (position >= train).astype(np.int8) + (position >= val)  # 0, 1 or 2: the interval it falls into
            if given == ADDED:
                by_hash = (by_hash == 1).astype(np.int8) if "all" in config.sources else 0
            splits[span] = SPLITS.index(given) if given in SPLITS else by_hash
    if CORRECTED in rows.given:
        corrects, _ = _corrections(rows)
        splits = np.where(corrects >= 0, splits[corrects], splits)
    return splits


def _record_dropped(dropped: Dropped, reason: str, rows: Rows, is_dropped: np.ndarray) -> None:
    if is_dropped.any():
        first = np.flatnonzero(is_dropped)[:SHOWN]
        dropped[reason] = {"n_rows": int(is_dropped.sum()), "first": [rows.describe(i) for i in first]}


def _groups(rows: Rows, candidates: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Groups the rows whose text occurs more than once.

    Args:
        rows: all rows.
        candidates: bool [n_rows]; other rows are ignored.

    Yields:
        Batches of complete groups: the rows, int64 [n], sorted by text and then by number; the position in them at which each
        text's rows start, int64 [n_texts]; and for each row the index of its text, int64 [n].
    """
    n_slices = len(candidates) // _CHUNK_ROWS + 1
    for k in range(n_slices):
        # One slice of the range of hashes; all rows of a text are in the same slice.
        low, high = 2**64 * k // n_slices, 2**64 * (k + 1) // n_slices - 1
        order = np.flatnonzero(candidates & (rows.hash_hi >= np.uint64(low)) & (rows.hash_hi <= np.uint64(high)))
        # Sort by hash. The sort is stable, so the rows of a text stay in order.
        order = order[np.lexsort((rows.hash_lo[order], rows.hash_hi[order]))]
        hi, lo = rows.hash_hi[order], rows.hash_lo[order]
        # same[i]: row i has the text of row i - 1; the first and the last entry stay False.
        same = np.zeros(len(order) + 1, bool)
        same[1:-1] = (hi[1:] == hi[:-1]) & (lo[1:] == lo[:-1])
        # Drop texts that occur once: equal neither to the row before nor to the row after.
        grouped = same[:-1] | same[1:]
        if grouped.any():
            is_first = ~same[:-1][grouped]
            yield order[grouped], np.flatnonzero(is_first), np.cumsum(is_first) - 1


def _list_first(first: Sequence[object], n: int) -> str:
    """The first of ``n`` items, and how many more there are."""
    return some(first) + (f" and {n - len(first)} more" if n > len(first) else "")


def _list_pairs(pairs: np.ndarray, text: Callable[[int, int], str]) -> str:
    """The first pairs (int64 [n, 2]: earlier and later row) by their later row, and how many more there are."""
    first = pairs[np.argsort(pairs[:, 1])[:SHOWN]].tolist()
    return _list_first([text(earlier, later) for earlier, later in first], len(pairs))


def _known(rows: Rows, candidates: np.ndarray) -> np.ndarray:
    """Added rows whose text is also in a table that was not added, bool [n_rows]."""
    known = np.zeros(len(candidates), bool)
    is_added = np.array([given == ADDED for given in rows.given])
    for group, starts, text in _groups(rows, candidates):
        added = is_added[rows.table_of(group)]
        known[group] = added & np.logical_or.reduceat(~added, starts)[text]
    return known


def _corrections(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """For the last correction of a text the first row that it replaces, int64 [n_rows], else -1; and the rows to drop, bool."""
    is_correction = np.array([given == CORRECTED for given in rows.given])[rows.table_of(np.arange(len(rows.label_id)))]
    corrects, replaced = np.full(len(is_correction), -1), is_correction.copy()  # one without a row to replace is dropped too
    for group, starts, text in _groups(rows, np.ones(len(is_correction), bool)):
        last = np.maximum.reduceat(np.where(is_correction[group], group, -1), starts)
        first = np.minimum.reduceat(np.where(is_correction[group], len(is_correction), group), starts)
        valid = (last >= 0) & (first < len(is_correction))
        corrects[last[valid]] = first[valid]
        replaced[group] = np.where(valid[text], group != last[text], is_correction[group])
    return corrects, replaced


def _repeated(
    rows: Rows, candidates: np.ndarray, names: Sequence[str], config: DataConfig
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Later rows of texts with one label, and all rows of texts with two labels; bool [n_rows] each."""
    repeated, conflicting = np.zeros(len(candidates), bool), np.zeros(len(candidates), bool)
    kind_of = {kind: i for i, kind in enumerate(dict.fromkeys(rows.given))}
    kinds = np.array([kind_of[given] for given in rows.given])
    none = np.empty((0, 2), np.int64)
    leaks, conflicts = [none], [none]  # pairs of an earlier and a later row with the same text
    for group, starts, text in _groups(rows, candidates):
        # Compare each row with the first one of its text.
        first, is_later = group[starts][text], np.ones(len(group), bool)
        is_later[starts] = False
        differs = is_later & (rows.label_id[group] != rows.label_id[first])
        two_labels = np.logical_or.reduceat(differs, starts)[text]
        repeated[group] = is_later & ~two_labels
        conflicting[group] = two_labels
        # Rows whose text is first in a table that was given as another split.
        elsewhere = is_later & (kinds[rows.table_of(group)] != kinds[rows.table_of(first)])
        leaks.append(np.stack([first[elsewhere], group[elsewhere]], axis=1))
        # For each text with two labels, the first row whose label differs from that of the text's first row.
        other = np.flatnonzero(differs)
        other = other[np.unique(text[other], return_index=True)[1]]
        conflicts.append(np.stack([first[other], group[other]], axis=1))
    leak, conflict = np.concatenate(leaks), np.concatenate(conflicts)
    if len(leak):
        where = _list_pairs(leak, lambda i, j: f"{rows.describe(i)} and {rows.describe(j)}")
        raise DataError(
            f"{len(leak)} texts are in two of the given splits: {where}. A test text must not be trained on: remove them from "
            "one split, or put all rows into one table (data.path), which is then split by the texts' hashes."
        )
    if len(conflict) and config.conflicts == "error":
        where = _list_pairs(
            conflict,
            lambda i, j: f"{rows.describe(i)} {names[rows.label_id[i]]}, row {rows.number(j)} {names[rows.label_id[j]]}",
        )
        raise DataError(f"{len(conflict)} texts have two labels: {where}. Correct them, or drop them with data.conflicts=drop.")
    return repeated, conflicting
