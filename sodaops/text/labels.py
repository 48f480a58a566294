"""Labels, which are strings in a fixed order; a label_id is an index in it."""

import json
import re
import shlex
import unicodedata
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


def same_labels(values: Sequence[str], labels: Sequence[str]) -> dict[str, str]:
    """Value -> the first label from which it differs only by case, surrounding space or Unicode form.

    >>> same_labels(["good ", "bad"], ["good", "Good"])
    {'good ': 'good'}
    """
    first: dict[str, str] = {}
    for label in labels:
        first.setdefault(_normal(label), label)
    same = {value: first[_normal(value)] for value in values if _normal(value) in first}
    return {value: label for value, label in same.items() if value != label}


def _normal(label: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", label).casefold()).strip()


def label_map_override(same: Mapping[str, str], label_map: Mapping[Any, str] | None) -> str:
    """The override that adds a mapping of labels to ``data.label_map``, for a shell."""
    mapping = {str(value): same.get(label, label) for value, label in (label_map or {}).items()} | dict(same)
    is_clear = all(unicodedata.is_normalized("NFC", text) and text.isprintable() for text in [*mapping, *mapping.values()])
    return shlex.quote(f"data.label_map={json.dumps(mapping, ensure_ascii=not is_clear)}")


def visible(label: str) -> str:
    """A label in quotes, with escapes where it would look like another one."""
    return repr(label) if unicodedata.is_normalized("NFC", label) else ascii(label)


def unknown_label_error(
    place: str, values: Sequence[str], rows: Sequence[int], labels: Sequence[str], label_map: Mapping[Any, str] | None
) -> DataError:
    """The error for values that are not labels.

    Args:
        place: file and column.
        values: the distinct ones, in order of appearance.
        rows: the row numbers, from 1, of all of them.
        labels: the labels in order.
        label_map: as for :func:`label_ids`.
    """
    allowed = [*labels, *(str(value) for value in label_map or {} if str(value) not in labels)]
    same = same_labels(values, labels)
    fix = f"set {label_map_override(same, label_map)}" if same else "set data.labels or data.label_map"
    return DataError(
        f"{place}={values[0]!r} at row {rows[0]}; expected {some(allowed)}{nearest(values[0], allowed)} "
        f"({len(rows)} bad rows: {some(rows)}). Fix them, or {fix}."
    )
