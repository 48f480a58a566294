"""Tests of single columns with evidently, and evidently's own report."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sodaops.drift.statistics import chi_square_p

if TYPE_CHECKING:
    import pandas as pd

_CHI_SQUARE = "chi_square_two_samples"


def column_tests(
    reference: "pd.DataFrame", current: "pd.DataFrame", categorical: list[str], level: float
) -> tuple[dict[str, float], Any]:
    """Tests every column of the current rows against the reference.

    Args:
        reference: NaN where a row has no value.
        current: with the same columns.
        categorical: columns tested with chi-square; the others with Kolmogorov-Smirnov.
        level: a p-value below it counts as drift in evidently's report.

    Returns:
        column -> p-value, and evidently's snapshot for :func:`save_page`.
    """
    from evidently import DataDefinition, Dataset, Report
    from evidently.metrics import ValueDrift

    _register_chi_square()
    numerical = [column for column in current.columns if column not in categorical]
    definition = DataDefinition(numerical_columns=numerical, categorical_columns=categorical)
    metrics = [
        ValueDrift(column=column, method=_CHI_SQUARE if column in categorical else "ks", threshold=level)
        for column in current.columns
    ]
    snapshot = Report(metrics).run(Dataset.from_pandas(current, definition), Dataset.from_pandas(reference, definition))
    p_values = {entry["config"]["column"]: float(entry["value"]) for entry in snapshot.dict()["metrics"]}
    return p_values, snapshot


def save_page(snapshot: Any, path: Path) -> None:
    """Writes evidently's HTML report, which loads nothing from the network."""
    snapshot.save_html(str(path))


def _register_chi_square() -> None:
    """Adds a chi-square test of two samples to evidently, whose own test takes the reference's shares as exact."""
    from evidently.legacy.calculations.stattests import registry
    from evidently.legacy.core import ColumnType

    if _CHI_SQUARE in registry._registered_stat_tests:
        return

    def test(reference: Any, current: Any, feature_type: Any, threshold: float) -> tuple[float, bool]:
        values = sorted({*reference.unique(), *current.unique()})
        counts = [np.array([(side == value).sum() for value in values]) for side in (reference, current)]
        p = chi_square_p(*counts)
        return p, p < threshold

    stat_test = registry.StatTest(_CHI_SQUARE, "chi-square p-value, two samples", [ColumnType.Categorical])
    registry.register_stattest(stat_test, default_impl=test)
