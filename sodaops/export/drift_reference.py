"""The drift reference of a bundle, computed from its predictions on its training and validation texts."""

from collections.abc import Sequence

import numpy as np

from sodaops.bundle.reference import Axes, Reference
from sodaops.inference.predictor import Predictor

N_ROWS = 2000  # texts of each split, at most
N_AXES = 32  # axes of a sketch, at most


def make_reference(
    predictor: Predictor, train: Sequence[str], val: Sequence[str], truth: np.ndarray | None = None,
    segments: tuple[np.ndarray, np.ndarray] | None = None,
) -> Reference:  # fmt: skip
    """Makes the drift reference of a bundle.

    Args:
        predictor: the bundle.
        train: cleaned texts that it was trained on; at most :data:`N_ROWS` are taken, always the same ones.
        val: cleaned texts that it was not trained on; as many at most.
        truth: label ids of val, int [n_val], for a task that estimates its quality.
        segments: of train and val: cells of the slice columns, str [n_texts, n_columns].
    """
    rows = [_sample(predictor.tokenise(texts).kept) for texts in (train, val)]
    texts = [side[i] for side, places in zip((train, val), rows, strict=True) for i in places]
    seen = np.arange(len(texts)) < len(rows[0])
    if truth is not None:
        truth = np.concatenate([np.full(len(rows[0]), -1), truth[rows[1]]]).astype(np.int16)
    # Batches come ordered by length; put their rows back into the order of the texts.
    places, outputs = zip(*predictor.batches(texts), strict=True)
    order = np.argsort(np.concatenate(places))
    probs, embeddings = (np.concatenate(arrays)[order] for arrays in zip(*outputs, strict=True))
    axes, groups = _fit_axes(embeddings[seen]), predictor.task.groups(probs)
    return Reference(
        descriptors=np.array([predictor.descriptors(text, predictor.encode(text)) for text in texts], dtype=np.float32),
        seen=seen,
        label_ids=groups.astype(np.int16),
        scores=np.take_along_axis(probs, groups[:, None], axis=1)[:, 0],
        sketches=axes.sketch(embeddings).astype(np.float16),
        center=axes.center,
        axes=axes.axes,
        answers=probs if predictor.task.keeps_answers or truth is not None else None,
        truth=truth,
        segments=segments and np.concatenate([side[places] for side, places in zip(segments, rows, strict=True)]),
    )


def _fit_axes(embeddings: np.ndarray) -> Axes:
    """PCA whitening: the principal axes of embeddings float32 [n_texts, hidden_size], scaled to variance 1."""
    center = embeddings.mean(axis=0)
    # The right singular vectors of the centred embeddings are their principal axes, in order of variance.
    _, singular_values, directions = np.linalg.svd(embeddings - center, full_matrices=False)
    # Axes with next to no variance are left out: scaled, they would be noise.
    n_axes = min(N_AXES, int((singular_values > 1e-4 * max(singular_values[0], 1e-12)).sum()))
    # The standard deviation along an axis is its singular value / sqrt(n_texts).
    scale = np.sqrt(len(embeddings)) / singular_values[:n_axes]
    return Axes(center.astype(np.float32), (directions[:n_axes].T * scale).astype(np.float32))


def _sample(places: np.ndarray) -> np.ndarray:
    """At most :data:`N_ROWS` places, in their order, chosen at random with a fixed seed."""
    if len(places) <= N_ROWS:
        return places
    return places[np.sort(np.random.default_rng(0).permutation(len(places))[:N_ROWS])]
