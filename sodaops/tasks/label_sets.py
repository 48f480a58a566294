"""Metrics of answers with any number of labels, and the thresholds that make them. Arrays are [n_rows, n_labels]."""

import numpy as np

from sodaops.tasks import metrics


def summary(truth: np.ndarray, decided: np.ndarray, counts: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """F1 and Hamming loss.

    Macro-F1 is the mean over the labels that have rows or predictions, micro-F1 counts all decisions alike, and F1 per text is
    the mean over the rows; it is 1 for a row without labels and predictions. Hamming loss is the share of wrong decisions.

    Args:
        truth: bool.
        decided: bool.
        counts: of samples, how often each row is in them, [n_samples, n_rows]; None: once.

    Returns:
        metric -> float [n_samples], or a scalar.
    """
    counts = np.ones(len(truth)) if counts is None else counts.astype(np.float64)
    hits, support, predicted = (counts @ part.astype(np.float64) for part in (truth & decided, truth, decided))
    present, n_rows = (support + predicted) > 0, counts.sum(-1)
    of_row = metrics.f1_of((truth & decided).sum(1), truth.sum(1), decided.sum(1))
    of_row[~(truth | decided).any(1)] = 1
    return {
        "macro_f1": (metrics.f1_of(hits, support, predicted) * present).sum(-1) / np.maximum(present.sum(-1), 1),
        "micro_f1": metrics.f1_of(hits.sum(-1), support.sum(-1), predicted.sum(-1)),
        "sample_f1": counts @ of_row / n_rows,
        "hamming_loss": counts @ (truth ^ decided).mean(1) / n_rows,
    }


def samples(truth: np.ndarray, decided: np.ndarray, n_samples: int) -> dict[str, np.ndarray]:
    """The summary of bootstrap samples of the rows, metric -> float [n_samples]; of as many rows always the same samples."""
    draws = metrics.draw_counts(np.ones(len(truth), np.int64), n_samples)
    blocks = [summary(truth, decided, counts) for counts in draws]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def intervals(truth: np.ndarray, decided: np.ndarray, n_samples: int) -> dict[str, dict[str, float]]:
    """95 % bootstrap percentile intervals of the summary, metric -> low and high."""
    bounds = {name: np.quantile(of, [0.025, 0.975]) for name, of in samples(truth, decided, n_samples).items()}
    return {name: {"low": float(low), "high": float(high)} for name, (low, high) in bounds.items()}


def best_thresholds(probs: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The threshold of each label with the highest F1 on these rows, float [n_labels].

    It is halfway between two probabilities; of equally good ones the nearest to 0.5, which is also that of a label without
    rows. A text has the label if its probability is at least the threshold.

    >>> best_thresholds(np.array([[0.1], [0.2], [0.4]]), np.array([[0], [1], [1]])).round(2).tolist()
    [0.15]
    """
    return np.array([_best_threshold(column.astype(np.float64), of) for column, of in zip(probs.T, truth.T, strict=True)])


def _best_threshold(probs: np.ndarray, positive: np.ndarray) -> float:
    if not positive.any():
        return 0.5
    order = np.argsort(-probs, kind="stable")
    ordered = np.append(probs[order], 0.0)
    hits = positive[order].cumsum()
    # f1[k]: F1 if the k + 1 texts with the highest probabilities get the label; a threshold cannot part equal probabilities
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + hits[-1])
    f1[ordered[:-1] == ordered[1:]] = -1
    thresholds = (ordered[:-1] + ordered[1:]) / 2
    best = np.flatnonzero(f1 >= f1.max() - 1e-12)
    return max(1e-6, float(thresholds[best[np.abs(thresholds[best] - 0.5).argmin()]]))


def moved(probs: np.ndarray, thresholds: np.ndarray, to: np.ndarray) -> np.ndarray:
    """Probabilities that give with the thresholds ``to``, float [n_labels], the decisions of these with ``thresholds``."""
    low, high = np.maximum(thresholds, 1e-9), np.maximum(1 - thresholds, 1e-9)
    return np.where(probs < thresholds, np.minimum(probs / low, 1 - 1e-6) * to, to + (probs - thresholds) / high * (1 - to))
