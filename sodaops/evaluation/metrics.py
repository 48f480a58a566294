"""Metrics as pure functions of label ids and probabilities."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn import metrics as sk

from sodaops.errors import DataError


def check(probs: np.ndarray, label_ids: np.ndarray) -> None:
    """Refuses what no metric can be computed of.

    Args:
        probs: float [n_examples, n_labels].
        label_ids: int [n_examples].

    Raises:
        DataError: empty input, lengths that differ, ids out of range, or probabilities that are not finite.
    """
    if len(label_ids) == 0 or probs.ndim != 2 or len(probs) != len(label_ids):
        raise DataError(f"metrics of probabilities {probs.shape} and {len(label_ids)} labels; expected as many of each.")
    if not np.isfinite(probs).all():
        raise DataError("metrics of probabilities that are not finite; the model gives no usable answers.")
    if label_ids.min() < 0 or label_ids.max() >= probs.shape[1]:
        raise DataError(f"metrics of label ids {label_ids.min()} to {label_ids.max()}; expected 0 to {probs.shape[1] - 1}.")


def confusion(label_ids: np.ndarray, predicted: np.ndarray, n_labels: int) -> np.ndarray:
    """Counts, int64 [n_labels, n_labels]; rows are the true labels, columns the predicted.

    >>> confusion(np.array([0, 1, 1]), np.array([0, 0, 1]), 2).tolist()
    [[1, 0], [1, 1]]
    """
    return np.bincount(label_ids * n_labels + predicted, minlength=n_labels**2).reshape(n_labels, n_labels)


def per_label_f1(matrix: np.ndarray) -> np.ndarray:
    """F1 of each label from confusion counts [..., n_labels, n_labels]; 0 where a label neither is nor is predicted."""
    hits = np.diagonal(matrix, axis1=-2, axis2=-1)
    total = matrix.sum(-1) + matrix.sum(-2)
    return np.divide(2 * hits, total, out=np.zeros(hits.shape), where=total > 0)


def summary(matrix: np.ndarray) -> dict[str, np.ndarray]:
    """Macro F1, weighted F1 and accuracy from confusion counts [..., n_labels, n_labels].

    Macro F1 is the mean over the labels that have rows or predictions.
    """
    f1 = per_label_f1(matrix)
    support = matrix.sum(-1)
    present = (support + matrix.sum(-2)) > 0
    n_rows = support.sum(-1)
    return {
        "macro_f1": (f1 * present).sum(-1) / present.sum(-1),
        "weighted_f1": (f1 * support).sum(-1) / n_rows,
        "accuracy": np.diagonal(matrix, axis1=-2, axis2=-1).sum(-1) / n_rows,
    }


def bootstrap(matrix: np.ndarray, n_samples: int, seed: int = 0) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of the summary metrics (Efron 1979).

    Drawing rows with replacement draws the cells of the confusion matrix from a multinomial distribution, so the
    cells are drawn, at a cost that does not grow with the rows.

    Args:
        matrix: counts [n_labels, n_labels].
        n_samples: bootstrap samples.
        seed: of the draw.

    Returns:
        metric -> (low, high).
    """
    n_rows = int(matrix.sum())
    draws = np.random.default_rng(seed).multinomial(n_rows, matrix.ravel() / n_rows, size=n_samples)
    samples = summary(draws.reshape(n_samples, *matrix.shape))
    return {name: tuple(np.quantile(values, [0.025, 0.975]).tolist()) for name, values in samples.items()}


def per_label(matrix: np.ndarray, labels: Sequence[str]) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and number of rows of each label."""
    hits, support, predicted = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    f1 = per_label_f1(matrix)
    return {
        label: {
            "precision": float(hits[i] / predicted[i]) if predicted[i] else 0.0,
            "recall": float(hits[i] / support[i]) if support[i] else 0.0,
            "f1": float(f1[i]),
            "n_rows": int(support[i]),
        }
        for i, label in enumerate(labels)
    }


def reliability(probs: np.ndarray, label_ids: np.ndarray, n_bins: int = 15) -> dict[str, np.ndarray]:
    """Confidence and accuracy in equal-width bins of the top probability.

    Args:
        probs: float [n_examples, n_labels], rows sum to 1.
        label_ids: int [n_examples].
        n_bins: bins over (0, 1]; bin k holds confidences in (k / n_bins, (k + 1) / n_bins].

    Returns:
        n_rows int, confidence and accuracy float, each [n_bins]; NaN where a bin is empty.
    """
    check(probs, label_ids)
    confidence = probs.max(1).astype(np.float64)
    right = probs.argmax(1) == label_ids
    bins = np.clip(np.ceil(confidence * n_bins).astype(int) - 1, 0, n_bins - 1)
    n_rows = np.bincount(bins, minlength=n_bins)
    with np.errstate(invalid="ignore"):
        return {
            "n_rows": n_rows,
            "confidence": np.bincount(bins, confidence, n_bins) / n_rows,
            "accuracy": np.bincount(bins, right, n_bins) / n_rows,
        }


def expected_calibration_error(probs: np.ndarray, label_ids: np.ndarray, n_bins: int = 15) -> float:
    """Gap between confidence and accuracy, averaged over equal-width bins (Guo et al. 2017).

    Args:
        probs: float [n_examples, n_labels], rows sum to 1.
        label_ids: int [n_examples], in 0..n_labels-1.
        n_bins: bins over (0, 1].

    Returns:
        A fraction in [0, 1]; 0.03 is 3 percentage points.

    Raises:
        DataError: empty input, or lengths that differ.

    >>> expected_calibration_error(np.array([[0.75, 0.25], [0.75, 0.25]]), np.array([0, 1]))
    0.25
    """
    bins = reliability(probs, label_ids, n_bins)
    gaps = np.abs(np.nan_to_num(bins["confidence"]) - np.nan_to_num(bins["accuracy"]))
    return float((bins["n_rows"] / bins["n_rows"].sum() * gaps).sum())


def curves(probs: np.ndarray, label_ids: np.ndarray, labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """One-vs-rest ROC and precision-recall of each label that has both kinds of rows.

    Returns:
        label -> fpr, tpr, roc_auc, precision, recall, average_precision.
    """
    found = {}
    for i, label in enumerate(labels):
        positive = label_ids == i
        if positive.all() or not positive.any():
            continue
        fpr, tpr, _ = sk.roc_curve(positive, probs[:, i])
        precision, recall, _ = sk.precision_recall_curve(positive, probs[:, i])
        found[label] = {
            "fpr": fpr, "tpr": tpr, "roc_auc": float(sk.roc_auc_score(positive, probs[:, i])),
            "precision": precision, "recall": recall,
            "average_precision": float(sk.average_precision_score(positive, probs[:, i])),
        }  # fmt: skip
    return found


def measure(
    probs: np.ndarray, label_ids: np.ndarray, labels: Sequence[str], n_bootstrap: int = 2000, n_bins: int = 15
) -> dict[str, Any]:
    """Everything that metrics.json says of a split.

    Args:
        probs: float [n_examples, n_labels], rows sum to 1.
        label_ids: int [n_examples].
        labels: in the order of the columns of ``probs``.
        n_bootstrap: bootstrap samples for the intervals.
        n_bins: bins of the calibration error.

    Raises:
        DataError: empty input, lengths that differ, or values out of range.
    """
    check(probs, label_ids)
    matrix = confusion(label_ids, probs.argmax(1), len(labels))
    true_probs = np.clip(probs[np.arange(len(probs)), label_ids], 1e-12, 1)
    found = curves(probs, label_ids, labels)
    return {
        "n_rows": len(label_ids),
        **{name: float(value) for name, value in summary(matrix).items()},
        "log_loss": float(-np.log(true_probs).mean()),
        "ece": expected_calibration_error(probs, label_ids, n_bins),
        "interval_95": {name: {"low": low, "high": high} for name, (low, high) in bootstrap(matrix, n_bootstrap).items()},
        "labels": {
            label: {**values, **{key: found[label][key] for key in ("roc_auc", "average_precision") if label in found}}
            for label, values in per_label(matrix, labels).items()
        },
    }
