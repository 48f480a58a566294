"""How many tokens of a text a model reads."""

from typing import NamedTuple


class Limit(NamedTuple):
    """The tokens of a text that a model reads; the rest is cut.

    With ``max_windows``, a text is read in windows of ``max_tokens`` tokens, each with the special tokens. All but the last
    window are full, and each begins with the last ``stride`` tokens of the window before it.
    """

    max_tokens: int  # of a text, or of a window; special tokens included
    stride: int = 0
    max_windows: int | None = None  # None: a text is cut at max_tokens

    def __str__(self) -> str:
        tokens = f"{self.max_tokens} tokens"
        return tokens if self.max_windows is None else f"{self.max_windows} windows of {tokens}"

    def n_windows(self, n_tokens: int) -> int:
        """The windows of a text with so many tokens in all of them, of which special and shared ones count repeatedly.

        >>> Limit(128, max_windows=8).n_windows(300)
        3
        """
        return -(-n_tokens // self.max_tokens)
