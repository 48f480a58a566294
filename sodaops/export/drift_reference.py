"""The drift reference of a bundle, computed from its own answers to its training and validation texts."""

from collections.abc import Sequence

import numpy as np

from sodaops.bundle.reference import Axes, Reference
from sodaops.inference.predictor import Predictor

N_ROWS = 2000  # texts of each split, at most
N_AXES = 32  # axes of a sketch, at most


def make_reference(predictor: Predictor, train: Sequence[str], val: Sequence[str]) -> Reference:
    """Makes the reference of a bundle from what it says of its own texts.

    Args:
        predictor: the bundle.
        train: cleaned texts that it has learned from; at most :data:`N_ROWS` are taken, always the same ones.
        val: cleaned texts that it has not learned from.
    """
    sampled = [_sample(train), _sample(val)]
    every = [*sampled[0], *sampled[1]]
    seen = np.arange(len(every)) < len(sampled[0])
    places, outputs = zip(*predictor.batches(every), strict=True)
    order = np.argsort(np.concatenate(places))
    probs, embeddings = (np.concatenate(side)[order] for side in zip(*outputs, strict=True))
    axes = _fit_axes(embeddings[seen])
    return Reference(
        descriptors=np.array([predictor.descriptors(text, predictor.encode(text)) for text in every], dtype=np.float32),
        seen=seen,
        label_ids=probs.argmax(1).astype(np.int16),
        scores=probs.max(1),
        sketches=axes.sketch(embeddings).astype(np.float16),
        center=axes.center,
        axes=axes.axes,
    )


def _fit_axes(embeddings: np.ndarray) -> Axes:
    """Principal axes of embeddings float32 [n_texts, hidden_size], those without variance left out."""
    center = embeddings.mean(axis=0)
    _, spread, directions = np.linalg.svd(embeddings - center, full_matrices=False)
    n_axes = min(N_AXES, int((spread > 1e-4 * max(spread[0], 1e-12)).sum()))
    scale = np.sqrt(len(embeddings)) / spread[:n_axes]
    return Axes(center.astype(np.float32), (directions[:n_axes].T * scale).astype(np.float32))


def _sample(texts: Sequence[str]) -> list[str]:
    if len(texts) <= N_ROWS:
        return list(texts)
    return [texts[i] for i in np.sort(np.random.default_rng(0).permutation(len(texts))[:N_ROWS])]
