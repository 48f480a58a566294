"""Training curves from a run's metrics.csv, as points of small SVG charts."""

import csv
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sodaops.errors import DataError
from sodaops.tasks.base import Task

Points = list[tuple[float, float]]
_MAX_POINTS = 300  # of a curve


def training_charts(path: Path, task: Task, metrics: Iterable[str] = ()) -> list[dict[str, Any]]:
    """The charts of loss, scores and further metrics by step; none if the run wrote no CSV.

    Args:
        path: of metrics.csv.
        task: names the scores.
        metrics: names of the user's own metrics, which have a chart each.

    Raises:
        DataError: not such a file.
    """
    if not path.is_file():
        return []
    shown = {
        "Loss": ["train/loss_step", "val/loss"],
        "Scores on val": [f"val/{name}" for name in reversed(task.val_metrics(2))],  # the last curve is the main one
        **{f"{name} on val": [f"val/{name}"] for name in metrics},
    }
    series: dict[str, Points] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                for name in (name for names in shown.values() for name in names):
                    if row.get(name) and math.isfinite(value := float(row[name])):
                        series.setdefault(name, []).append((float(row["step"]), value))
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise DataError(
            f"{path}: damaged ({type(error).__name__}: {error}); delete it, and the page goes without curves."
        ) from None
    charts = {title: {name: series[name] for name in names if name in series} for title, names in shown.items()}
    return [_chart(title, curves) for title, curves in charts.items() if curves]


def _chart(title: str, curves: Mapping[str, Points]) -> dict[str, Any]:
    """Scales curves to a box of 420 by 210 pixels, whose plot area is x 46 to 410 and y 12 to 180."""
    steps, values = zip(*(point for points in curves.values() for point in points), strict=True)
    low, high, last = min(values), max(values), max(*steps, 1)
    span = high - low or 1.0
    scaled = {
        name: [(round(46 + 364 * step / last, 1), round(180 - 168 * (value - low) / span, 1)) for step, value in _thin(points)]
        for name, points in curves.items()
    }
    return {"title": title, "curves": scaled, "low": low, "high": low + span, "last": int(last)}


def _thin(points: Points) -> Points:
    return points[:: math.ceil(len(points) / _MAX_POINTS)]
