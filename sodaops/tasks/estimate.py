"""Accuracy and macro-F1 of rows without labels, estimated from the probabilities of a model.

As in NannyML's confidence-based performance estimation (CBPE), the expected confusion matrix is the sum of the rows' calibrated
probabilities in the column of their predicted label. The estimate is right for new texts of the same source, and too high after
drift, when a model is surer than it should be (Guillory et al. 2021, Predicting with Confidence on Unseen Distributions).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sodaops.tasks.metrics import check_inputs, draw_counts, f1_of

METRICS = {"accuracy": "accuracy", "macro_f1": "macro-F1"}  # name -> title
MAX_LABELS = 100  # beyond which an interval would take long


@dataclass(frozen=True)
class Estimate:
    """An estimated metric, and its 95 % interval; all in [0, 1]."""

    value: float
    low: float
    high: float


class Calibration(NamedTuple):
    """What val shows about the estimates of a model, in the order of :data:`METRICS`."""

    shift: np.ndarray  # float [2]: added to an estimate
    error: np.ndarray  # float [2]: its standard error


NO_CALIBRATION = Calibration(np.zeros(2), np.zeros(2))


def estimate(
    probs: np.ndarray, predicted: np.ndarray, calibration: Calibration = NO_CALIBRATION, n_samples: int = 1000
) -> dict[str, Estimate]:
    """Estimates accuracy and macro-F1 of rows without labels.

    The interval covers which rows the window has, which labels they have, and the calibration's error. Rows drawn with
    replacement, each with a label drawn from its probabilities, give a confusion matrix whose cells follow a multinomial
    distribution with the expected matrix as its shares; so matrices are drawn in place of rows.

    Args:
        probs: float [n, n_labels], rows sum to 1.
        predicted: label ids, int [n].
        calibration: of the same model, from :func:`calibrate`.
        n_samples: draws for the interval.

    Raises:
        DataError: no rows, lengths that differ, or probabilities that are not finite.

    >>> probs = np.array([[0.9, 0.1], [0.2, 0.8]] * 50)
    >>> {name: round(metric.value, 4) for name, metric in estimate(probs, probs.argmax(1)).items()}
    {'accuracy': 0.85, 'macro_f1': 0.8496}
    """
    check_inputs(probs, predicted)
    n_labels = probs.shape[1]
    expected = probs.astype(float).T @ np.eye(n_labels)[predicted]  # [n_labels, n_labels]: rows are the true labels
    draws = [_metrics_of(cells.reshape(-1, n_labels, n_labels)) for cells in draw_counts(expected.ravel(), n_samples)]
    noise = np.random.default_rng(0).normal(size=(n_samples, 1)) * calibration.error
    value, (low, high) = _metrics_of(expected), np.quantile(np.concatenate(draws) + noise, [0.025, 0.975], axis=0)
    rows = np.stack([value, np.minimum(low, value), np.maximum(high, value)]) + calibration.shift
    return {name: Estimate(*numbers) for name, numbers in zip(METRICS, np.clip(rows, 0, 1).T.tolist(), strict=True)}


def calibrate(probs: np.ndarray, predicted: np.ndarray, truth: np.ndarray, n_samples: int = 500) -> Calibration:
    """Compares the estimates on rows with labels, those of val, with the truth.

    A few hundred rows show the gap between the two with an error (of the bootstrap over rows) that is often as large as the
    gap, so that adding it would make estimates worse. It is multiplied by ``1 - (error / gap)²``, or by 0 if that is negative:
    the positive-part estimator of James and Stein (1961, Estimation with Quadratic Loss).

    Args:
        probs: float [n, n_labels], rows sum to 1.
        predicted: label ids, int [n].
        truth: label ids, int [n].
        n_samples: draws for the error.

    Raises:
        DataError: as :func:`estimate`.

    >>> probs = np.full((400, 2), [0.9, 0.1])
    >>> calibrate(probs, probs.argmax(1), np.arange(400) % 4 // 3).shift.round(2).tolist()
    [-0.15, -0.04]
    """
    check_inputs(probs, predicted)
    n_rows, of_label = len(probs), np.eye(probs.shape[1])
    draws = np.random.default_rng(0).multinomial(n_rows, np.full(n_rows, 1 / n_rows), size=n_samples)
    weights = np.concatenate([np.ones((1, n_rows)), draws])  # of each row: all rows once, then the samples
    hits, by_predicted = of_label[predicted], weights @ of_label[predicted]
    actual, estimated = (_metrics(weights @ (hits * rows), weights @ rows, by_predicted) for rows in (of_label[truth], probs))
    gap, error = (actual - estimated)[0], (actual - estimated)[1:].std(axis=0)
    return Calibration(gap * np.maximum(0, 1 - (error / np.where(gap, gap, 1)) ** 2), error)


def _metrics_of(matrices: np.ndarray) -> np.ndarray:
    """The metrics of confusion matrices [..., n_labels, n_labels], [..., 2]."""
    return _metrics(np.diagonal(matrices, axis1=-2, axis2=-1), matrices.sum(-1), matrices.sum(-2))


def _metrics(hits: np.ndarray, support: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """The metrics [..., 2] of each label's correct rows, rows and predictions [..., n_labels], perhaps expected ones."""
    present = support + predicted >= 0.5  # a window has probably no row of the other labels, which macro F1 leaves out
    f1 = (f1_of(hits, support, predicted) * present).sum(-1) / present.sum(-1)
    return np.stack([hits.sum(-1) / support.sum(-1), f1], axis=-1)
