"""Two-sample tests with a known rate of false alarms: distances of distributions, and kernel tests of sketches."""

from typing import NamedTuple

import numpy as np
from scipy.stats import chi2_contingency

N_COMPARED = 1000  # sketches of each side at most, since the kernel matrix grows with the square
_BLOCK_ROWS = 4096  # rows of a kernel matrix that are computed at once
_BLOCK_PERMUTATIONS = 4000  # computed at once
_N_PERMUTATIONS = 9999


class EmbeddingTest(NamedTuple):
    """Result of :func:`embedding_test`."""

    p: float
    scores: np.ndarray  # float32 [n_compared]: drift scores of the compared current texts
    indices: np.ndarray  # int64 [n_compared]: of those texts among the current ones


def ks_distance(reference: np.ndarray, current: np.ndarray) -> float:
    """Largest gap between two empirical distribution functions, in [0, 1]: the two-sample Kolmogorov-Smirnov statistic.

    >>> ks_distance(np.array([1.0, 2.0, 3.0, 4.0]), np.array([3.0, 4.0, 5.0, 6.0]))
    0.5
    """
    # The gap can only change at an observed value, so it is enough to compare the functions there.
    values = np.sort(np.concatenate([reference, current]))
    cdfs = [np.searchsorted(np.sort(side), values, side="right") / len(side) for side in (reference, current)]
    return float(np.abs(cdfs[0] - cdfs[1]).max())


def total_variation(reference: np.ndarray, current: np.ndarray) -> float:
    """Half the sum of absolute differences of two lists of counts, each normalised to shares; in [0, 1].

    >>> total_variation(np.array([50, 50]), np.array([9, 1]))
    0.4
    """
    return float(np.abs(reference / reference.sum() - current / current.sum()).sum() / 2)


def chi_square_p(reference: np.ndarray, current: np.ndarray) -> float:
    """p-value of Pearson's chi-square test of homogeneity: both lists of counts are samples of the same shares.

    A test that takes the reference's shares as exact would give smaller p-values. With fewer than 5 expected in a cell the
    chi-square distribution is a poor approximation; the p-value then comes from 9,999 random permutations.

    >>> round(chi_square_p(np.array([250, 250]), np.array([120, 80])), 4)
    0.0166
    >>> chi_square_p(np.array([99, 1]), np.array([0, 1])) > 0.01
    True
    """
    counts = np.stack([reference, current])
    counts = counts[:, counts.sum(axis=0) > 0]  # labels that neither side has carry no information
    if counts.shape[1] < 2:
        return 1.0
    test = chi2_contingency(counts, correction=False)
    expected = test.expected_freq
    if expected.min() >= 5:
        return float(test.pvalue)
    # A permutation of the pooled rows leaves the totals of labels and sides fixed, so the counts of one side follow the
    # multivariate hypergeometric distribution.
    totals = counts.sum(axis=0)
    permuted = np.random.default_rng(0).multivariate_hypergeometric(totals, int(counts[1].sum()), size=_N_PERMUTATIONS)
    sides = np.stack([totals - permuted, permuted], axis=1)
    statistics = ((sides - expected) ** 2 / expected).sum(axis=(1, 2))
    return _permutation_p(statistics, test.statistic)


def _permutation_p(permuted: np.ndarray, observed: float) -> float:
    """Share of statistics at least as large as the observed one, which counts as a permutation (Phipson & Smyth 2010)."""
    return float((1 + (permuted >= observed - 1e-9).sum()) / (1 + len(permuted)))


def embedding_test(
    reference: np.ndarray, current: np.ndarray, reference_labels: np.ndarray, current_labels: np.ndarray, n_permutations: int
) -> EmbeddingTest:
    """Tests whether texts of the same predicted label differ: maximum mean discrepancy (MMD; Gretton et al. 2012).

    The kernel is Gaussian with the median distance as its width. The p-value comes from permutations of the two sides within
    each label. So a changed mix of labels alone is no drift, and the rate of false alarms is the level of the test.

    Args:
        reference: sketches, float [n, n_axes].
        current: sketches, float [m, n_axes].
        reference_labels: label ids, int [n].
        current_labels: label ids, int [m].
        n_permutations: the smallest possible p-value is 1 / (n_permutations + 1).
    """
    rng = np.random.default_rng(0)
    # A random sample of each side, so that the kernel matrix stays small.
    kept = [np.sort(rng.permutation(len(side))[:N_COMPARED]) for side in (reference, current)]
    sketches = np.concatenate([reference[kept[0]], current[kept[1]]]).astype(np.float32)
    labels = np.concatenate([reference_labels[kept[0]], current_labels[kept[1]]])
    is_current = np.arange(len(sketches)) >= len(kept[0])
    distances = _squared_distances(sketches, sketches)
    kernel = np.exp(-distances / _median_distance(distances))
    permuted = []
    for first in range(0, n_permutations, _BLOCK_PERMUTATIONS):
        weights = _weights(labels, is_current, min(_BLOCK_PERMUTATIONS, n_permutations - first), rng)
        # With weights w, the squared MMD is w'Kw (Gretton et al. 2012, eq. 5), and Kw is the witness function: how much denser
        # the current side is than the reference around each row.
        witness = kernel @ weights
        squared_mmd = (weights * witness).sum(axis=0)
        permuted.append(squared_mmd[1:])
    return EmbeddingTest(_permutation_p(np.concatenate(permuted), squared_mmd[0]), witness[is_current, 0], kept[1])


def _weights(labels: np.ndarray, is_current: np.ndarray, n_permutations: int, rng: np.random.Generator) -> np.ndarray:
    """Weights of rows in the mean differences, float32 [n_rows, n_permutations + 1]."""
    # Column 0 holds the observed assignment of rows to sides, the other columns permuted ones. A row of the current side has
    # the weight 1 / n_current, a row of the reference -1 / n_reference, times the share of its label in the current rows.
    weights = np.zeros((len(labels), n_permutations + 1), dtype=np.float32)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        n_current = int(is_current[rows].sum())
        if n_current in (0, len(rows)):
            continue  # only one side has this label; the test of the label shares covers that
        sides = np.tile(is_current[rows], (n_permutations + 1, 1))
        sides[1:] = rng.permuted(sides[1:], axis=1)
        share = n_current / is_current.sum()
        weights[rows] = (share * np.where(sides, 1 / n_current, -1 / (len(rows) - n_current))).T
    return weights


def drift_scores(reference: np.ndarray, current: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Drift score of each point: the witness function of the MMD (Gretton et al. 2012, section 2.3).

    It is the mean kernel to the current sketches minus the mean kernel to the reference.

    Args:
        reference: sketches, float32 [n, n_axes].
        current: sketches, float32 [m, n_axes].
        points: sketches to score, float32 [k, n_axes].

    Returns:
        float32 [k], in [-1, 1]; high for points like the current texts and unlike the reference.
    """
    rng = np.random.default_rng(0)
    sides = [side[rng.permutation(len(side))[:N_COMPARED]] for side in (reference, current)]
    pooled = np.concatenate(sides)
    width = _median_distance(_squared_distances(pooled, pooled))
    scores = []
    for first in range(0, len(points), _BLOCK_ROWS):
        block = points[first : first + _BLOCK_ROWS]
        to_reference, to_current = (np.exp(-_squared_distances(block, side) / width).mean(axis=1) for side in sides)
        scores.append(to_current - to_reference)
    return np.concatenate(scores)


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances, float32 [n, m], by |a - b|² = |a|² + |b|² - 2ab; rounding may give less than 0."""
    a_squared, b_squared = ((side * side).sum(axis=1) for side in (a, b))
    return np.maximum(a_squared[:, None] + b_squared[None] - 2 * a @ b.T, 0)


def _median_distance(distances: np.ndarray) -> float:
    """Width of the kernel: the median squared distance of two different rows (Gretton et al. 2012, section 8)."""
    pairs = distances[np.triu_indices(len(distances), 1)]
    return max(float(np.median(pairs)) if len(pairs) else 0.0, 1e-12)
