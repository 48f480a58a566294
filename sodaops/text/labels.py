"""Labels, which are strings in a fixed order; a label_id is an index in it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sodaops.errors import DataError, nearest, some


def label_order(values: Sequence[str], labels: Sequence[object] | None, label_map: Mapping[Any, str] | None) -> list[str]:
    """The labels in order: as configured, or the table's values, mapped and sorted (numbers by value).

    >>> label_order(["10", "9", "9"], None, None)
    ['9', '10']
    """
    if labels is not None:
        return [str(label) for label in labels]
    mapping = {str(value): label for value, label in (label_map or {}).items()}
    present = {mapping.get(value, value) for value in values} - {""}
    numeric = all(re.fullmatch("-?[0-9]+", value) for value in present)
    return sorted(present, key=lambda label: (int(label), label)) if numeric else sorted(present)


def label_ids(values: Sequence[str], labels: Sequence[str], label_map: Mapping[Any, str] | None) -> list[int]:
    """The label_id of each value; -1 if it is not a label.

    Args:
        values: cells of a table.
        labels: the labels in order.
        label_map: cell -> label; other cells are their own labels.

    >>> label_ids(["0", "good", "god"], ["bad", "good"], {0: "bad"})
    [0, 1, -1]
    """
    mapping = {str(value): label for value, label in (label_map or {}).items()}
    ids = {label: i for i, label in enumerate(labels)}
    return [ids.get(mapping.get(value, value), -1) for value in values]


def unknown_label_error(
    place: str, value: str, rows: Sequence[int], labels: Sequence[str], label_map: Mapping[Any, str] | None
) -> DataError:
    """The error for values that are not labels.

    Args:
        place: file and column.
        value: the first of the values.
        rows: the row numbers, from 1, of all of them.
        labels: the labels in order.
        label_map: as for :func:`label_ids`.
    """
    allowed = [*labels, *(str(value) for value in label_map or {} if str(value) not in labels)]
    return DataError(
        f"{place}={value!r} at row {rows[0]}; expected {some(allowed)}{nearest(value, allowed)} "
        f"({len(rows)} bad rows: {some(rows)}). Fix them, or set data.labels or data.label_map."
    )
