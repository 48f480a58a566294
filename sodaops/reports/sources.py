"""The files that a project report reads beside the bundle: the evaluation, the gate's report and the drift check."""

import json
from collections import Counter
from dataclasses import dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

from sodaops.bundle.layout import BundleInfo
from sodaops.config.schema import Config
from sodaops.drift.result import DriftResult
from sodaops.errors import ConfigError, DataError
from sodaops.evaluation.result import FOLDERS, METRICS, REPORT, describe_rows
from sodaops.io import remote
from sodaops.registry.gate import GateResult
from sodaops.tasks.base import Task


def _fields(*optional: Any, **types: Any) -> type:
    """A class with which pydantic checks a JSON object; optional fields are (name, type, default)."""
    return make_dataclass("Fields", [*types.items(), *optional], frozen=True)


# The parts of metrics.json that the page reads: what it is about, and in `_measured` the metrics.
_ABOUT = _fields(
    ("warnings", list[str], field(default_factory=list)),  # metrics.json of earlier versions has none
    bundle_id=str, split=str, same_data=bool, plots=list[_fields(file=str, title=str, caption=str)]  # type: ignore[misc]
)  # fmt: skip


def _measured(task: Task) -> type:
    """The metrics under the split's name."""
    names = [metric.name for metric in task.metrics]
    shown = dict.fromkeys(names[:2], float)  # of slices and baselines
    label = _fields(precision=float, recall=float, f1=float, n_rows=int)
    return _fields(
        ("labels", dict[str, label], field(default_factory=dict)),  # type: ignore[valid-type]
        n_rows=int, **dict.fromkeys(names, float), interval_95=_fields(**{names[0]: _fields(low=float, high=float)}),
        slices=dict[str, dict[str, _fields(n_rows=int, **shown)]],  # type: ignore[misc]
        baselines=dict[str, _fields(**shown)],  # type: ignore[misc]
    )  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of a bundle."""

    split: str
    which: str  # rows: "that were not used in training"
    metrics: dict[str, Any]
    rows: list[tuple[str, Any, bool]]  # baselines and the model: name, metrics, whether it is the model
    warnings: list[str]  # sentences about the quality
    plots: list[tuple[str, Path, str]]  # title, file, caption
    missed: list[tuple[str, str, int]]  # label, prediction, number of rows; most frequent first


def read_evaluation(config: Config, run_dir: Path, info: BundleInfo, task: Task) -> Evaluation | str:
    """The evaluation of a bundle, from the configured folder, the run's folder, or the one beside it (as DVC places it).

    Returns:
        The evaluation, or a sentence that says why there is none.

    Raises:
        ConfigError: a remote ``evaluate.output_dir``.
        DataError: a damaged file.
    """
    fix = f"`sodaops evaluate {run_dir / 'bundle'}` writes one"
    if remote.is_address(config.evaluate.output_dir):
        raise ConfigError(f"evaluate.output_dir={config.evaluate.output_dir}: expected a local folder; download it first.")
    configured = [Path(config.evaluate.output_dir)] if config.evaluate.output_dir else []
    others = []
    for folder in [*configured, run_dir / FOLDERS["test"], run_dir.parent / FOLDERS["test"]]:
        content = read_json(folder / METRICS, dict[str, Any], fix)
        if content is None:
            if (folder / REPORT).is_file():
                raise DataError(f"{folder / METRICS}: missing, although {REPORT} exists; {fix}.")
        elif "bundle_id" not in content and FOLDERS.keys() & content.keys():
            others.append(f"the one in {folder} was written by an earlier version, which did not record the bundle")
        else:
            about = read_json(folder / METRICS, _ABOUT, fix)
            if about.bundle_id == info.bundle_id:
                return _evaluation(folder, about, info, task, fix)
            others.append(f"the one in {folder} is of bundle {about.bundle_id}")
    return f"No evaluation of this bundle was found{': ' + '; '.join(others) if others else ''}; {fix}."


def _evaluation(folder: Path, about: Any, info: BundleInfo, task: Task, fix: str) -> Evaluation:
    read_json(folder / METRICS, _fields(**{about.split: _measured(task)}), fix)  # checks it; the page needs the plain content
    metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))[about.split]
    rows = [(task.baselines.get(name, name), values, False) for name, values in metrics["baselines"].items()]
    plots = [(plot.title, folder / "plots" / Path(plot.file).name, plot.caption) for plot in about.plots]
    for _, path, _ in plots:
        if not path.is_file():
            raise DataError(f"{path}: missing; {fix}.")
    try:
        answers = pq.read_table(folder / "predictions.parquet", columns=["label", "predicted"]).to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{folder / 'predictions.parquet'}: damaged or missing ({error}); {fix}.") from None
    errors = Counter(
        (row["label"], row["predicted"])
        for row in answers
        if row["label"] != row["predicted"] and row["label"] in info.labels and row["predicted"] in info.labels
    )
    return Evaluation(
        split=about.split,
        which=describe_rows(about.split, about.same_data),
        metrics=metrics,
        rows=[*rows, ("this model", metrics, True)] if rows else [],
        warnings=about.warnings,
        plots=plots,
        missed=[(label, predicted, n_rows) for (label, predicted), n_rows in errors.most_common()],
    )


def read_gate_report(path: str, version: str) -> GateResult | None:
    """The gate's report on a version; None if there is none.

    Raises:
        DataError: damaged, or about another version.
    """
    result = read_json(path, GateResult, f"`sodaops promote {version}` writes it again")
    if result is not None and result.version != version:
        raise DataError(f"{path}: about version {result.version}; delete it, `sodaops promote {version}` writes it again.")
    return result


def read_drift(path: str) -> DriftResult | None:
    """The last drift check, without the texts of users in it; None if there is none.

    Raises:
        DataError: damaged.
    """
    drift = read_json(path, DriftResult, "`sodaops drift` writes it again")
    if drift is None:
        return None
    repeated = f"one text makes up {drift.repeated:.0%} of the requests"  # the original sentence quotes the text
    causes = [replace(cause, message=repeated) if cause.name == "repeated" else cause for cause in drift.causes]
    return replace(drift, causes=causes, message="", repeated_text=None, examples=[])


def read_json(path: str | Path, kind: Any, fix: str) -> Any:
    """A local or remote JSON file as an object of a type that pydantic knows; None if the file does not exist.

    Raises:
        DataError: other content.
        StorageError: an address that cannot be read.
    """
    try:
        content = remote.read_if_exists(str(path))
        return None if content is None else TypeAdapter(kind).validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(f"{path}: damaged ({place + ': ' if place else ''}{first['msg']}); {fix}.") from None
    except OSError as error:
        raise DataError(f"{path}: could not be read ({error.strerror}); check the access, or {fix}.") from None
