"""How likely each label is an error, from what may contradict it: a model, raters' votes, near duplicates with other labels."""

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from sodaops.text.near import near_pairs


class Ranking(NamedTuple):
    """What is known about the label of each row."""

    scores: np.ndarray  # float64 [n_rows], 0 if all evidence is for the given label, 1 if it is for the suggested one
    suggested: np.ndarray  # int64 [n_rows], the other label that has most of the evidence
    contradicts: dict[str, np.ndarray]  # model, votes, duplicate -> whether it contradicts the label, bool [n_rows]
    duplicates: np.ndarray  # int64 [n_rows], a near duplicate with another label; -1: none


def rank_labels(table: pa.Table, probs: np.ndarray, truth: np.ndarray, near: float) -> Ranking:
    """Ranks rows by how likely their label is an error.

    The evidence for each label is the raters' votes, to which the model and each near duplicate add one vote; the score is
    suggested / (suggested + given).

    Args:
        table: rows with text and votes.
        probs: out-of-fold probabilities, float [n_rows, n_labels], NaN where there are none.
        truth: the given label ids, int64 [n_rows].
        near: the similarity of near duplicates, as in :func:`~sodaops.text.near.near_pairs`.
    """
    rows, given = np.arange(len(truth)), np.eye(probs.shape[1])[truth]
    model, duplicates = np.nan_to_num(probs), np.full(len(truth), -1)
    votes = np.array([row or [0] * probs.shape[1] for row in table["votes"].to_pylist()], float)
    evidence = model + votes
    for pair in near_pairs(table["text"].to_pylist(), near):
        for row, other in (pair, pair[::-1]):
            evidence[row] += given[other]
            duplicates[row] = other if truth[other] != truth[row] else duplicates[row]
    contradicts = {
        "model": model_contradicts(model, truth),
        "votes": votes.max(1) > votes[rows, truth],
        "duplicate": duplicates >= 0,
    }
    others = np.where(given > 0, -1, evidence)
    scores = others.max(1) / np.maximum(others.max(1) + evidence[rows, truth], 1e-9)
    return Ranking(scores, others.argmax(1), contradicts, duplicates)


def model_contradicts(probs: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Whether confident learning counts a label as an error, bool [n_rows].

    A label is possible for a row with at least its mean probability over the rows that have it; of these the most probable one
    is another than the given one (C. Northcutt, L. Jiang and I. Chuang, "Confident Learning", JAIR 70, 2021).

    >>> model_contradicts(np.array([[0.8, 0.2], [0.9, 0.1], [0.1, 0.9], [0.2, 0.8], [0.9, 0.1]]), np.array([0, 0, 1, 1, 1]))
    array([False, False, False, False,  True])
    """
    own = np.arange(probs.shape[1]) == truth[:, None]
    possible = np.where(probs >= (probs * own).sum(0) / np.maximum(own.sum(0), 1), probs, 0)
    return (possible.max(1) > 0) & (possible.argmax(1) != truth)


def suspicious_slices(table: pa.Table, suspected: np.ndarray, alpha: float = 0.05) -> list[dict[str, Any]]:
    """The slices with more suspected rows than elsewhere: column, value, n_rows, n_suspected, p.

    By Fisher's exact test, one-sided; ``alpha`` is the chance of any false alarm (Bonferroni).

    Args:
        table: rows, whose ``source`` and ``slice_*`` define the slices.
        suspected: bool [n_rows].
        alpha: in (0, 1).
    """
    from scipy.stats import hypergeom

    slices: list[tuple[Any, ...]] = []
    for column in (name for name in table.column_names if name == "source" or name.startswith("slice_")):
        values, place, sizes = np.unique(table[column].to_numpy().astype(str), return_inverse=True, return_counts=True)
        counts = np.bincount(place, suspected, len(values)).astype(int)
        p = hypergeom.sf(counts - 1, len(table), int(suspected.sum()), sizes)
        names = [column.removeprefix("slice_")] * len(values)
        slices += zip(names, values.tolist(), sizes.tolist(), counts.tolist(), p.tolist(), strict=True)
    keys = ("column", "value", "n_rows", "n_suspected", "p")
    return [dict(zip(keys, one, strict=True)) for one in slices if one[-1] <= alpha / len(slices)]
