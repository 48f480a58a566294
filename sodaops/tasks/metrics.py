"""Metrics as pure functions of label ids and probabilities, and the bootstrap."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from sodaops.errors import DataError


def check_inputs(probs: np.ndarray, label_ids: np.ndarray) -> None:
    """Refuses input that no metric is defined for.

    Args:
        probs: float [n_examples, n_labels].
        label_ids: int [n_examples].

    Raises:
        DataError: empty input, lengths that differ, ids out of range, or probabilities that are not finite.
    """
    if len(label_ids) == 0 or probs.ndim != 2 or len(probs) != len(label_ids):
        raise DataError(f"metrics: probabilities {probs.shape} and {len(label_ids)} labels; expected one row per label.")
    if not np.isfinite(probs).all():
        raise DataError("metrics: probabilities that are not finite; export the bundle again, or train again.")
    if label_ids.min() < 0 or label_ids.max() >= probs.shape[1]:
        raise DataError(f"metrics: label ids {label_ids.min()} to {label_ids.max()}; expected 0 to {probs.shape[1] - 1}.")


def confusion(label_ids: np.ndarray, predicted: np.ndarray, n_labels: int) -> np.ndarray:
    """Confusion matrix: counts, int64 [n_labels, n_labels]; rows are the true labels, columns the predicted ones.

    >>> confusion(np.array([0, 1, 1]), np.array([0, 0, 1]), 2).tolist()
    [[1, 0], [1, 1]]
    """
    # Number the cells row by row, and count how often each number occurs.
    return np.bincount(label_ids * n_labels + predicted, minlength=n_labels**2).reshape(n_labels, n_labels)


def f1_of(hits: np.ndarray, support: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """F1 = 2 TP / (2 TP + FP + FN) from the numbers of correct predictions, of rows and of predictions; 0 without either."""
    total = support + predicted  # rows of the label (TP + FN) and its predictions (TP + FP)
    return np.divide(2 * hits, total, out=np.zeros(hits.shape), where=total > 0)


def summary(matrix: np.ndarray) -> dict[str, Any]:
    """Macro F1, weighted F1 and accuracy from a confusion matrix.

    As in scikit-learn's ``f1_score``, macro F1 is the mean over the labels that have rows or predictions, and weighted F1
    weighs each label by its rows.
    """
    return _summary(np.diag(matrix), matrix.sum(1), matrix.sum(0))


def _summary(hits: np.ndarray, support: np.ndarray, predicted: np.ndarray) -> dict[str, Any]:
    """The summary from each label's correct rows, all rows and predictions, each [..., n_labels]."""
    f1 = f1_of(hits, support, predicted)
    present = (support + predicted) > 0
    n_rows = support.sum(-1)
    return {
        "macro_f1": (f1 * present).sum(-1) / present.sum(-1),
        "weighted_f1": (f1 * support).sum(-1) / n_rows,
        "accuracy": hits.sum(-1) / n_rows,
    }


def summary_of_cells(true: np.ndarray, predicted: np.ndarray, counts: np.ndarray, n_labels: int) -> dict[str, np.ndarray]:
    """The summary of many samples, each given as the counts of some cells of the confusion matrix.

    Memory grows with the samples times the cells or the labels, not with the square of the labels.

    Args:
        true: the cells' true ids, int [n_cells].
        predicted: the cells' predicted ids, int [n_cells]; a cell may occur several times.
        counts: int [n_samples, n_cells].
        n_labels: number of labels.

    Returns:
        metric -> float [n_samples].
    """
    rows = np.arange(len(true))
    of_true, of_predicted = np.zeros((2, len(true), n_labels))
    of_true[rows, true] = of_predicted[rows, predicted] = 1.0
    counts = counts.astype(np.float64)
    return _summary(counts @ (of_true * of_predicted), counts @ of_true, counts @ of_predicted)


def rank_metrics(true: np.ndarray, predicted: np.ndarray, counts: np.ndarray, n_labels: int) -> dict[str, np.ndarray]:
    """Metrics of ordered labels, of many samples that are given as for :func:`summary_of_cells`.

    Quadratic weighted kappa is 1 - (observed / expected mean of the squared differences of ranks), where the expected one is
    of independent labels and predictions with the same frequencies (Cohen 1968, Weighted kappa); 0 where that is 0.

    Returns:
        quadratic_kappa; mae, the mean difference in ranks; off_by_one, the share with at most one rank off; float [n_samples].

    >>> ids = np.array([0, 1, 2, 2])
    >>> {name: float(value) for name, value in rank_metrics(ids, np.array([0, 1, 2, 0]), np.ones(4), 3).items()}
    {'quadratic_kappa': 0.3846153846153846, 'mae': 0.5, 'off_by_one': 0.75}
    """
    gaps, ranks, eye = np.abs(true - predicted), np.arange(n_labels), np.eye(n_labels)
    shares = counts / counts.sum(-1, keepdims=True)
    of_true, of_predicted = shares @ eye[true], shares @ eye[predicted]
    expected = np.einsum("...i,...j,ij->...", of_true, of_predicted, (ranks[:, None] - ranks) ** 2.0)
    observed = shares @ gaps**2.0
    kappa = 1 - np.divide(observed, expected, out=np.ones_like(observed), where=expected > 0)
    return {"quadratic_kappa": kappa, "mae": shares @ gaps.astype(float), "off_by_one": shares @ (gaps <= 1).astype(float)}


def bootstrap(matrix: np.ndarray, n_samples: int, seed: int = 0) -> dict[str, tuple[float, float]]:
    """95 % bootstrap percentile intervals of the summary metrics (Efron & Tibshirani 1993, An Introduction to the Bootstrap).

    Sampling rows with replacement gives a confusion matrix whose cells follow a multinomial distribution. The cells are
    sampled directly, so the cost does not grow with the number of rows. If all rows are right, or all wrong, every sample is
    the same; the interval is then Wilson's.

    Args:
        matrix: counts [n_labels, n_labels].
        n_samples: bootstrap samples.
        seed: of the random generator.

    Returns:
        metric -> (low, high).
    """
    support = matrix.sum(1)
    n_rows = int(support.sum())
    if np.trace(matrix) in (0, n_rows):
        # Macro F1 counts each label equally: its variance is that of as many rows, spread evenly, as n_labels**2 / sum(1/n).
        even = float((support > 0).sum() ** 2 / (1 / support[support > 0]).sum())
        share = float(np.trace(matrix) / n_rows)
        return {name: wilson(share, even if name == "macro_f1" else n_rows) for name in summary(matrix)}
    # One sample is a matrix of as many rows, with the observed cell frequencies as probabilities; empty cells stay empty.
    true, predicted = np.nonzero(matrix)
    counts = matrix[true, predicted]
    blocks = [summary_of_cells(true, predicted, draws, len(matrix)) for draws in draw_counts(counts, n_samples, seed)]
    samples = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    # The interval runs from the 2.5 % to the 97.5 % quantile of the metric over the samples.
    return {name: tuple(np.quantile(values, [0.025, 0.975]).tolist()) for name, values in samples.items()}


def draw_counts(counts: np.ndarray, n_samples: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Bootstrap samples of counts [n_cells], perhaps expected ones, in blocks [n_samples of the block, n_cells] of 80 MB."""
    generator, block = np.random.default_rng(seed), max(1, 10_000_000 // len(counts))
    for start in range(0, n_samples, block):
        yield generator.multinomial(round(counts.sum()), counts / counts.sum(), size=min(block, n_samples - start))


def bootstrap_rows(score: Callable[[np.ndarray], Any], n_rows: int, n_samples: int, seed: int = 0) -> np.ndarray:
    """Any statistic of bootstrap samples of the rows.

    Args:
        score: rows of a sample, int [n_rows] with repetitions -> a number, or several.
        n_rows: of the table.
        n_samples: bootstrap samples.
        seed: of the random generator.

    Returns:
        float [n_samples, ...]
    """
    generator = np.random.default_rng(seed)
    return np.array([score(generator.integers(0, n_rows, n_rows)) for _ in range(n_samples)])


def paired_gains(
    label_ids: np.ndarray, challenger: np.ndarray, champion: np.ndarray, n_labels: int, n_samples: int,
    metric: Callable[..., np.ndarray] = lambda *cells: summary_of_cells(*cells)["macro_f1"],
) -> np.ndarray:  # fmt: skip
    """Differences of a metric, by default macro-F1, on bootstrap samples of the rows; each sample is used for both models.

    Rows with the same label and the same two predictions are interchangeable, so the bootstrap (Efron 1979) draws the number
    of each kind from a multinomial distribution, instead of single rows.

    Args:
        label_ids: int [n_rows].
        challenger: predicted ids, int [n_rows].
        champion: predicted ids of the model to compare with, int [n_rows].
        n_labels: number of labels.
        n_samples: number of bootstrap samples.
        metric: with the arguments of :func:`summary_of_cells`.

    Returns:
        Challenger minus champion, float [n_samples].
    """
    # cells: the distinct combinations of label, challenger and champion, int [3, n_cells]
    cells, counts = np.unique(np.stack([label_ids, challenger, champion]), axis=1, return_counts=True)
    gains = []
    for draws in draw_counts(counts, n_samples):  # the number of rows of each cell in each sample
        own, other = (metric(cells[0], predicted, draws, n_labels) for predicted in cells[1:])
        gains.append(own - other)
    return np.concatenate(gains)


def wilson(share: float, n_rows: float) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927, Probable Inference, the Law of Succession, and Statistical Inference).

    >>> low, high = wilson(1.0, 40)
    >>> round(low, 3), high
    (0.912, 1.0)
    """
    z2 = 1.959964**2
    centre, half = share + z2 / (2 * n_rows), np.sqrt(z2 * (share * (1 - share) / n_rows + z2 / (4 * n_rows**2)))
    scale = 1 + z2 / n_rows
    return float(max((centre - half) / scale, 0.0)), float(min((centre + half) / scale, 1.0))


def per_label(matrix: np.ndarray, labels: Sequence[str]) -> dict[str, dict[str, float]]:
    """The :func:`label_table` of a confusion matrix."""
    return label_table(np.diag(matrix), matrix.sum(1), matrix.sum(0), labels)


def label_table(
    hits: np.ndarray, support: np.ndarray, predicted: np.ndarray, labels: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and number of rows of each label; 0 where one is not defined.

    The numbers of correct predictions, of rows and of predictions are int [n_labels].
    """
    f1 = f1_of(hits, support, predicted)
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
    """Confidence and accuracy in equal-width bins of the highest probability: a reliability diagram (Guo et al. 2017).

    Args:
        probs: float [n_examples, n_labels], rows sum to 1.
        label_ids: int [n_examples].
        n_bins: bins over (0, 1]; bin k holds confidences in (k / n_bins, (k + 1) / n_bins].

    Returns:
        n_rows int, confidence and accuracy float, each [n_bins]; NaN where a bin is empty.
    """
    check_inputs(probs, label_ids)
    return reliability_of(probs.max(1), probs.argmax(1) == label_ids, n_bins)


def reliability_of(confidence: np.ndarray, correct: np.ndarray, n_bins: int) -> dict[str, np.ndarray]:
    """The same of confidences, float [n_examples], and whether each answer is correct, bool [n_examples]."""
    confidence = confidence.astype(np.float64)
    # Bins are closed on the right, so that a confidence of 1 falls into the last one.
    bins = np.clip(np.ceil(confidence * n_bins).astype(int) - 1, 0, n_bins - 1)
    n_rows = np.bincount(bins, minlength=n_bins)
    with np.errstate(invalid="ignore"):  # 0 / 0 in an empty bin
        return {
            "n_rows": n_rows,
            "confidence": np.bincount(bins, confidence, n_bins) / n_rows,
            "accuracy": np.bincount(bins, correct, n_bins) / n_rows,
        }


def expected_calibration_error(probs: np.ndarray, label_ids: np.ndarray, n_bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017, On Calibration of Modern Neural Networks, equation 3).

    The absolute gap between confidence and accuracy in each of the equal-width bins, averaged with the bins' rows as weights.

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
    return calibration_gap(reliability(probs, label_ids, n_bins))


def calibration_gap(bins: dict[str, np.ndarray]) -> float:
    """The expected calibration error of a reliability diagram."""
    # Empty bins are NaN; their gap becomes 0, and so is their weight.
    gaps = np.abs(np.nan_to_num(bins["confidence"]) - np.nan_to_num(bins["accuracy"]))
    return float((bins["n_rows"] / bins["n_rows"].sum() * gaps).sum())


def curves(probs: np.ndarray, label_ids: np.ndarray, labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """One-vs-rest ROC and precision-recall curves of each label that some rows have and others do not.

    ``label_ids`` are int [n_rows], or of any number of labels bool [n_rows, n_labels].

    Returns:
        label -> fpr, tpr, roc_auc, precision, recall, average_precision.
    """
    from sklearn import metrics as sk  # only here, since serving imports this module

    curves_of = {}
    for i, label in enumerate(labels):
        positive = label_ids == i if label_ids.ndim == 1 else label_ids[:, i]
        if positive.all() or not positive.any():
            continue  # neither curve is defined
        fpr, tpr, _ = sk.roc_curve(positive, probs[:, i])
        precision, recall, _ = sk.precision_recall_curve(positive, probs[:, i])
        curves_of[label] = {
            "fpr": fpr, "tpr": tpr, "roc_auc": float(sk.roc_auc_score(positive, probs[:, i])),
            "precision": precision, "recall": recall,
            "average_precision": float(sk.average_precision_score(positive, probs[:, i])),
        }  # fmt: skip
    return curves_of


def measure(
    probs: np.ndarray, label_ids: np.ndarray, labels: Sequence[str], n_bootstrap: int = 2000, n_bins: int = 15,
    predicted: np.ndarray | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The metrics of a split, as in metrics.json.

    Args:
        probs: float [n_examples, n_labels], rows sum to 1.
        label_ids: int [n_examples].
        labels: in the order of the columns of ``probs``.
        n_bootstrap: bootstrap samples of the intervals.
        n_bins: bins of the calibration error.
        predicted: label ids, int [n_examples]; None: the most probable ones.

    Returns:
        Plain numbers: n_rows, macro_f1, weighted_f1, accuracy, log_loss, ece, interval_95 and labels.

    Raises:
        DataError: empty input, lengths that differ, or values out of range.
    """
    check_inputs(probs, label_ids)
    matrix = confusion(label_ids, probs.argmax(1) if predicted is None else predicted, len(labels))
    # Log loss is the mean of -log(probability of the true label); clipped, since log(0) is infinite.
    true_probs = np.clip(probs[np.arange(len(probs)), label_ids], 1e-12, 1)
    areas = curves(probs, label_ids, labels)
    return {
        "n_rows": len(label_ids),
        **{name: float(value) for name, value in summary(matrix).items()},
        "log_loss": float(-np.log(true_probs).mean()),
        "ece": expected_calibration_error(probs, label_ids, n_bins),
        "interval_95": {name: {"low": low, "high": high} for name, (low, high) in bootstrap(matrix, n_bootstrap).items()},
        "labels": {
            label: {**values, **{key: areas[label][key] for key in ("roc_auc", "average_precision") if label in areas}}
            for label, values in per_label(matrix, labels).items()
        },
    }
