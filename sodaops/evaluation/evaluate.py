"""Evaluates a bundle on a split: metrics.json, predictions.parquet, plots and a report."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from sodaops.bundle import layout
from sodaops.bundle.files import parsing
from sodaops.bundle.layout import CONFIG, BundleInfo, check_splits, read_config
from sodaops.config.extensions import Extension
from sodaops.config.schema import Config, EvaluateConfig
from sodaops.data.preprocess import read_manifest, read_split
from sodaops.errors import ConfigError, DataError
from sodaops.evaluation import abstention, report
from sodaops.evaluation.quality_warnings import quality_warnings
from sodaops.evaluation.result import FOLDERS, METRICS, REPORT, WRITTEN, Evaluated
from sodaops.evaluation.teacher import check_teachers, compare_with_teacher
from sodaops.inference.ensemble import Ensemble
from sodaops.inference.predictor import Predictor
from sodaops.io import remote, storage
from sodaops.tasks import plots
from sodaops.tasks.base import Task
from sodaops.text.columns import named


def evaluate_split(config: Config, bundle_dir: str | Path | None = None, teachers: Sequence[Path] = ()) -> Evaluated:
    """Measures a bundle on ``evaluate.split`` and writes metrics, predictions, plots and a report.

    Of the configuration only ``evaluate`` and ``metrics`` are read; the metrics that the bundle's configuration names are
    measured too. Labels, cleaning and token limit are the bundle's, and so is the data set unless ``evaluate.splits_dir``
    names another.

    Args:
        config: the whole configuration.
        bundle_dir: the bundle; ``evaluate.bundle`` takes precedence.
        teachers: local folders of the bundles of ``teacher``, with which it is compared.

    Raises:
        ConfigError: no bundle named, splits with other labels or another cleaning, or a metric that cannot be computed.
        BundleError, DataError, StorageError: the bundle or the splits cannot be read, or the output cannot be written.
    """
    settings = config.evaluate
    bundle_dir = settings.bundle or bundle_dir
    if bundle_dir is None:
        raise ConfigError("evaluate.bundle is missing; give it as evaluate.bundle=RUN/bundle.")
    if settings.split == "none":
        raise ConfigError("evaluate.split=none: nothing to evaluate; choose train, val or test.")
    predictor = Predictor(bundle_dir, settings.variant)
    splits_dir = Path(settings.splits_dir or Path("data/processed") / predictor.info.data["name"])
    manifest = read_manifest(splits_dir)
    check_splits(predictor.info, manifest, splits_dir)
    table, cut_share = _read_answered(predictor, splits_dir, settings.split)
    probs = predictor.probs_of_cleaned(table["text"].to_pylist())
    output_dir = settings.output_dir or str(Path(bundle_dir).parent / FOLDERS[settings.split])
    same_data = manifest["fingerprint"] == predictor.info.data["fingerprint"]
    sections = {**_metrics_of(bundle_dir, predictor.info), **config.metrics}
    own = _own_metrics(sections, predictor.task, predictor.task.truth(table), probs)
    result = _result(settings, predictor, table, probs, cut_share, splits_dir, output_dir, same_data, own)
    curves = abstention.measure_abstention(result, predictor, table, probs) if predictor.abstainer else []
    if settings.promises and not predictor.abstainer:
        result.warnings.append(abstention.MISSING.format(key=next(iter(settings.promises))))
    if teachers:
        ensemble = Ensemble(teachers, predictor.variant)
        check_teachers(layout.read_json(bundle_dir, predictor.info, layout.DATA), ensemble.ids)
        result.metrics["teacher"] = compare_with_teacher(predictor, ensemble, table, probs, settings.n_bootstrap)
    with remote.output_folder(output_dir, WRITTEN, METRICS) as folder:
        pq.write_table(_predictions(predictor, table, probs), folder / "predictions.parquet", compression="zstd")
        wanted = predictor.task.plots(probs, table, predictor.info.labels, settings.n_bins)
        pictures = plots.draw_plots(folder / "plots", [*wanted, *curves])
        (folder / REPORT).write_text(report.render_report(result, predictor.info, manifest, pictures), encoding="utf-8")
        storage.write_json(folder / METRICS, _metrics_file(result, predictor, manifest, pictures))
    return result


def _metrics_of(bundle_dir: str | Path, info: BundleInfo) -> dict[str, dict[str, Any]]:
    """The section ``metrics`` of the configuration that a bundle was trained with; older ones have none."""
    config = read_config(bundle_dir, info)
    with parsing(Path(bundle_dir) / CONFIG):
        return TypeAdapter(dict[str, Extension]).validate_python(config.get("metrics", {}))


def _own_metrics(
    sections: Mapping[str, dict[str, Any]], task: Task, truth: np.ndarray, probs: np.ndarray
) -> dict[str, float | None]:
    """Name -> value, None where it is not finite. Only where there are such metrics, torch is imported."""
    if not sections:
        return {}
    import torch

    from sodaops.modeling.metrics import OwnMetrics

    own = OwnMetrics(sections, probs.shape[1], task)
    own.update(torch.from_numpy(probs), torch.from_numpy(truth))
    values = {name: float(value) for name, value in own.compute().items()}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _read_answered(predictor: Predictor, splits_dir: Path, split: str) -> tuple[pa.Table, float]:
    """The rows of a split whose texts have tokens, as a service refuses the others; and the share of them that is cut."""
    table = read_split(splits_dir, split)
    tokens = predictor.tokenise(table["text"].to_pylist())
    if not len(tokens.kept):
        raise DataError(f"{splits_dir}: no text in {split} has tokens that the model knows; choose another model.")
    return table.take(tokens.kept), float(tokens.is_cut[tokens.kept].mean())


def _result(
    settings: EvaluateConfig, predictor: Predictor, table: pa.Table, probs: np.ndarray, cut_share: float, splits_dir: Path,
    output_dir: str, same_data: bool, own: Mapping[str, float | None],
) -> Evaluated:  # fmt: skip
    """The metrics of a split's answers, float [n_rows, n_labels]."""
    task, labels = predictor.task, predictor.info.labels
    truth = task.truth(table)
    measured = {**task.measure(probs, truth, labels, settings), "cut_share": cut_share}
    baselines = _baselines(task, splits_dir, table, labels) if settings.baselines else {}
    return Evaluated(
        task=task,
        split=settings.split,
        metrics={**measured, **own, "slices": _slices(task, table, probs, truth)},
        baselines=baselines,
        warnings=quality_warnings(task, measured, baselines, task.support(probs, truth), labels, settings.split),
        output_dir=output_dir,
        same_data=same_data,
        labels=labels,
        charts=task.charts(probs, truth, labels),
        errors=[
            {**error, "text": named(error["text"], predictor.info.text_columns)}
            for error in task.errors(table, probs, labels, settings.n_worst)
        ],
    )


def _metrics_file(
    result: Evaluated, predictor: Predictor, manifest: dict[str, Any], pictures: Sequence[plots.Picture]
) -> dict[str, Any]:
    """The content of metrics.json: the metrics under the split's name, and what they were measured on."""
    return {
        "bundle_id": predictor.info.bundle_id,
        "variant": predictor.variant,
        "data": {"name": manifest["name"], "fingerprint": manifest["fingerprint"]},
        "same_data": result.same_data,
        "split": result.split,
        "warnings": result.warnings,
        result.split: {**result.metrics, "baselines": result.baselines},
        "plots": [{"file": f"plots/{one.path.name}", "title": one.title, "caption": one.caption} for one in pictures],
    }


def _slices(task: Task, table: pa.Table, probs: np.ndarray, truth: np.ndarray) -> dict[str, dict[str, Any]]:
    """Slice column -> value -> the metrics of its rows."""
    slices: dict[str, dict[str, Any]] = {}
    for name in table.column_names:
        if not name.startswith("slice_"):
            continue
        values = np.array(table[name].to_pylist())
        for value in sorted(set(values)):
            rows = values == value
            measured = {"n_rows": int(rows.sum()), **task.slice_summary(probs[rows], truth[rows])}
            slices.setdefault(name.removeprefix("slice_"), {})[value or "(no value)"] = measured
    return slices


def _baselines(task: Task, splits_dir: Path, table: pa.Table, labels: list[str]) -> dict[str, dict[str, float]]:
    """Baseline -> its summary metrics on the evaluated split."""
    probs_of = task.baseline_probs(read_split(splits_dir, "train"), table["text"].to_pylist(), labels)
    return {name: task.summary(probs, task.truth(table)) for name, probs in probs_of.items()}


def _predictions(predictor: Predictor, table: pa.Table, probs: np.ndarray) -> pa.Table:
    """Target and answer of every row."""
    (_, answers), *others = predictor.task.columns(probs, predictor.info.labels).items()
    columns = {name: table[name] for name in ("source", "row", "label")}
    return pa.table({**columns, "predicted": answers, **{name: column for name, column in others if name != "score"}})
