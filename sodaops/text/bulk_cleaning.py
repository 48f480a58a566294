"""Cleaning of a column of texts with pyarrow, equal to :func:`sodaops.text.cleaning.clean` text by text."""

import pyarrow as pa
import pyarrow.compute as pc

from sodaops.text.cleaning import cleaner
from sodaops.text.policies import POLICIES

_REFERENCES = {"&lt;": "<", "&gt;": ">", "&quot;": '"', "&#39;": "'"}
_MARK = "\x01"  # stands for the "&" of "&amp;" until all references are resolved: "&amp;lt;" must become "&lt;", not "<"
# Characters that "minimal" removes, and those that are white space to Python but not to RE2, the engine behind pyarrow.
_RARE = (
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x{a0}\x{1680}\x{2000}-\x{200b}\x{2028}\x{2029}\x{202f}\x{205f}\x{2060}\x{3000}\x{feff}]"
)


def clean_many(texts: pa.StringArray, policy: str = "minimal") -> pa.StringArray:
    """Cleans texts by a named policy.

    Args:
        texts: string [n], without nulls.
        policy: as for ``clean``.

    Returns:
        string [n], each equal to ``clean(text, policy)``.

    Raises:
        ConfigError: as by ``clean``.

    >>> clean_many(pa.array(["fine", "a  &lt; b"])).to_pylist()
    ['fine', 'a < b']
    """
    clean_one = cleaner(policy)
    if policy not in POLICIES:
        return pa.array([clean_one(text) for text in texts.to_pylist()], pa.string())
    cleaned, one_by_one = _minimal(texts)
    if policy != "minimal":
        # \w and lower case differ between RE2 and Python outside ASCII, so such texts are cleaned one by one, except those
        # in which "social" finds neither a link nor a handle.
        affected = pc.invert(pc.string_is_ascii(cleaned))
        if policy == "social":
            affected = pc.and_(affected, pc.match_substring_regex(cleaned, r"://|[wW]{3}\.|@"))
        one_by_one = pc.or_(one_by_one, affected)
        cleaned = _social(cleaned) if policy == "social" else _letters(cleaned)
    if pc.any(one_by_one).as_py():
        by_python = [clean_one(text) for text in texts.filter(one_by_one).to_pylist()]
        cleaned = pc.replace_with_mask(cleaned, one_by_one, pa.array(by_python, pa.string()))
    return cleaned


def _minimal(texts: pa.StringArray) -> tuple[pa.StringArray, pa.BooleanArray]:
    """The texts cleaned by "minimal", and which of them need Python instead, bool [n]."""
    one_by_one = pc.match_substring_regex(texts, _RARE)
    # Resolve the five common character references; texts with any other one are left to html.unescape.
    has_reference = pc.match_substring(texts, "&")
    resolved = texts.filter(has_reference)
    for reference, character in {**_REFERENCES, "&amp;": _MARK}.items():
        resolved = pc.replace_substring(resolved, reference, character)
    has_other = pc.replace_with_mask(has_reference, has_reference, pc.match_substring_regex(resolved, "&[#0-9A-Za-z]"))
    texts = pc.replace_with_mask(texts, has_reference, pc.replace_substring(resolved, _MARK, "&"))
    # Collapse white space. A single space is not matched: replacing it by itself would take most of the time.
    texts = pc.replace_substring_regex(texts, r"[ \t\n\r]{2,}|[\t\n\r]", " ")
    return pc.ascii_trim(texts, " "), pc.or_(one_by_one, has_other)


def _social(texts: pa.StringArray) -> pa.StringArray:
    """ "social" of ASCII texts that are cleaned by "minimal"."""
    texts = pc.replace_substring_regex(texts, r"(?i)(?:https?://|www\.)\S+", "http")
    # RE2 has no look-behind. The character before a handle is never part of another match, so it can be captured.
    return pc.replace_substring_regex(texts, r"(^|\W)@\w+", r"\1@user")


def _letters(texts: pa.StringArray) -> pa.StringArray:
    """ "letters" of ASCII texts that are cleaned by "minimal"."""
    texts = pc.replace_substring_regex(pc.ascii_lower(texts), r"(?:https?://|www\.)\S+", " ")
    texts = pc.replace_substring_regex(texts, r"(^|\W)@\w+", r"\1 ")
    # One pass for hashtags and what is no letter: the hashtag is tried first wherever a "#" stands.
    return pc.ascii_trim(pc.replace_substring_regex(texts, r"(?:#\w+|[^a-z])+", " "), " ")
