"""The split of a text, which depends only on the text."""

import hashlib

SPLITS = ("train", "val", "test")


def text_hash(text: str) -> str:
    """SHA-256 of a cleaned text, as 64 hexadecimal digits.

    >>> text_hash("good")[:8]
    '770e6076'
    """
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def assign_split(text: str, fractions: tuple[float, float, float] = (0.7, 0.1, 0.2)) -> str:
    """The split of a cleaned text, from its hash, so that it does not change when the table grows.

    Args:
        text: the cleaned text.
        fractions: shares of train, val and test; they sum to 1.

    Returns:
        ``train``, ``val`` or ``test``.
    """
    position = int(text_hash(text)[:16], 16) / 2**64
    return "train" if position < fractions[0] else "val" if position < fractions[0] + fractions[1] else "test"
