"""Token ids of texts, and batches of texts of similar length within a token budget; without torch."""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

MANY_CUT = 0.05  # share of texts cut at model.max_tokens that causes a warning
_BLOCK = 10_000  # texts tokenised at once: the tokenizer's own objects take fifty times the memory of the arrays


class Tokens(NamedTuple):
    """Token ids of texts: text i has ``ids[offsets[i]:offsets[i + 1]]``."""

    ids: np.ndarray  # int32 [n_tokens]
    offsets: np.ndarray  # int64 [n_texts + 1]
    is_empty: np.ndarray  # bool [n_texts]: only special tokens, or none at all
    is_cut: np.ndarray  # bool [n_texts]: longer than max_tokens

    @property
    def kept(self) -> np.ndarray:
        """The indices of the texts that are not empty, int64."""
        return np.flatnonzero(~self.is_empty)

    @property
    def rows(self) -> list[np.ndarray]:
        """The ids of each text, int32 [n_tokens]."""
        return np.split(self.ids, self.offsets[1:-1])


def tokenise(tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int) -> Tokens:
    """Token ids of cleaned texts, cut at ``max_tokens`` including the special tokens."""
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    n_special = len(tokenizer.encode("").ids)
    tokens, lengths = [np.empty(0, dtype=np.int32)], [np.zeros(1, dtype=np.int64)]
    cut = [np.empty(0, dtype=bool)]
    for first in range(0, len(texts), _BLOCK):
        encodings = tokenizer.encode_batch_fast(list(texts[first : first + _BLOCK]))
        encoded = [encoding.ids for encoding in encodings]
        cut.append(np.array([len(e) == max_tokens and len(e.overflowing) > 0 for e in encodings], dtype=bool))
        lengths.append(np.fromiter(map(len, encoded), dtype=np.int64))
        tokens.append(np.fromiter(chain.from_iterable(encoded), dtype=np.int32))
    n_tokens = np.concatenate(lengths)
    return Tokens(np.concatenate(tokens), np.cumsum(n_tokens), n_tokens[1:] <= n_special, np.concatenate(cut))


def pad(rows: Sequence[np.ndarray], pad_token_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Pads rows of tokens with ``pad_token_id``; returns ids and attention mask, int64 [n, longest] each.

    >>> pad([np.array([5, 6]), np.array([7])], 0)
    (array([[5, 6],
           [7, 0]]), array([[1, 1],
           [1, 0]]))
    """
    longest = max(map(len, rows))
    ids = np.full((len(rows), longest), pad_token_id, dtype=np.int64)
    mask = np.zeros((len(rows), longest), dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return ids, mask


def plan_batches(lengths: np.ndarray, budget: int, rng: np.random.Generator | None) -> list[np.ndarray]:
    """Divides texts into batches of similar length, each of at most ``budget`` tokens with padding.

    The number of batches depends only on the lengths, so it is the same in every epoch.

    Args:
        lengths: tokens of each text, int64 [n_examples]; at most ``budget`` each.
        budget: tokens of a batch, padding included.
        rng: shuffles texts of equal length and the batches; None: always the same order, longest last.

    Returns:
        For each batch the indices of its texts, int64.
    """
    # Shuffle, then sort by length; the sort is stable, so texts of equal length stay shuffled.
    order = np.arange(len(lengths)) if rng is None else rng.permutation(len(lengths))
    order = order[np.argsort(lengths[order], kind="stable")]
    # Start a new batch when the next text, which is the longest so far, would make the padded batch too large.
    batches, first = [], 0
    for end in range(1, len(order) + 1):
        if end == len(order) or (end + 1 - first) * lengths[order[end]] > budget:
            batches.append(order[first:end])
            first = end
    if rng is not None:
        rng.shuffle(batches)
    return batches
