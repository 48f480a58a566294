"""Tokens of texts of several columns (:mod:`sodaops.text.columns`), without torch.

Two parts get the token ids that the tokenizer gives a pair. More parts continue its pattern: ``[CLS] a [SEP] b [SEP] c [SEP]``.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tokenizers import Encoding, Tokenizer

from sodaops.errors import ConfigError, ModelError
from sodaops.text.columns import SEPARATOR, split

_SEPARATORS = ("[SEP]", "</s>", "<sep>", "<|endoftext|>")  # for tokenizers that join a pair without any


class Template(NamedTuple):
    """The special tokens of a pair."""

    start: list[int]
    between: list[int]
    end: list[int]
    separator: int | None  # tokens up to the first one with this id have token type 0, later ones 1; None: other types


def template_of(tokenizer: Tokenizer) -> Template:
    """The template of a tokenizer, whose truncation is turned off.

    Raises:
        ModelError: it has no separator token.
    """
    tokenizer.no_truncation()
    word = next(word for word in ("a", *tokenizer.get_vocab()) if tokenizer.encode(word, add_special_tokens=False).ids)
    pair, single = tokenizer.encode(word, word), tokenizer.encode(word)
    n_word = len(tokenizer.encode(word, add_special_tokens=False).ids)
    first, second = pair.sequence_ids.index(0), pair.sequence_ids.index(1)
    between = pair.ids[first + n_word : second]
    known = [i for i in map(tokenizer.token_to_id, _SEPARATORS) if i is not None]
    joined = between or single.ids[single.sequence_ids.index(0) + n_word :][:1] or known[:1]
    if not joined:
        raise ModelError(
            f"model.name_or_path: the tokenizer has no separator token ({', '.join(_SEPARATORS)}), which several text columns "
            "need; choose another model, or join the columns in the table."
        )
    n_zeros = first + n_word + 1
    has_types = between and pair.type_ids == [0] * n_zeros + [1] * (len(pair.ids) - n_zeros)
    return Template(pair.ids[:first], joined, pair.ids[second + n_word :], between[0] if has_types else None)


class PartsTokenizer:
    """Tokenises texts of several columns.

    Args:
        tokenizer: its truncation is set, and special tokens in texts become plain text, so that no text can end a part.
        n_columns: number of parts of each text.
        max_tokens: of a text, special tokens included. The longest part is cut first, as ``longest_first`` of tokenizers does.

    Raises:
        ModelError: no separator token.
        ConfigError: there is no room for a token of each part.
    """

    def __init__(self, tokenizer: Tokenizer, n_columns: int, max_tokens: int) -> None:
        tokenizer.encode_special_tokens = True
        self._template = template_of(tokenizer)
        self._tokenizer, self._n_columns = tokenizer, n_columns
        start, between, end, _ = self._template
        self.n_special = len(start) + (n_columns - 1) * len(between) + len(end)
        self._room = max_tokens - self.n_special
        if self._room < n_columns:
            raise ConfigError(
                f"model.max_tokens={max_tokens}: {self.n_special} special tokens leave no room for {n_columns} text columns; "
                f"set it to {self.n_special + n_columns} or more."
            )
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_tokens)

    def encode(self, texts: Sequence[str]) -> Iterator[tuple[list[int], bool]]:
        """The token ids of cleaned texts, and whether each was cut."""
        start, between, end, _ = self._template
        for parts in self._parts(self._tokenizer.encode_batch_fast(self._split(texts), add_special_tokens=False)):
            lengths = _lengths(parts)
            kept = kept_lengths(lengths, self._room)
            ids = [*start]
            for i, (part, n_tokens) in enumerate(zip(parts, kept, strict=True)):
                ids += [*(between if i else ()), *part.ids[:n_tokens]]
            yield [*ids, *end], kept != lengths

    def within_limit(self, text: str) -> str:
        """What is left of a cleaned text when its parts are cut."""
        whole = self._split([text])
        (parts,) = self._parts(self._tokenizer.encode_batch(whole, add_special_tokens=False))
        kept = kept_lengths(_lengths(parts), self._room)
        ends = [max((end for _, end in part.offsets[:n]), default=0) for part, n in zip(parts, kept, strict=True)]
        return SEPARATOR.join(part[:end] for part, end in zip(whole, ends, strict=True))

    def _split(self, texts: Sequence[str]) -> list[str]:
        return [part for text in texts for part in split(text, self._n_columns)]

    def _parts(self, encodings: Sequence[Encoding]) -> Iterator[Sequence[Encoding]]:
        return (encodings[i : i + self._n_columns] for i in range(0, len(encodings), self._n_columns))


def _lengths(parts: Sequence[Encoding]) -> list[int]:
    """Tokens of each part before the tokenizer's own truncation."""
    return [len(part.ids) + sum(len(rest.ids) for rest in part.overflowing) for part in parts]


def kept_lengths(lengths: Sequence[int], room: int) -> list[int]:
    """How many tokens of each part are kept, so that they fit into ``room``; the longest parts are cut, to equal lengths.

    >>> kept_lengths([3, 9, 20], 18), kept_lengths([9, 8], 5), kept_lengths([2, 3], 5)
    ([3, 7, 8], [3, 2], [2, 3])
    """
    kept = list(lengths)
    for n_left, i in zip(range(len(kept), 0, -1), sorted(range(len(kept)), key=lambda i: (lengths[i], i)), strict=True):
        kept[i] = min(lengths[i], room // n_left)  # the shortest first, so that what it leaves is the others'
        room -= kept[i]
    return kept
