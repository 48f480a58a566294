"""Token ids of texts, and batches of texts of similar length within a token budget; without torch."""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from sodaops.data.pairs import PartsTokenizer
from sodaops.text.columns import SEPARATOR
from sodaops.text.limit import Limit

MANY_CUT = 0.05  # share of cut texts that causes a warning
_BLOCK = 10_000  # texts tokenised at once: the tokenizer's own objects take fifty times the memory of the arrays


class Tokens(NamedTuple):
    """Token ids of texts: text i has ``ids[offsets[i]:offsets[i + 1]]``, its windows one after the other."""

    ids: np.ndarray  # int32 [n_tokens]
    offsets: np.ndarray  # int64 [n_texts + 1]
    is_empty: np.ndarray  # bool [n_texts]: only special tokens, or none at all
    is_cut: np.ndarray  # bool [n_texts]: longer than the limit

    @property
    def kept(self) -> np.ndarray:
        """The indices of the texts that are not empty, int64."""
        return np.flatnonzero(~self.is_empty)

    @property
    def rows(self) -> list[np.ndarray]:
        """The ids of each text, int32 [n_tokens]."""
        return np.split(self.ids, self.offsets[1:-1])


def set_limit(tokenizer: Tokenizer, limit: Limit) -> None:
    """Makes a tokenizer cut texts, without padding."""
    tokenizer.no_padding()
    tokenizer.enable_truncation(limit.max_tokens, stride=limit.stride)


def ids_of(encoding: Encoding, limit: Limit) -> list[int]:
    """The token ids of a text from a tokenizer with this limit; of its windows one after the other."""
    if limit.max_windows is None or len(encoding) < limit.max_tokens:
        return encoding.ids
    return list(chain(encoding.ids, *(window.ids for window in encoding.overflowing[: limit.max_windows - 1])))


def tokenise(tokenizer: Tokenizer, texts: Sequence[str], limit: Limit) -> Tokens:
    """Token ids of cleaned texts within a limit."""
    n_columns = 1 + max((text.count(SEPARATOR) for text in texts), default=0)
    parts = PartsTokenizer(tokenizer, n_columns, limit.max_tokens) if n_columns > 1 else None
    set_limit(tokenizer, limit)
    n_special = parts.n_special if parts else len(tokenizer.encode("").ids)
    tokens, lengths = [np.empty(0, dtype=np.int32)], [np.zeros(1, dtype=np.int64)]
    cut = [np.empty(0, dtype=bool)]
    for first in range(0, len(texts), _BLOCK):
        block = list(texts[first : first + _BLOCK])
        if parts:
            encoded, is_cut = map(list, zip(*parts.encode(block), strict=True))
        else:
            encodings, n_read = tokenizer.encode_batch_fast(block), limit.max_windows or 1
            encoded = [ids_of(encoding, limit) for encoding in encodings]
            is_cut = [len(e) == limit.max_tokens and len(e.overflowing) >= n_read for e in encodings]
        cut.append(np.array(is_cut, dtype=bool))
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


def batch_inputs(rows: Sequence[np.ndarray], pad_token_id: int, limit: Limit) -> dict[str, np.ndarray]:
    """The model's inputs for texts, by name.

    Args:
        rows: token ids of each text, int [n_tokens], as :func:`ids_of` gives them; at least one.
        pad_token_id: the token that pads.
        limit: of the texts.

    Returns:
        input_ids and attention_mask, int64 [n_rows, longest], a row for each text; or a row for each window, and windows,
        int64 [n_texts, most windows of a text], the rows of each text, followed by -1.

    >>> batch_inputs([np.array([5, 6, 7]), np.array([8])], 0, Limit(2, max_windows=4))["windows"].tolist()
    [[0, 1], [2, -1]]
    """
    if limit.max_windows is None:
        input_ids, attention_mask = pad(rows, pad_token_id)
        return {"input_ids": input_ids, "attention_mask": attention_mask}
    width, n_windows = limit.max_tokens, np.array([limit.n_windows(len(row)) for row in rows])
    cut = [row[first : first + width] for row in rows for first in range(0, len(row), width)]
    windows = np.full((len(rows), n_windows.max()), -1, dtype=np.int64)
    windows[np.arange(n_windows.max()) < n_windows[:, None]] = np.arange(len(cut))  # row by row
    return {**batch_inputs(cut, pad_token_id, Limit(width)), "windows": windows}


def padded_lengths(offsets: np.ndarray, limit: Limit) -> np.ndarray:
    """Tokens of each text, int64 [n_texts], those of a text in several windows with the padding of its last one.

    >>> padded_lengths(np.array([0, 5, 15]), Limit(8, max_windows=4)).tolist()
    [5, 16]
    """
    lengths, width = np.diff(offsets), limit.max_tokens
    return np.where(lengths > width, -(-lengths // width) * width, lengths)


def plan_batches(lengths: np.ndarray, budget: int, rng: np.random.Generator | None) -> list[np.ndarray]:
    """Divides texts into batches of similar length, each of at most ``budget`` tokens with padding.

    A text with more tokens is a batch of its own.

    The number of batches depends only on the lengths, so it is the same in every epoch.

    Args:
        lengths: tokens of each text, int64 [n_examples].
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
