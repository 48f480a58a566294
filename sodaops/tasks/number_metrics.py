"""Metrics of estimated numbers."""

import math

import numpy as np

from sodaops.tasks.metrics import bootstrap_rows


def summary(values: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """The metrics of estimates, float [n_rows].

    >>> {name: round(value, 3) for name, value in summary(np.array([1.0, 2.0, 2.0]), np.array([1.0, 2.0, 4.0])).items()}
    {'r2': 0.143, 'mae': 0.667, 'rmse': 1.155, 'spearman': 0.866}
    """
    errors, variance = np.abs(values - truth), truth.var()
    squared = (errors**2).mean()
    numbers = {
        "r2": 1 - squared / variance if variance else 0.0,  # of equal numbers there is no variance to explain
        "mae": errors.mean(),
        "rmse": math.sqrt(squared),
        "spearman": rank_correlation(values, truth),
    }
    return {name: float(value) for name, value in numbers.items()}


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two arrays [n]; 0 if all values of one are equal."""
    from scipy.stats import rankdata

    ranks = [rankdata(side) - (len(side) + 1) / 2 for side in (a, b)]
    norm = math.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum())
    return float((ranks[0] * ranks[1]).sum() / norm) if norm else 0.0


def paired_gains(truth: np.ndarray, challenger: np.ndarray, champion: np.ndarray, n_samples: int) -> np.ndarray:
    """Differences of R² on bootstrap samples of the rows, float [n_samples]; each sample is used for both models."""
    gain_of_row = (champion - truth) ** 2 - (challenger - truth) ** 2

    def gain(rows: np.ndarray) -> float:
        variance = truth[rows].var()
        return gain_of_row[rows].mean() / variance if variance else 0.0

    return bootstrap_rows(gain, len(truth), n_samples)


def concordance(pairs: np.ndarray) -> float | None:
    """Lin's concordance correlation (Lin 1989, Biometrics 45) of pairs, float [n, 2]: kappa with quadratic weights.

    At most 1; None where all numbers are equal.

    >>> concordance(np.array([[1.0, 1.5], [2.0, 2.0], [3.0, 4.0]]))
    0.8
    """
    one, other = pairs.T
    expected = one.var() + other.var() + (one.mean() - other.mean()) ** 2
    return float(1 - ((one - other) ** 2).mean() / expected) if expected else None
