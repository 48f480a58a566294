"""Warnings about a model's quality, in words: for the terminal, the reports and metrics.json."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sodaops.data.tokens import MANY_CUT
from sodaops.errors import some
from sodaops.tasks.base import Task

_FEW_ROWS, _FEW_ROWS_OF_LABEL = 100, 10  # below these, the metrics and intervals mean little


def quality_warnings(
    task: Task, metrics: Mapping[str, Any], baselines: Mapping[str, Mapping[str, float]], support: np.ndarray | None,
    labels: Sequence[str], split: str,
) -> list[str]:  # fmt: skip
    """What a reader of the metrics must know first; most important first.

    Args:
        task: of the model.
        metrics: as the task measures them, and ``cut_share``.
        baselines: baseline -> the first metric on the same rows.
        support: the task's :meth:`~sodaops.tasks.base.Task.support`.
        labels: in the order of ``support``.
        split: train, val or test; on train the baselines, which were fitted on it, are not compared.
    """
    rows, predicted = ([], []) if support is None else support
    return [
        *_no_better(task, metrics, {} if split == "train" else baselines),
        *_never_predicted(rows, predicted, labels, split),
        *_cut(metrics["cut_share"], split),
        *task.warnings(metrics, split),
        *_few_rows(metrics["n_rows"], rows, labels, split),
    ]


def _no_better(task: Task, metrics: Mapping[str, Any], baselines: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    metric = task.metrics[0]
    score, interval = metrics[metric.name], metrics["interval_95"][metric.name]
    for relation, limit in (("is not better", score), ("is not clearly better", interval["low"])):
        names = [name for name, values in baselines.items() if values[metric.name] >= limit]
        if names:
            against = " or ".join(f"{task.baselines[name]} ({baselines[name][metric.name]:.3f})" for name in names)
            yield (
                f"The model {relation} than {against}: its {metric.title} is {score:.3f} (95 % interval "
                f"{interval['low']:.3f} to {interval['high']:.3f}). Try more epochs (trainer.max_epochs), another learning "
                "rate (optim.lr), another pretrained model (model.name_or_path) or more labelled rows."
            )
            return


def _never_predicted(rows: Sequence[int], predicted: Sequence[int], labels: Sequence[str], split: str) -> Iterator[str]:
    missed = [f"{label} ({n})" for label, n, found in zip(labels, rows, predicted, strict=False) if n and not found]
    if missed:
        yield (
            f"Labels that are never predicted, with their rows in {split}: {some(missed)}. Try loss.class_weights=balanced, "
            "more epochs (trainer.max_epochs) or more rows of these labels."
        )


def _cut(share: float, split: str) -> Iterator[str]:
    if share > MANY_CUT:
        yield (
            f"{share:.1%} of the texts in {split} are longer than model.max_tokens, or than model.max_windows of that, and the "
            "model reads only their beginning. If the label may depend on the rest, set model.long_texts=windows, or raise the "
            "limit."
        )


def _few_rows(n_rows: int, rows: Sequence[int], labels: Sequence[str], split: str) -> Iterator[str]:
    if n_rows < _FEW_ROWS:
        yield (
            f"Only {n_rows} rows in {split}: the metrics are rough, as the intervals show. Add rows, or give {split} a larger "
            "share (data.fractions)."
        )
    few = [f"{labels[i]} ({rows[i]})" for i in np.argsort(rows, kind="stable") if rows[i] < _FEW_ROWS_OF_LABEL]
    if few:
        yield f"Labels with fewer than {_FEW_ROWS_OF_LABEL} rows in {split}: {some(few)}. Their metrics mean little."
