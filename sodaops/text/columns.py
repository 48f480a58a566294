"""Texts of several columns (``data.text_column=[title, body]``), as one string in which a separator stands between the parts.

Splits, hashes, the request log and the annotation store treat such a string as they treat any text. Only what shows,
tokenises or describes a text takes it apart. Cleaning removes the separator from users' texts, and :func:`join` from parts that
are not cleaned yet, so that no text can contain one. A text of one column is itself.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sodaops.errors import DataError, nearest, some

SEPARATOR = "\x1e"  # "record separator", a control character
MAX_COLUMNS = 8


def names_of(text_column: str | Sequence[str]) -> list[str]:
    """The columns that ``data.text_column`` names."""
    return list(text_column) if isinstance(text_column, list | tuple) else [str(text_column)]


def join(parts: Sequence[str]) -> str:
    r"""One string of the parts of a raw text; a single part stays as it is.

    >>> join(["So late", "The train\x1e again"])
    'So late\x1eThe train again'
    """
    return parts[0] if len(parts) == 1 else SEPARATOR.join(part.replace(SEPARATOR, "") for part in parts)


def split(text: str, n_columns: int) -> list[str]:
    """The parts of a text; one that :func:`clean_parts` made empty has as many empty parts.

    Raises:
        DataError: it has another number of parts.
    """
    parts = [text] if n_columns == 1 else text.split(SEPARATOR) if text else [""] * n_columns
    if len(parts) != n_columns:
        raise DataError(f"a text of {len(parts)} parts; expected {n_columns}, joined by sodaops.text.columns.join.")
    return parts


def each(text: str, n_columns: int, change: Callable[[str], str]) -> str:
    """The text with every part changed by a function."""
    return change(text) if n_columns == 1 else join([change(part) for part in split(text, n_columns)])


def clean_parts(text: str, n_columns: int, clean: Callable[[str], str]) -> str:
    r"""Cleans each part of a raw text; the result is empty if no part has anything left.

    >>> clean_parts(" \x1ethe train ", 2, str.strip), clean_parts(" \x1e ", 2, str.strip)
    ('\x1ethe train', '')
    """
    cleaned = each(text, n_columns, clean)
    return cleaned if n_columns == 1 or cleaned.strip(SEPARATOR) else ""


def named(text: str, columns: Sequence[str]) -> str:
    r"""A text for people; of several columns a line for each part.

    >>> named("late\x1ethe train", ["title", "body"])
    'title: late\nbody: the train'
    """
    parts = split(text, len(columns))
    return text if len(columns) == 1 else "\n".join(f"{name}: {part}" for name, part in zip(columns, parts, strict=True))


def text_of(value: Any, columns: Sequence[str], place: str) -> str:
    """The raw text of a caller's value: a string, or for several columns a mapping from column to string.

    Raises:
        DataError: another type, a missing or an unknown column; ``place`` names the text.

    >>> text_of({"title": "late", "bodi": ""}, ["title", "body"], "text 1")
    Traceback (most recent call last):
    sodaops.errors.DataError: text 1: bodi (did you mean body?), body; expected texts for title, body; some may be empty.
    """
    if len(columns) == 1:
        if not isinstance(value, str):
            raise DataError(f"{place}: expected text, got {type(value).__name__}; give a list of texts, or pandas.")
        return value
    value = value if isinstance(value, Mapping) else {type(value).__name__: value}
    wrong = [f"{name}{nearest(name, columns)}" for name in value if name not in columns]
    wrong += [name for name in columns if not isinstance(value.get(name), str)]
    if wrong:
        names = ", ".join(columns)
        raise DataError(f"{place}: {some(wrong)}; expected texts for {names}; some may be empty.")
    return join([value[name] for name in columns])


def text_of_word(word: str, columns: Sequence[str], place: str) -> str:
    """The raw text of a word of the command line or of a line: itself, or for several columns JSON."""
    try:
        return text_of(word if len(columns) == 1 else json.loads(word), columns, place)
    except (ValueError, RecursionError):
        return text_of(word, columns, place)  # raises the error
