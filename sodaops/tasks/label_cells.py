"""Cells with any number of labels: lists, delimited text, or a column with 0 or 1 for each label."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sodaops.config.schema import DataConfig
from sodaops.errors import DataError, some
from sodaops.tasks.base import Targets
from sodaops.text.labels import label_ids, label_order, unknown_label_error

if TYPE_CHECKING:
    import pyarrow as pa

BETWEEN = "\x1f"  # between the cells of several columns
_FLAGS = {"0": False, "false": False, "1": True, "true": True}


class Form(NamedTuple):
    """How a table has the labels."""

    separator: str | None  # of delimited text
    columns: Sequence[str] | None  # with 0 or 1, one for each label; with neither, cells are JSON lists
    allow_none: bool

    def names(self, cell: str) -> list[str] | None:
        """The names of labels in a cell, before ``data.label_map``; None if the cell is not one of this form."""
        if self.columns is not None:
            flags = [_FLAGS.get(flag.lower()) for flag in cell.split(BETWEEN)]
            is_known = None not in flags and len(flags) == len(self.columns)
            return [name for name, flag in zip(self.columns, flags, strict=True) if flag] if is_known else None
        if self.separator is not None:
            return [name for part in cell.split(self.separator) if (name := part.strip())]
        names = parsed(cell or "[]")
        return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None

    def place(self, place: str, config: DataConfig) -> str:
        """A table and its column, for messages, as the columns that have the labels."""
        return place if self.columns is None else f"{place.removesuffix(config.label_column)}{some(self.columns)}"

    def read(self, counts: Mapping[str, int], config: DataConfig) -> tuple[Targets, Counter[str]]:
        """The targets of distinct cells, cell -> number of rows; and label name -> number of rows.

        Equal sets of labels are one target. Of the columns ``label_set`` is bool [n_labels].
        """
        import pyarrow as pa

        found = [self.names(cell) for cell in counts]
        n_rows = Counter(dict.fromkeys(self.columns or (), 0))
        for names, n in zip(found, counts.values(), strict=True):
            n_rows.update(dict.fromkeys(names or (), n))
        labels = label_order(list(n_rows), config.labels, config.label_map)
        id_of = dict(zip(n_rows, label_ids(list(n_rows), labels, config.label_map), strict=True))
        target_of: dict[tuple[int, ...], int] = {}
        ids = []
        for names in found:
            chosen = tuple(sorted({id_of[name] for name in names or ()}))
            is_valid = names is not None and -1 not in chosen and bool(chosen or self.allow_none)
            ids.append(target_of.setdefault(chosen, len(target_of)) if is_valid else -1)
        matrix = np.array([[i in chosen for i in range(len(labels))] for chosen in target_of], bool)
        sets = pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel(), pa.bool_()), max(1, len(labels)))
        columns = {"label": pa.array(in_words(matrix, labels), pa.string()), "label_set": sets}
        return Targets(labels, np.array(ids, np.int32), columns), n_rows

    def error(
        self, place: str, cells: Sequence[str], rows: Sequence[int], labels: Sequence[str], config: DataConfig
    ) -> DataError:
        """The error for cells that are not valid."""
        names, place = self.names(cells[0]), self.place(place, config)
        where = f"at row {rows[0]} ({len(rows)} bad rows: {some(rows)})"
        if names is None:
            expected = "0 or 1" if self.columns else "a list of labels; for text such as a;b set 'task.separator=\";\"'"
            return DataError(f"{place}={repr(cells[0].replace(BETWEEN, ', '))[:80]} {where}; expected {expected}.")
        if not names:
            return DataError(f"{place}: no label {where}; remove these rows, or set task.allow_none=true.")
        unknown = [name for name in names if label_ids([name], labels, config.label_map) == [-1]]
        return unknown_label_error(place, unknown, rows, labels, config.label_map)


def parsed(cell: str) -> Any:
    """The value of a JSON cell, with numbers as they are written; None if it is not JSON."""
    try:
        return json.loads(cell, parse_int=str, parse_float=str)
    except (ValueError, RecursionError):
        return None


def matrix_of(column: "pa.FixedSizeListArray") -> np.ndarray:
    """bool [n_rows, n_labels]"""
    return column.flatten().to_numpy(zero_copy_only=False).astype(bool).reshape(-1, column.type.list_size)


def in_words(sets: np.ndarray, labels: Sequence[str]) -> list[str]:
    """The labels of each row of bool [n_rows, n_labels], as people read them."""
    return [", ".join(label for label, has in zip(labels, row, strict=True) if has) or "(none)" for row in sets.tolist()]
