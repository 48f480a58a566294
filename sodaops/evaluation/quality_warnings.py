"""Warnings about a model's quality, in words: for the terminal, the reports and metrics.json."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sodaops.data.tokens import MANY_CUT
from sodaops.errors import some
from sodaops.evaluation.result import BASELINES

_FEW_ROWS, _FEW_ROWS_OF_LABEL = 100, 10  # below these, the metrics and intervals mean little


def quality_warnings(
    metrics: Mapping[str, Any],
    baselines: Mapping[str, Mapping[str, float]],
    matrix: np.ndarray,
    labels: Sequence[str],
    split: str,
) -> list[str]:
    """What a reader of the metrics must know first; most important first.

    Args:
        metrics: as :func:`sodaops.evaluation.metrics.measure` returns them, and ``cut_share``.
        baselines: baseline -> its macro-F1 on the same rows.
        matrix: confusion matrix, int [n_labels, n_labels].
        labels: in the order of the matrix.
        split: train, val or test; on train the baselines, which were fitted on it, are not compared.
    """
    compared = {} if split == "train" else baselines
    return [
        *_no_better(metrics, compared),
        *_never_predicted(matrix, labels, split),
        *_cut(metrics["cut_share"], split),
        *_few_rows(matrix, labels, split),
    ]


def _no_better(metrics: Mapping[str, Any], baselines: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    score, interval = metrics["macro_f1"], metrics["interval_95"]["macro_f1"]
    for relation, limit in (("is not better", score), ("is not clearly better", interval["low"])):
        names = [name for name, values in baselines.items() if values["macro_f1"] >= limit]
        if names:
            against = " or ".join(f"{BASELINES[name]} ({baselines[name]['macro_f1']:.3f})" for name in names)
            yield (
                f"The model {relation} than {against}: its macro-F1 is {score:.3f} (95 % interval {interval['low']:.3f} to "
                f"{interval['high']:.3f}). Try more epochs (trainer.max_epochs), another learning rate (optim.lr), another "
                "pretrained model (model.name_or_path) or more labelled rows."
            )
            return


def _never_predicted(matrix: np.ndarray, labels: Sequence[str], split: str) -> Iterator[str]:
    support, predicted = matrix.sum(1), matrix.sum(0)
    missed = [f"{label} ({support[i]})" for i, label in enumerate(labels) if support[i] and not predicted[i]]
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


def _few_rows(matrix: np.ndarray, labels: Sequence[str], split: str) -> Iterator[str]:
    support = matrix.sum(1)
    n_rows = int(support.sum())
    if n_rows < _FEW_ROWS:
        yield (
            f"Only {n_rows} rows in {split}: the metrics are rough, as the intervals show. Add rows, or give {split} a larger "
            "share (data.fractions)."
        )
    few = [f"{labels[i]} ({support[i]})" for i in np.argsort(support, kind="stable") if support[i] < _FEW_ROWS_OF_LABEL]
    if few:
        yield f"Labels with fewer than {_FEW_ROWS_OF_LABEL} rows in {split}: {some(few)}. Their metrics mean little."
