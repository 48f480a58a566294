"""Cleaning of many texts at once, equal to :func:`sodaops.text.cleaning.clean` text by text.

ASCII texts are changed all together, as bytes in a row. Of the others, a pattern finds those that a policy may change, perhaps
too many, never too few; they go through the Python function, as do ASCII texts with what is rare.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sodaops.text.byte_rows import SPACE, ByteRows
from sodaops.text.cleaning import clean

# What "minimal" could change in a text that is not ASCII: spaces at the ends or doubled, character references, and characters
# that are white space to Python (RE2's \s is ASCII alone) or are taken out; and what "social" could.
_UNCLEAN = (
    r"\A | \z|  |&[#0-9A-Za-z]|[\x00-\x1f\x7f-\x{a0}\x{1680}\x{2000}-\x{200b}\x{2028}\x{2029}\x{202f}\x{205f}\x{2060}"
    r"\x{3000}\x{feff}]"
)
_CHANGED = {"minimal": _UNCLEAN, "social": _UNCLEAN + r"|://|[wW]{3}\.|@[0-9A-Za-z_]|@[^\x00-\x7f]", "letters": ""}
_ROWS, _BYTES = 8192, 2**20  # at a time, at most: what is made of them stays in a core's cache, and small
_LETTERS = np.array([ord(c.lower()) if (c := chr(i)).isalpha() and i < 128 else SPACE for i in range(256)], np.uint8)


def clean_many(texts: pa.StringArray, policy: str = "minimal") -> pa.StringArray:
    """Cleans texts by a named policy.

    Args:
        texts: string [n], without nulls.
        policy: one of :data:`sodaops.text.cleaning.POLICIES`.

    Returns:
        string [n], each equal to ``clean(text, policy)``.

    Raises:
        ConfigError: an unknown policy.

    >>> clean_many(pa.array(["fine", "a  &lt; b"])).to_pylist()
    ['fine', 'a < b']
    """
    clean("", policy)  # says what is wrong with the policy
    step = max(1, min(_ROWS, len(texts) * _BYTES // max(1, texts.nbytes)))
    parts = [_clean_part(texts.slice(start, step), policy) for start in range(0, len(texts), step)]
    return pa.concat_arrays(parts) if parts else texts


def _clean_part(texts: pa.StringArray, policy: str) -> pa.StringArray:
    alone = ~pc.string_is_ascii(texts).to_numpy(zero_copy_only=False)
    alone[alone] = pc.match_substring_regex(texts.filter(pa.array(alone)), _CHANGED[policy]).to_numpy(zero_copy_only=False)
    rows = ByteRows(texts)
    alone |= rows.with_control() | rows.resolve_references()
    if policy == "letters":
        rows.blank(rows.links())
        rows.blank(rows.tags(b"@#"))
        rows.data = np.take(_LETTERS, rows.data)
    rows.collapse_spaces()
    if policy == "social":
        alone |= rows.put(b"http", rows.links())
        alone |= rows.put(b"@user", rows.tags(b"@"))
    cleaned = rows.array()
    if alone.any():
        mask = pa.array(alone)
        cleaned = pc.replace_with_mask(
            cleaned, mask, pa.array([clean(text, policy) for text in texts.filter(mask).to_pylist()], pa.string())
        )
    return cleaned
