"""Checks of a label column as a whole: labels that look the same, and numbers that are no labels."""

import logging
import re
import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np

from sodaops.config.schema import DataConfig
from sodaops.errors import DataError, some
from sodaops.text.labels import label_map_override, same_labels, visible

log = logging.getLogger(__name__)

_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?", re.IGNORECASE)
_MANY_NUMBERS = 21  # fewer different numbers may be labels
_ROWS_PER_NUMBER = 5  # whole numbers with at least as many rows on average may be labels


def check_labels(place: str, counts: Mapping[str, int], labels: Sequence[str], config: DataConfig) -> None:
    """Warns of labels that look the same, and refuses numbers that look like a measurement.

    Args:
        place: the tables.
        counts: cell of the label column -> number of rows.
        labels: the labels in order.
        config: conf/data.

    Raises:
        DataError: the labels are the values of a continuous quantity.
    """
    if config.label_map is None and (edges := _thirds(counts)) is not None:
        low, high = edges
        raise DataError(
            f"{place}: {config.label_column} has {len(counts):,} different numbers, so it is continuous; labels are a few "
            f"names. Make a column of labels from it, such as low to {low:g}, middle, high above {high:g} (in pandas: "
            f"table['label'] = pandas.cut(table['{config.label_column}'], [-math.inf, {low:g}, {high:g}, math.inf], "
            "labels=['low', 'middle', 'high'])). If they are labels, list them in data.labels."
        )
    order = sorted(labels, key=lambda label: (label != unicodedata.normalize("NFC", label.strip()), -counts.get(label, 0)))
    if same := same_labels(order, order):
        pairs = some([f"{visible(value)} and {visible(label)}" for value, label in same.items()])
        log.warning(
            "%s: labels of %s differ only by case, spaces or Unicode form: %s; to merge them, set %s",
            place, config.label_column, pairs, label_map_override(same, config.label_map),
        )  # fmt: skip


def check_each_label(place: str, counts: Mapping[str, int], config: DataConfig) -> None:
    """Refuses labels, label -> number of rows in train, that cannot be learnt.

    Raises:
        DataError: a label without rows, or one label only.
    """
    absent = [label for label, count in counts.items() if not count]
    if len(counts) - len(absent) < 2:
        raise DataError(f"{place}: train has one label only; expected at least two of {', '.join(counts)}.")
    if absent:
        more = f", or raise data.max_rows={config.max_rows}" if config.max_rows is not None else ""
        raise DataError(
            f"{place}: train has no row with label {', '.join(absent)}, so it cannot be learnt. Add rows with it{more}; "
            "if it is a typing error, correct it, or list the labels in data.labels."
        )


def _thirds(counts: Mapping[str, int]) -> tuple[float, float] | None:
    """The values that divide the rows into thirds, if the cells are the values of a continuous quantity."""
    cells = [cell for cell in counts if cell]
    if len(cells) < _MANY_NUMBERS or not all(_NUMBER.fullmatch(cell) for cell in cells):
        return None
    values, n_rows = np.array(cells, float), np.array([counts[cell] for cell in cells])
    if (values == np.floor(values)).all() and n_rows.mean() >= _ROWS_PER_NUMBER:
        return None
    order = np.argsort(values)
    cumulated = np.cumsum(n_rows[order]) / n_rows.sum()
    low, high = values[order][np.searchsorted(cumulated, [1 / 3, 2 / 3])]
    return float(low), float(high)
