"""evidently's side: the tests of single columns, and its own page about them."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sodaops.drift.statistics import chi_square_p

if TYPE_CHECKING:
    import pandas as pd

_LABELS = "chi_square_two_samples"


def column_tests(before: "pd.DataFrame", now: "pd.DataFrame", categorical: list[str], level: float) -> tuple[dict, Any]:
    """Tests every column of a window against the reference's.

    Args:
        before: the reference, empty cells where a row says nothing of a column.
        now: the window, with the same columns.
        categorical: those that are no numbers; chi-square for these, Kolmogorov-Smirnov for the others.
        level: below which evidently's page calls a column drifted.

    Returns:
        column -> p-value, and evidently's snapshot for :func:`save_page`.
    """
    from evidently import DataDefinition, Dataset, Report
    from evidently.metrics import ValueDrift

    _register()
    numerical = [column for column in now.columns if column not in categorical]
    definition = DataDefinition(numerical_columns=numerical, categorical_columns=categorical)
    metrics = [
        ValueDrift(column=column, method=_LABELS if column in categorical else "ks", threshold=level) for column in now.columns
    ]
    snapshot = Report(metrics).run(Dataset.from_pandas(now, definition), Dataset.from_pandas(before, definition))
    found = {entry["config"]["column"]: float(entry["value"]) for entry in snapshot.dict()["metrics"]}
    return found, snapshot


def save_page(snapshot: Any, path: Path) -> None:
    """evidently's own HTML, which loads nothing from outside."""
    snapshot.save_html(str(path))


def _register() -> None:
    """Adds a chi-square test of two samples: evidently's own takes the reference's shares for exact."""
    from evidently.legacy.calculations.stattests import registry
    from evidently.legacy.core import ColumnType

    if _LABELS in registry._registered_stat_tests:
        return

    def test(reference: Any, current: Any, feature_type: Any, threshold: float) -> tuple[float, bool]:
        values = sorted({*reference.unique(), *current.unique()})
        counts = [np.array([(side == value).sum() for value in values]) for side in (reference, current)]
        p = chi_square_p(*counts)
        return p, p < threshold

    made = registry.StatTest(_LABELS, "chi-square p-value, two samples", [ColumnType.Categorical])
    registry.register_stattest(made, default_impl=test)
