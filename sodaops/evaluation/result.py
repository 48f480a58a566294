"""The result of an evaluation, and the names of the files that hold it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sodaops.config.schema import BUILT_IN_METRICS
from sodaops.io import remote
from sodaops.tasks.base import Task

METRICS = "metrics.json"
REPORT = "report.html"
WRITTEN = (".gitignore", METRICS, "predictions.parquet", "plots", REPORT)  # all that an evaluation's folder may hold
FOLDERS = {"test": "evaluation", "val": "evaluation-val", "train": "evaluation-train"}  # split -> folder beside the bundle
_ROWS = {
    "train": "that the model was trained on",
    "val": "that the epoch was chosen on",
    "test": "that were not used in training",
}


def describe_rows(split: str, same_data: bool) -> str:
    """The part of a sentence that follows "rows" in reports.

    >>> describe_rows("test", same_data=True)
    'that were not used in training'
    """
    return _ROWS.get(split, f"of {split}") if same_data else "of other data than the model was trained on"


def own_metrics(task: Task, metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """The metrics of the section ``metrics`` among those of a split; None: the value is not finite."""
    built_in = {*BUILT_IN_METRICS, *(metric.name for metric in task.metrics)}
    own = {name: metrics[name] for name in metrics if name not in built_in}
    return {name: value for name, value in own.items() if value is None or isinstance(value, int | float)}


def describe_abstention(measured: Mapping[str, Any]) -> Iterator[str]:
    """The field ``abstention`` of the metrics in lines."""
    for label, of in measured.get("answered", {}).items():
        yield (
            f"answered{label and f' with {label}'}: {_shown(of['coverage'])} of {of['coverage']['n']:,} texts, accuracy "
            f"{_shown(of['accuracy'])}; target {of['target']:g}"
        )
    if sets := measured.get("sets"):
        covered = ", ".join(f"{label} {_shown(of)}" for label, of in sets["labels"].items())
        yield f"label sets, of {sets['mean_size']:.2f} labels on average, cover {covered}; target {measured['set_coverage']:g}"


def _shown(of: Mapping[str, Any]) -> str:
    return "–" if of["share"] is None else f"{of['share']:.3f} ({of['low']:.3f} to {of['high']:.3f})"


@dataclass(frozen=True)
class Evaluated:
    """The metrics of a bundle on a split, and where the files are."""

    task: Task
    split: str
    metrics: dict[str, Any]  # as in metrics.json, under the split's name
    baselines: dict[str, dict[str, float]]
    warnings: list[str]  # sentences about the quality, most important first
    output_dir: str  # a local folder or a remote address
    same_data: bool  # whether the bundle was trained on the train split of the same data set
    labels: list[str]
    charts: dict[str, Any]  # as the task gives them
    errors: list[dict[str, Any]]  # the worst answers, as the task gives them

    @property
    def others(self) -> list[tuple[str, dict[str, float]]]:
        """What the model is compared with, as title and metrics: the baselines, and its teacher."""
        rows = [(self.task.baselines[name], values) for name, values in self.baselines.items()]
        if teacher := self.metrics.get("teacher"):
            rows.append(("its teacher" if len(teacher["bundle_ids"]) == 1 else "its teachers together", teacher["summary"]))
        return rows

    @property
    def report_path(self) -> str:
        """The HTML report."""
        return remote.join(self.output_dir, REPORT)
