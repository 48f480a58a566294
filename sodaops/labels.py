"""Labels: strings in a fixed order; a label_id is a place in it."""

import re
from collections.abc import Mapping, Sequence

from sodaops.errors import DataError, nearest, some


def label_order(values: Sequence[str], labels: Sequence[object] | None, label_map: Mapping[object, str] | None) -> list[str]:
    """The labels in order: as configured, else the table's values, mapped and sorted (numbers as numbers).

    >>> label_order(["10", "9", "9"], None, None)
    ['9', '10']
    """
    if labels is not None:
        return [str(label) for label in labels]
    mapping = {str(value): label for value, label in (label_map or {}).items()}
    present = {mapping.get(value, value) for value in values} - {""}
    numeric = all(re.fullmatch("-?[0-9]+", value) for value in present)
    return sorted(present, key=lambda label: (int(label), label)) if numeric else sorted(present)


def label_ids(place: str, values: Sequence[str], labels: Sequence[str], label_map: Mapping[object, str] | None) -> list[int]:
    """The label_id of each value.

    Args:
        place: file and column, for the message.
        values: the table's cells, row 1 first.
        labels: the labels in order.
        label_map: cell -> label; cells without an entry stand for themselves.

    Raises:
        DataError: values that are no label: how many, which, and their first rows.
    """
    mapping = {str(value): label for value, label in (label_map or {}).items()}
    ids = {label: i for i, label in enumerate(labels)}
    found = [ids.get(mapping.get(value, value), -1) for value in values]
    bad = [row for row, label_id in enumerate(found) if label_id < 0]
    if bad:
        first = values[bad[0]]
        allowed = list(labels) + [value for value in mapping if value not in labels]
        raise DataError(
            f"{place}={first!r} at row {bad[0] + 1}; expected {some(allowed)}{nearest(first, allowed)} "
            f"({len(bad)} bad rows: {some([row + 1 for row in bad])}). "
            "Fix them, or set data.labels or data.label_map."
        )
    return found
