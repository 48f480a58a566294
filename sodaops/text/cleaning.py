"""Text cleaning by named policies, the same in training, evaluation and serving.

A policy is a pure function from a raw string to a clean one. A bundle stores the name of its policy.
"""

import html
import re

from sodaops.errors import ConfigError, nearest

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u2060\ufeff\ud800-\udfff]")
_SPACE = re.compile(r"\s+")
_ZEROS = re.compile(r"&#0+(?=[0-9])")  # html.unescape fails for more than 4,300 digits
_NO_CHARACTER = re.compile(r"&#[1-9][0-9]{7,};?")
_LINK = re.compile(r"(?:https?://|www\.)\S+", re.IGNORECASE)
_HANDLE = re.compile(r"(?<!\w)@\w+")
_HASHTAG = re.compile(r"#\w+")
_NOT_LETTER = re.compile(r"[\W\d_]+")


def _minimal(text: str) -> str:
    if "&" in text:
        text = html.unescape(_NO_CHARACTER.sub("\ufffd", _ZEROS.sub("&#", text)))
    return _SPACE.sub(" ", _CONTROL.sub("", text)).strip()


def _social(text: str) -> str:
    return _HANDLE.sub("@user", _LINK.sub("http", _minimal(text)))


def _letters(text: str) -> str:
    text = _LINK.sub(" ", _minimal(text).lower())
    return _NOT_LETTER.sub(" ", _HASHTAG.sub(" ", _HANDLE.sub(" ", text))).strip()


POLICIES = {"minimal": _minimal, "social": _social, "letters": _letters}


def clean(text: str, policy: str = "minimal") -> str:
    """Cleans one text by a named policy.

    Args:
        text: any string, lone surrogates included.
        policy: ``minimal`` (HTML entities, white space, control characters), ``social`` (also links to ``http``
            and handles to ``@user``), or ``letters`` (lower case; without links, handles, hashtags and non-letters).

    Returns:
        The clean text, without surrounding or doubled white space; possibly empty.

    Raises:
        ConfigError: an unknown policy.

    >>> clean("So  &lt;3 this\\t@ann http://t.co/x #win!")
    'So <3 this @ann http://t.co/x #win!'
    >>> clean("So  &lt;3 this\\t@ann http://t.co/x #win!", "social")
    'So <3 this @user http #win!'
    >>> clean("So  &lt;3 this\\t@ann http://t.co/x #win!", "letters")
    'so this'
    """
    if policy not in POLICIES:
        raise ConfigError(f"data.cleaning={policy!r}; expected one of {', '.join(POLICIES)}{nearest(policy, POLICIES)}.")
    return POLICIES[policy](text)
