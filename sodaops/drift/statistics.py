"""Two-sample tests whose false alarms are known: distances of distributions, and kernel two-sample tests of sketches."""

from typing import NamedTuple

import numpy as np
from scipy.stats import chi2_contingency

_BLOCK = 4096  # rows of a kernel at once
N_COMPARED = 1000  # sketches of each side, at most: a kernel matrix grows with the square


class Embedded(NamedTuple):
    """What the test of the sketches found."""

    p: float
    witness: np.ndarray  # float32 [n_compared]: how much more at home a text of the window is there than in the reference
    places: np.ndarray  # int64 [n_compared]: of those texts in the window


def ks_distance(before: np.ndarray, now: np.ndarray) -> float:
    """Largest gap between two empirical distribution functions (the Kolmogorov-Smirnov statistic), in [0, 1].

    >>> ks_distance(np.array([1.0, 2.0, 3.0, 4.0]), np.array([3.0, 4.0, 5.0, 6.0]))
    0.5
    """
    every = np.sort(np.concatenate([before, now]))
    below = [np.searchsorted(np.sort(side), every, side="right") / len(side) for side in (before, now)]
    return float(np.abs(below[0] - below[1]).max())


def total_variation(before: np.ndarray, now: np.ndarray) -> float:
    """Half the summed gaps of two lists of counts, each taken as shares; in [0, 1].

    >>> total_variation(np.array([50, 50]), np.array([9, 1]))
    0.4
    """
    return float(np.abs(before / before.sum() - now / now.sum()).sum() / 2)


def chi_square_p(before: np.ndarray, now: np.ndarray) -> float:
    """p-value of Pearson's chi-square test that two lists of counts have the same shares.

    Both sides are samples; a test that takes the reference's shares for exact gives smaller p-values. Where a label is so
    rare that the chi-square distribution does not hold (fewer than 5 expected), the p-value is that of 9,999 permutations.

    >>> round(chi_square_p(np.array([250, 250]), np.array([120, 80])), 4)
    0.0166
    >>> chi_square_p(np.array([99, 1]), np.array([0, 1])) > 0.01
    True
    """
    counts = np.stack([before, now])
    counts = counts[:, counts.sum(axis=0) > 0]
    if counts.shape[1] < 2:
        return 1.0
    test = chi2_contingency(counts, correction=False)
    if test.expected_freq.min() >= 5:
        return float(test.pvalue)
    totals, expected = counts.sum(axis=0), test.expected_freq
    drawn = np.random.default_rng(0).multivariate_hypergeometric(totals, int(counts[1].sum()), size=9999)
    sides = np.stack([totals - drawn, drawn], axis=1)
    values = ((sides - expected) ** 2 / expected).sum(axis=(1, 2))
    return float((1 + (values >= test.statistic - 1e-9).sum()) / 10_000)


def embedding_test(
    before: np.ndarray, now: np.ndarray, labels_before: np.ndarray, labels_now: np.ndarray, n_permutations: int
) -> Embedded:
    """Whether texts of the same answered label differ: maximum mean discrepancy (Gretton et al. 2012), within labels.

    The kernel is Gaussian; its width is the median distance. The p-value comes from exchanging texts between the sides,
    always among texts of one label, so another mix of labels alone raises no alarm, and the rate of false alarms is the
    level of the test.

    Args:
        before: sketches of the reference, float [n, n_axes].
        now: of the window, float [m, n_axes].
        labels_before: label ids, int [n].
        labels_now: int [m].
        n_permutations: of which the smallest possible p-value is 1 / (n_permutations + 1).
    """
    rng = np.random.default_rng(0)
    keep = [np.sort(rng.permutation(len(side))[:N_COMPARED]) for side in (before, now)]
    sketches = np.concatenate([before[keep[0]], now[keep[1]]]).astype(np.float32)
    labels = np.concatenate([labels_before[keep[0]], labels_now[keep[1]]])
    is_now = np.arange(len(sketches)) >= len(keep[0])
    kernel = _kernel(sketches)
    weights = np.zeros((len(sketches), n_permutations + 1), dtype=np.float32)
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        n_now = int(is_now[places].sum())
        if n_now in (0, len(places)):
            continue  # a label of one side alone; what it tells is in the mix of labels
        sides = np.tile(is_now[places], (n_permutations + 1, 1))
        sides[1:] = rng.permuted(sides[1:], axis=1)
        share = n_now / is_now.sum()
        weights[places] = (share * np.where(sides, 1 / n_now, -1 / (len(places) - n_now))).T
    towards = kernel @ weights
    values = (weights * towards).sum(axis=0)
    p = (1 + int((values[1:] >= values[0] - 1e-9).sum())) / (n_permutations + 1)
    return Embedded(p, towards[is_now, 0], keep[1])


def witness(before: np.ndarray, now: np.ndarray, points: np.ndarray) -> np.ndarray:
    """How much more at home each point is in a window than in the reference: the witness function of the discrepancy.

    Args:
        before: sketches of the reference, float32 [n, n_axes].
        now: of the window, float32 [m, n_axes].
        points: whatever is asked of, float32 [k, n_axes].

    Returns:
        float32 [k], in [-1, 1].
    """
    rng = np.random.default_rng(0)
    sides = [side[rng.permutation(len(side))[:N_COMPARED]] for side in (before, now)]
    both = _distances(np.concatenate(sides), np.concatenate(sides))
    width = _width(both)
    blocks = [points[first : first + _BLOCK] for first in range(0, len(points), _BLOCK)]
    at_home = [[np.exp(-_distances(block, side) / width).mean(axis=1) for side in sides] for block in blocks]
    return np.concatenate([there - here for here, there in at_home])


def _kernel(sketches: np.ndarray) -> np.ndarray:
    distances = _distances(sketches, sketches)
    return np.exp(-distances / _width(distances))


def _distances(these: np.ndarray, those: np.ndarray) -> np.ndarray:
    """Squared distances, float32 [n, m]."""
    squares = [(side * side).sum(axis=1) for side in (these, those)]
    return np.maximum(squares[0][:, None] + squares[1][None] - 2 * these @ those.T, 0)


def _width(distances: np.ndarray) -> float:
    """Of the kernel: the median distance of two different rows."""
    apart = distances[np.triu_indices(len(distances), 1)]
    return max(float(np.median(apart)) if len(apart) else 0.0, 1e-12)
