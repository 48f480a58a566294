"""The rows of raw tables on their way to the splits: read, cleaned, and without those that cannot be used."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
from tqdm import tqdm

from sodaops.config import DataConfig
from sodaops.data.sources import read_table
from sodaops.data.splits import SPLITS
from sodaops.errors import DataError, some
from sodaops.labels import label_ids, label_order
from sodaops.text import clean

ADDED = "added"  # in place of a split: of a table that was added, and not assigned as yet


@dataclass
class Rows:
    """Rows on their way to the splits; lists of equal length."""

    source: list[str] = field(default_factory=list)
    row: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    label_id: list[int] = field(default_factory=list)
    split: list[str | None] = field(default_factory=list)
    votes: list[list[int] | None] = field(default_factory=list)
    slices: list[tuple[str, ...]] = field(default_factory=list)

    def take(self, keep: Iterable[int]) -> "Rows":
        """The rows at these places, in this order."""
        keep = list(keep)
        return Rows(**{name: [column[i] for i in keep] for name, column in vars(self).items()})

    def place(self, i: int) -> str:
        """Where row ``i`` came from, for messages."""
        return f"{self.source[i]} row {self.row[i]}"


def read_rows(config: DataConfig, sources: dict[str, str]) -> tuple[list[str], Rows]:
    """Reads tables whole.

    Args:
        config: conf/data.
        sources: split, ``all`` or the path of an added table -> table.

    Returns:
        The labels in order, and the rows: cleaned, with the split that was given, :data:`ADDED`, or None.

    Raises:
        DataError: a table that cannot be read, or cells that cannot be used.
    """
    votes = list((config.vote_columns or {}).values())
    columns = list(dict.fromkeys([config.text_column, config.label_column, *votes, *config.slice_columns]))
    tables = {split: read_table(path, columns, config.max_rows) for split, path in sources.items()}
    cells = [value for table in tables.values() for value in table[config.label_column].to_pylist()]
    labels = label_order(cells, config.labels, config.label_map)
    if len(labels) < 2:
        raise DataError(
            f"{', '.join(sources.values())}: {config.label_column} has one label only ({labels[0] if labels else 'none'}); "
            "expected at least two."
        )
    rows = Rows()
    for split, table in tables.items():
        path = sources[split]
        raw = table[config.text_column].to_pylist()
        _check_lengths(path, raw, config)
        rows.source += [path] * len(raw)
        rows.row += range(1, len(raw) + 1)
        bar = tqdm(raw, desc=f"cleaning {path}", unit="row", delay=2, leave=False, disable=None)
        rows.text += [clean(text, config.cleaning) for text in bar]
        values = table[config.label_column].to_pylist()
        rows.label_id += label_ids(f"{path} {config.label_column}", values, labels, config.label_map)
        rows.split += [None if split == "all" else split if split in SPLITS else ADDED] * len(raw)
        rows.votes += _votes(path, table, config.vote_columns, labels)
        rows.slices += list(zip(*(table[name].to_pylist() for name in config.slice_columns), strict=True)) or [()] * len(raw)
    return labels, rows


def _check_lengths(path: str, texts: Sequence[str], config: DataConfig) -> None:
    long = [row for row, text in enumerate(texts, start=1) if len(text) > config.max_chars]
    if long:
        raise DataError(
            f"{path} row {long[0]}: {config.text_column} has {len(texts[long[0] - 1]):,} characters; at most "
            f"{config.max_chars:,} are allowed ({len(long)} rows: {some(long)}). A quote that is not closed is the usual "
            "cause; if the texts are that long, set data.max_chars."
        )


def _votes(path: str, table: pa.Table, columns: dict[str, str] | None, labels: Sequence[str]) -> list[list[int] | None]:
    if columns is None:
        return [None] * table.num_rows
    counts = []
    for label in labels:
        cells = table[columns[label]].to_pylist()
        bad = [row for row, cell in enumerate(cells, start=1) if cell and not re.fullmatch("[0-9]{1,18}", cell)]
        if bad:
            raise DataError(
                f"{path} row {bad[0]}: {columns[label]}={cells[bad[0] - 1]!r}; expected a number of votes, 0 or more "
                f"({len(bad)} bad rows: {some(bad)})."
            )
        counts.append([int(cell or 0) for cell in cells])
    return [list(votes) if sum(votes) else None for votes in zip(*counts, strict=True)]


def drop_empty(rows: Rows, dropped: dict[str, list[str]]) -> Rows:
    """Leaves out rows whose text is empty after cleaning, and notes their places.

    Raises:
        DataError: all of them are.
    """
    empty = [i for i, text in enumerate(rows.text) if not text]
    if len(empty) == len(rows.text):
        raise DataError(
            f"{rows.source[0]}: all {len(empty)} texts are empty after cleaning; check data.text_column and data.cleaning."
        )
    if empty:
        dropped["empty_text"] = [rows.place(i) for i in empty]
    gone = set(empty)
    return rows.take(i for i in range(len(rows.text)) if i not in gone)


def drop_known(rows: Rows, dropped: dict[str, list[str]]) -> Rows:
    """Leaves out added rows whose text the first tables have already: theirs is the label, and the split."""
    first = {text for text, split in zip(rows.text, rows.split, strict=True) if split != ADDED}
    known = [i for i, text in enumerate(rows.text) if rows.split[i] == ADDED and text in first]
    if known:
        dropped["known_text"] = [rows.place(i) for i in known]
    gone = set(known)
    return rows.take(i for i in range(len(rows.text)) if i not in gone)


def drop_repeated(rows: Rows, labels: Sequence[str], config: DataConfig, dropped: dict[str, list[str]]) -> Rows:
    """Leaves out rows whose text came before, and notes their places.

    Raises:
        DataError: a text in two given splits, or with two labels unless ``data.conflicts`` drops those.
    """
    first: dict[str, int] = {}
    conflicts: dict[str, tuple[int, int]] = {}
    repeated, shared = [], []
    for i, text in enumerate(rows.text):
        j = first.setdefault(text, i)
        if i == j:
            continue
        repeated.append(i)
        if rows.split[i] != rows.split[j]:
            shared.append(f"{rows.place(j)} and {rows.place(i)}")
        if rows.label_id[i] != rows.label_id[j]:
            conflicts.setdefault(text, (j, i))
    if shared:
        raise DataError(
            f"{len(shared)} texts stand in two of the given splits: {some(shared)}. What is tested must not be trained on: "
            "take them out of one, or put all rows into one table (data.path) and let the split be made from the texts."
        )
    if conflicts and config.conflicts == "error":
        pairs = [f"{rows.place(j)} {labels[rows.label_id[j]]}, row {rows.row[i]} {labels[rows.label_id[i]]}"
                 for j, i in conflicts.values()]  # fmt: skip
        raise DataError(
            f"{len(conflicts)} texts have two labels: {some(pairs)}. Fix them, or drop them all with data.conflicts=drop."
        )
    same = [i for i in repeated if rows.text[i] not in conflicts]
    both = [i for i, text in enumerate(rows.text) if text in conflicts]
    for reason, gone in (("repeated_text", same), ("two_labels", both)):
        if gone:
            dropped[reason] = [rows.place(i) for i in gone]
    out = {*same, *both}
    return rows.take(i for i in range(len(rows.text)) if i not in out)
