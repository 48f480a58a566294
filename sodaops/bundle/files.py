"""Reading the files of a bundle, which may come from anyone: regular files of a limited size, and one class of errors."""

import contextlib
import json
import math
import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from sodaops.errors import BundleError

FIX = "copy the bundle again or train again."


def open_regular(file: Path, max_bytes: int) -> BufferedReader:
    """Opens a regular file; neither follows a symbolic link nor waits for a FIFO.

    Raises:
        FileNotFoundError: there is none.
        BundleError: it is something else than a regular file, too large, or not readable.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        _check(file, os.lstat(file), max_bytes)  # before opening, which may have an effect on a device
        opened = os.fdopen(os.open(file, flags), "rb")
        _check(file, os.fstat(opened.fileno()), max_bytes)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(file) from None
    except OSError as error:
        raise BundleError(f"{file}: cannot be read ({error.strerror}); check the access.") from error
    return opened


def _check(file: Path, status: os.stat_result, max_bytes: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{file}: not a regular file; {FIX}")
    if status.st_size > max_bytes:
        raise BundleError(f"{file}: {status.st_size} bytes; expected at most {max_bytes}; {FIX}")


def parse_json(content: bytes) -> dict[str, Any]:
    """The object in a JSON text in UTF-8.

    Raises:
        ValueError: no JSON object, or a number that is not finite.
        RecursionError: too deeply nested.
    """
    value = json.loads(content.decode(), parse_constant=_finite, parse_float=_finite)
    if not isinstance(value, dict):
        raise ValueError("expected an object")
    return value


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text} is not a finite number")
    return float(text)


@contextlib.contextmanager
def parsing(place: str | Path, fix: str = FIX) -> Iterator[None]:
    """Turns whatever is raised into a BundleError about ``place``; a panic in Rust, for example, is no Exception.

    >>> with parsing("tokenizer.json"):
    ...     raise RecursionError("too deep")
    Traceback (most recent call last):
    sodaops.errors.BundleError: tokenizer.json: cannot be used (too deep); copy the bundle again or train again.
    """
    try:
        yield
    except (BundleError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise BundleError(f"{place}: cannot be used ({printable(reason)}); {fix}") from error


def printable(text: str) -> str:
    """A text from a bundle for a message: one short line without control characters.

    >>> printable("a\\x1b[31m")
    'a�[31m'
    """
    return "".join(character if character.isprintable() else "\ufffd" for character in text[:200])
