"""The named policies of text cleaning. An export for transformers contains a copy, so this module imports no other of ours."""

import html
import re

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u2060\ufeff\ud800-\udfff]")
_SPACE = re.compile(r"\s+")
_ZEROS = re.compile(r"&#0+(?=[0-9])")  # html.unescape fails for more than 4,300 digits
_NO_CHARACTER = re.compile(r"&#[1-9][0-9]{7,};?")
_LINK = re.compile(r"(?:https?://|www\.)\S+", re.IGNORECASE)
_HANDLE = re.compile(r"(?<!\w)@\w+")
_HASHTAG = re.compile(r"#\w+")
_NOT_LETTER = re.compile(r"[\W\d_]+")


def tidy(text: str) -> str:
    """Without control characters, lone surrogates, and surrounding or doubled white space."""
    return _SPACE.sub(" ", _CONTROL.sub("", text)).strip()


def _minimal(text: str) -> str:
    if "&" in text:
        text = html.unescape(_NO_CHARACTER.sub("\ufffd", _ZEROS.sub("&#", text)))
    return tidy(text)


def _social(text: str) -> str:
    return _HANDLE.sub("@user", _LINK.sub("http", _minimal(text)))


def _letters(text: str) -> str:
    text = _LINK.sub(" ", _minimal(text).lower())
    return _NOT_LETTER.sub(" ", _HASHTAG.sub(" ", _HANDLE.sub(" ", text))).strip()


POLICIES = {"minimal": _minimal, "social": _social, "letters": _letters}
