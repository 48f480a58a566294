"""Cleaning of many texts at once, equal to :func:`sodaops.text.clean` text by text.

Most texts come out of a policy as they went in, or change in a way that Arrow or NumPy can do for all of them together. A
pattern finds the others, and only those go through the Python function. The pattern may find too many, never too few.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sodaops.text import clean

# What the first step of every policy, "minimal", could change: spaces at the ends or doubled, character references, and
# characters that are white space to Python (RE2's \s is ASCII alone) or are taken out.
_UNCLEAN = (
    r"\A | \z|  |&[#0-9A-Za-z]|[\x00-\x1f\x7f-\x{a0}\x{1680}\x{2000}-\x{200b}\x{2028}\x{2029}\x{202f}\x{205f}\x{2060}"
    r"\x{3000}\x{feff}]"
)
_LINK_HINT = r"://|[wW]{3}\."
_LINK = r"(?i)(?:https?://|www\.)\S+"
_LETTERS = np.full(256, ord(" "), np.uint8)  # byte -> the letter in lower case, or a space
_LETTERS[ord("a") : ord("z") + 1] = _LETTERS[ord("A") : ord("Z") + 1] = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)


def clean_many(texts: pa.StringArray, policy: str = "minimal") -> pa.StringArray:
    """Cleans texts by a named policy.

    Args:
        texts: string [n], without nulls.
        policy: one of :data:`sodaops.text.POLICIES`.

    Returns:
        string [n], each equal to ``clean(text, policy)``.

    Raises:
        ConfigError: an unknown policy.

    >>> clean_many(pa.array(["fine", "a  &lt; b"])).to_pylist()
    ['fine', 'a < b']
    """
    clean("", policy)  # says what is wrong with the policy
    step, alone = _STEPS[policy], _found(texts, _UNCLEAN)
    if step is not None:
        touched = _found(texts, step.hint)
        alone |= touched & ~pc.string_is_ascii(texts).to_numpy(zero_copy_only=False)
        texts = _changed(texts, touched & ~alone, step.apply)
    return _changed(texts, alone, lambda some: pa.array([clean(text, policy) for text in some.to_pylist()], pa.string()))


def flat(texts: pa.StringArray) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of an array of texts, not copied.

    Args:
        texts: string [n], without nulls.

    Returns:
        offsets, int32 [n + 1]: text i is ``data[offsets[i]:offsets[i + 1]]``; and data, uint8, UTF-8.
    """
    if len(texts) == 0:
        return np.zeros(1, np.int32), np.zeros(0, np.uint8)
    _, offsets, data = texts.buffers()
    used = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    return used, np.frombuffer(data, np.uint8) if data is not None and data.size else np.zeros(0, np.uint8)


def _found(texts: pa.StringArray, pattern: str) -> np.ndarray:
    return pc.match_substring_regex(texts, pattern).to_numpy(zero_copy_only=False).copy()


def _changed(texts: pa.StringArray, where: np.ndarray, change: Callable[[pa.StringArray], pa.StringArray]) -> pa.StringArray:
    if not where.any():
        return texts
    if where.all():
        return change(texts)
    mask = pa.array(where)
    return pc.replace_with_mask(texts, mask, change(texts.filter(mask)))


def _replaced(texts: pa.StringArray, hint: str, pattern: str, by: str) -> pa.StringArray:
    return _changed(texts, _found(texts, hint), lambda some: pc.replace_substring_regex(some, pattern, by))


def _social(texts: pa.StringArray) -> pa.StringArray:
    """The second step of ``social``, for ASCII texts that the first leaves as they are."""
    return _replaced(_replaced(texts, _LINK_HINT, _LINK, "http"), "@", r"(^|\W)@\w+", r"\1@user")


def _letters(texts: pa.StringArray) -> pa.StringArray:
    """The second step of ``letters``, for ASCII texts that the first leaves as they are."""
    texts = _replaced(texts, _LINK_HINT, _LINK, " ")
    texts = _replaced(texts, "@", r"(?:^|\W)@\w+", " ")  # what stands before the handle becomes a space in any case
    texts = _replaced(texts, "#", r"#\w+", " ")
    offsets, data = flat(texts)
    letters = _LETTERS[data[offsets[0] : offsets[-1]]]
    keep = letters != ord(" ")
    keep[1:] |= keep[:-1].copy()  # the first space of each run; those at the ends go last
    before = np.concatenate([np.zeros(1, np.int32), np.cumsum(keep, dtype=np.int32)])
    buffers = [None, pa.py_buffer(before[offsets - offsets[0]]), pa.py_buffer(letters[keep])]
    return pc.ascii_trim(pa.Array.from_buffers(pa.string(), len(texts), buffers), " ")


@dataclass(frozen=True)
class _Step:
    """What a policy does after "minimal"."""

    hint: str  # finds every text that it could change
    apply: Callable[[pa.StringArray], pa.StringArray]  # to ASCII texts


_STEPS = {
    "minimal": None,
    "social": _Step(_LINK_HINT + r"|@[0-9A-Za-z_]|@[^\x00-\x7f]", _social),
    "letters": _Step("", _letters),
}
