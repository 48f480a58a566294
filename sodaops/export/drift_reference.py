"""The drift reference of a bundle, computed from its predictions on its training and validation texts."""

from collections.abc import Sequence

import numpy as np

from sodaops.bundle.reference import Axes, Reference
from sodaops.inference.predictor import Predictor

N_ROWS = 2000  # texts of each split, at most
N_AXES = 32  # axes of a sketch, at most


def make_reference(predictor: Predictor, train: Sequence[str], val: Sequence[str]) -> Reference:
    """Makes the drift reference of a bundle.

    Args:
        predictor: the bundle.
        train: cleaned texts that it was trained on; at most :data:`N_ROWS` are taken, always the same ones.
        val: cleaned texts that it was not trained on; as many at most.
    """
    sampled_train, sampled_val = (_sample([texts[i] for i in predictor.tokenise(texts).kept]) for texts in (train, val))
    texts = [*sampled_train, *sampled_val]
    seen = np.arange(len(texts)) < len(sampled_train)
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
        answers=probs if predictor.task.keeps_answers else None,
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


def _sample(texts: Sequence[str]) -> list[str]:
    """At most :data:`N_ROWS` texts, in their order, chosen at random with a fixed seed."""
    if len(texts) <= N_ROWS:
        return list(texts)
    return [texts[i] for i in np.sort(np.random.default_rng(0).permutation(len(texts))[:N_ROWS])]
