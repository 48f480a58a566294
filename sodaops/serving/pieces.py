"""The pieces of a text whose effect on a prediction is explained, and the text without each of them."""

import itertools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from sodaops.text.columns import join, split

_MAX_PIECES = 32


class Piece(NamedTuple):
    """One word, or several words of one column."""

    text: str
    column: str | None  # None: the text has one column only
    rest: str  # the whole text without the piece

    def fields(self, effect: float) -> dict[str, Any]:
        """The fields of an answer."""
        return {"text": self.text, "effect": effect} | ({} if self.column is None else {"column": self.column})


def pieces_of(text: str, columns: Sequence[str], most: int) -> list[Piece]:
    """Divides a text into words, or into pieces of about equal length if it has more than 32 or ``most`` words.

    Args:
        text: cleaned; its columns are joined.
        columns: their names.
        most: number of pieces, which a text of several columns may exceed by one for each further column.

    >>> [piece.text for piece in pieces_of("what a day", ["text"], 2)]
    ['what ', 'a day']
    """
    parts = [re.findall(r"\S+\s*", part) for part in split(text, len(columns))]
    words = [(name, word) for name, part in zip(columns, parts, strict=True) for word in part]
    n_pieces = min(len(words), _MAX_PIECES, most)
    if n_pieces < 1:
        return []
    # Piece i is words[bounds[i]:bounds[i + 1]]; a piece ends where its column does.
    bounds = {len(words) * i // n_pieces for i in range(n_pieces + 1)} | set(itertools.accumulate(map(len, parts)))
    pieces = []
    for start, end in itertools.pairwise(sorted(bounds)):
        rest = [*words[:start], *words[end:]]
        without = join(["".join(word for name, word in rest if name == column).strip() for column in columns])
        column = words[start][0] if len(columns) > 1 else None
        pieces.append(Piece("".join(word for _, word in words[start:end]), column, without))
    return pieces
