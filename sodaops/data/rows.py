"""Which rows of the raw tables go to which split, and which are left out; told by their hashes, labels and places alone.

A row's number here is its place in all tables after one another, from 0. Two texts are the same when 128 bits of their
SHA-256 are: among ten million texts, two others that agree in them have a chance of 1 in 10^25.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sodaops.config.schema import DataConfig
from sodaops.data.parts import MAX_VALUES, Fault, Part, read_part
from sodaops.data.splits import SPLITS
from sodaops.errors import SHOWN, DataError, some
from sodaops.text.labels import label_ids, label_order, no_label

ADDED = "added"  # in place of a split: of a table that was added, whose rows get theirs by the hash
Dropped = dict[str, dict[str, Any]]  # reason -> how many rows, and the places of the first
_SORTED_ROWS = 2**20  # sorted at once, about
_EMPTY_HI, _EMPTY_LO = np.frombuffer(hashlib.sha256(b"").digest(), ">u8")[:2].astype(np.uint64)


@dataclass(frozen=True)
class Rows:
    """What is known of each row; arrays of n_rows."""

    tables: list[str]
    given: list[str | None]  # of each table: its split, ADDED, or None where the split is made from the texts
    starts: np.ndarray  # int64 [n_tables + 1]: where each table begins
    hash_hi: np.ndarray  # uint64
    hash_lo: np.ndarray  # uint64
    label_id: np.ndarray  # int32

    def table_of(self, rows: np.ndarray | int) -> np.ndarray:
        """The table of each row, int64, as a place in ``tables``."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def place(self, i: int) -> str:
        """Where row ``i`` came from, for messages."""
        return f"{self.tables[self.table_of(i)]} row {self.number(i)}"

    def number(self, i: int) -> int:
        """The row's number in its table, from 1."""
        return int(i - self.starts[self.table_of(i)]) + 1


def read_rows(config: DataConfig, sources: Mapping[str, str], parts: Sequence[Part]) -> tuple[list[str], Rows]:
    """Collects from the parts what decides about each row.

    Args:
        config: conf/data.
        sources: split, ``all`` or the path of an added table -> table.
        parts: of all tables, in order.

    Returns:
        The labels in order, and the rows.

    Raises:
        DataError: cells that cannot be used, or fewer than two labels.
    """
    n_rows = sum(part.n_rows for part in parts)
    hash_hi, hash_lo, value = np.empty(n_rows, np.uint64), np.empty(n_rows, np.uint64), np.empty(n_rows, np.int32)
    id_of: dict[str, int] = {}  # cells of the label column
    faults: list[dict[str, Fault]] = [{} for _ in sources]
    start = 0
    for part in parts:
        rows, found = read_part(part, small=True)
        span = slice(start, start + part.n_rows)
        hash_hi[span], hash_lo[span] = rows["hash_hi"].to_numpy(), rows["hash_lo"].to_numpy()
        ids = [id_of.setdefault(cell, len(id_of)) for cell in rows["label"].dictionary.to_pylist()]
        if len(id_of) > MAX_VALUES:
            raise DataError(
                f"{part.table}: {config.label_column} has more than {MAX_VALUES:,} different values in its first "
                f"{part.first + part.n_rows - 1:,} rows; expected labels. Set data.label_column to the column that holds them."
            )
        value[span] = np.array(ids, np.int32)[rows["label"].indices.to_numpy()]
        of_table = faults[part.source]
        for name, fault in found.items():
            of_table[name] = of_table[name].and_later(fault) if name in of_table else fault
        start += part.n_rows
    labels = label_order(list(id_of), config.labels, config.label_map)
    if len(labels) < 2:
        raise DataError(
            f"{', '.join(sources.values())}: {config.label_column} has one label only ({labels[0] if labels else 'none'}); "
            "expected at least two."
        )
    sizes = np.bincount([part.source for part in parts], [part.n_rows for part in parts], len(sources))
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    label_id = np.array(label_ids(list(id_of), labels, config.label_map), np.int32)[value]
    for i, path in enumerate(sources.values()):
        span = slice(starts[i], starts[i + 1])
        _check_cells(path, faults[i], labels, list(id_of), value[span], label_id[span], config)
    given = [None if name == "all" else name if name in SPLITS else ADDED for name in sources]
    return labels, Rows(list(sources.values()), given, starts, hash_hi, hash_lo, label_id)


def _check_cells(
    path: str, faults: Mapping[str, Fault], labels: Sequence[str], cells: Sequence[str], value: np.ndarray,
    label_id: np.ndarray, config: DataConfig,
) -> None:  # fmt: skip
    if long := faults.get("long"):
        raise DataError(
            f"{path} row {long.rows[0]}: {config.text_column} has {long.value:,} characters; at most "
            f"{config.max_chars:,} are allowed ({long.n_rows} rows: {_some(long.rows, long.n_rows)}). "
            "A quote that is not closed is the usual cause; if the texts are that long, set data.max_chars."
        )
    bad = np.flatnonzero(label_id < 0)
    if len(bad):
        raise no_label(f"{path} {config.label_column}", cells[value[bad[0]]], (bad + 1).tolist(), labels, config.label_map)
    for label in labels if config.vote_columns else ():
        if votes := faults.get(f"vote_{label}"):
            raise DataError(
                f"{path} row {votes.rows[0]}: {config.vote_columns[label]}={votes.value!r}; expected a number of votes, 0 or "
                f"more ({votes.n_rows} bad rows: {_some(votes.rows, votes.n_rows)})."
            )


def choose(rows: Rows, labels: Sequence[str], config: DataConfig) -> tuple[np.ndarray, Dropped]:
    """Which rows are kept, and why the others are not.

    Args:
        rows: all of them.
        labels: in order.
        config: conf/data.

    Returns:
        bool [n_rows]: kept; and what was left out: empty texts, added ones that the first tables have already (theirs is
        the label, and the split), texts that came before, and those with two labels.

    Raises:
        DataError: all texts are empty; a text stands in two given splits, or has two labels, unless ``data.conflicts``
            drops those.
    """
    dropped: Dropped = {}
    kept = (rows.hash_hi != _EMPTY_HI) | (rows.hash_lo != _EMPTY_LO)
    if not kept.any():
        raise DataError(
            f"{rows.tables[0]}: all {len(kept)} texts are empty after cleaning; check data.text_column and data.cleaning."
        )
    _note(dropped, "empty_text", rows, ~kept)
    if ADDED in rows.given:
        known = _known(rows, kept)
        _note(dropped, "known_text", rows, known)
        kept &= ~known
    repeated, conflicting = _repeated(rows, kept, labels, config)
    _note(dropped, "repeated_text", rows, repeated)
    _note(dropped, "two_labels", rows, conflicting)
    return kept & ~repeated & ~conflicting, dropped


def split_of(rows: Rows, config: DataConfig) -> np.ndarray:
    """The split of each row, int8, as a place in SPLITS.

    Given ones stay as given. Added rows go to train, or to val by the hash where val is made so; the test split stays as it
    is, or two models could not be told apart by it. The rest is the same as :func:`sodaops.data.splits.assign_split`.
    """
    splits = np.empty(len(rows.label_id), np.int8)
    train, val = config.fractions[0], config.fractions[0] + config.fractions[1]
    for given, begin, end in zip(rows.given, rows.starts[:-1], rows.starts[1:], strict=True):
        for start in range(begin, end, _SORTED_ROWS):
            span = slice(start, min(start + _SORTED_ROWS, end))
            position = rows.hash_hi[span] / 2.0**64
            by_hash: Any = (position >= train).astype(np.int8) + (position >= val)
            if given == ADDED:
                by_hash = (by_hash == 1).astype(np.int8) if config.path is not None else 0
            splits[span] = SPLITS.index(given) if given in SPLITS else by_hash
    return splits


def _note(dropped: Dropped, reason: str, rows: Rows, gone: np.ndarray) -> None:
    if gone.any():
        first = np.flatnonzero(gone)[:SHOWN]
        dropped[reason] = {"n_rows": int(gone.sum()), "first": [rows.place(i) for i in first]}


def _groups(rows: Rows, among: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Rows that share their text with another.

    Args:
        rows: all of them.
        among: bool [n_rows]; the others do not count.

    Yields:
        rows, int64 [n], texts side by side and in order within a text; starts, int64 [n_texts]: where each text begins; and
        text, int64 [n]: the place in ``starts``. Each text comes once, in one of the batches.
    """
    n_slices = len(among) // _SORTED_ROWS + 1
    for k in range(n_slices):
        low, high = 2**64 * k // n_slices, 2**64 * (k + 1) // n_slices - 1
        found = np.flatnonzero(among & (rows.hash_hi >= np.uint64(low)) & (rows.hash_hi <= np.uint64(high)))
        found = found[np.lexsort((rows.hash_lo[found], rows.hash_hi[found]))]  # stable: in order within a text
        hi, lo = rows.hash_hi[found], rows.hash_lo[found]
        same = np.zeros(len(found) + 1, bool)  # as the one before
        same[1:-1] = (hi[1:] == hi[:-1]) & (lo[1:] == lo[:-1])
        several = same[:-1] | same[1:]
        if several.any():
            first = ~same[:-1][several]
            yield found[several], np.flatnonzero(first), np.cumsum(first) - 1


class _Pairs:
    """Pairs of rows with the same text: how many, and the first of them by the later row."""

    def __init__(self) -> None:
        self.n = 0
        self._first: list[tuple[int, int]] = []

    def add(self, earlier: np.ndarray, later: np.ndarray) -> None:
        """More pairs; int64 [n] each."""
        self.n += len(later)
        at = np.argsort(later)[:SHOWN]
        pairs = zip(later[at].tolist(), earlier[at].tolist(), strict=True)
        self._first = sorted([*self._first, *pairs])[:SHOWN]

    def told(self, say: Callable[[int, int], str]) -> str:
        """The first of them in words, and how many more there are."""
        return _some([say(earlier, later) for later, earlier in self._first], self.n)


def _some(first: Sequence[object], n: int) -> str:
    return some(first) + (f" and {n - len(first)} more" if n > len(first) else "")


def _known(rows: Rows, among: np.ndarray) -> np.ndarray:
    known = np.zeros(len(among), bool)
    is_added = np.array([given == ADDED for given in rows.given])
    for found, starts, text in _groups(rows, among):
        added = is_added[rows.table_of(found)]
        known[found] = added & np.logical_or.reduceat(~added, starts)[text]
    return known


def _repeated(rows: Rows, among: np.ndarray, labels: Sequence[str], config: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """Rows whose text came before and has one label, and rows whose text has two; each bool [n_rows]."""
    repeated, conflicting = np.zeros(len(among), bool), np.zeros(len(among), bool)
    kind_of = {kind: i for i, kind in enumerate(dict.fromkeys(rows.given))}
    kinds = np.array([kind_of[given] for given in rows.given])
    shared, conflicts = _Pairs(), _Pairs()
    for found, starts, text in _groups(rows, among):
        first, later = found[starts][text], np.ones(len(found), bool)
        later[starts] = False
        differs = later & (rows.label_id[found] != rows.label_id[first])
        two_labels = np.logical_or.reduceat(differs, starts)[text]
        repeated[found] = later & ~two_labels
        conflicting[found] = two_labels
        elsewhere = later & (kinds[rows.table_of(found)] != kinds[rows.table_of(first)])
        shared.add(first[elsewhere], found[elsewhere])
        at = np.flatnonzero(differs)
        once = at[np.unique(text[at], return_index=True)[1]]  # the first row of each text that has another label
        conflicts.add(first[once], found[once])
    if shared.n:
        where = shared.told(lambda j, i: f"{rows.place(j)} and {rows.place(i)}")
        raise DataError(
            f"{shared.n} texts stand in two of the given splits: {where}. What is tested must not be trained on: "
            "take them out of one, or put all rows into one table (data.path) and let the split be made from the texts."
        )
    if conflicts.n and config.conflicts == "error":
        where = conflicts.told(
            lambda j, i: f"{rows.place(j)} {labels[rows.label_id[j]]}, row {rows.number(i)} {labels[rows.label_id[i]]}"
        )
        raise DataError(f"{conflicts.n} texts have two labels: {where}. Fix them, or drop them all with data.conflicts=drop.")
    return repeated, conflicting
