"""The errors that a user can cause. Each message names the place, the value, what is allowed, and how to fix it."""

import difflib
import re
from collections.abc import Iterable, Sequence

SHOWN = 5
_ESCAPE_CODE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")  # of a terminal, for colours


class SodaOpsError(Exception):
    """An error that the user can fix. The command line prints its message without a traceback and exits with 2."""

    exit_code = 2


class ConfigError(SodaOpsError):
    """A configuration key or value that is not allowed."""


class DataError(SodaOpsError):
    """A table, a row or a split that cannot be used."""


class ModelError(SodaOpsError):
    """A pretrained model that is missing, damaged or not what was asked for."""


class TrainingError(SodaOpsError):
    """One of several training processes ended early, and the others were stopped."""


class BundleError(SodaOpsError):
    """A bundle that is missing, incomplete or damaged."""


class StorageError(SodaOpsError):
    """A file that could not be read or written."""


class RegistryError(SodaOpsError):
    """A version or an alias that does not exist, or a change by somebody else at the same time."""


class RefusedError(SodaOpsError):
    """A model that did not pass the gate; nothing was changed."""

    exit_code = 3


class AlarmError(SodaOpsError):
    """A rule of the alerts fires."""

    exit_code = 4


class DeliveryError(SodaOpsError):
    """A notification that could not be delivered, or metrics that could not be read."""


class Terminated(KeyboardInterrupt):
    """SIGTERM stopped a run that can be resumed; the message says how. The exit code is 143."""


class PrunedError(SodaOpsError):
    """A trial that was stopped because it was worse than others at the same epoch."""


def nearest(name: object, allowed: Iterable[object]) -> str:
    """A hint with the allowed name that is most like ``name``, or nothing.

    >>> nearest("sentimnt", ["text", "sentiment"])
    ' (did you mean sentiment?)'
    >>> nearest("xyz", ["text", "sentiment"])
    ''
    """
    matches = difflib.get_close_matches(str(name), [str(a) for a in allowed], n=1, cutoff=0.6)
    return f" (did you mean {matches[0]}?)" if matches else ""


def some(items: Sequence[object], shown: int = SHOWN) -> str:
    """The first items of a list, and how many more there are.

    >>> some([1, 2, 3], shown=2)
    '1, 2 and 1 more'
    """
    text = ", ".join(str(item) for item in items[:shown])
    return f"{text} and {len(items) - shown} more" if len(items) > shown else text


def reason_of(error: BaseException) -> str:
    r"""The first line of another library's error, without terminal escape codes.

    >>> reason_of(ValueError("\x1b[96mno such file\x1b[0m\nmore"))
    'no such file'
    """
    lines = _ESCAPE_CODE.sub("", str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def joined(errors: Sequence[SodaOpsError]) -> SodaOpsError:
    """One error for all: of their class if they share one, otherwise a ConfigError.

    >>> print(joined([ConfigError("a=1: expected 2."), ConfigError("b=1: expected 2.")]))
    2 faults:
    - a=1: expected 2.
    - b=1: expected 2.
    """
    if len(errors) == 1:
        return errors[0]
    kinds = {type(error) for error in errors}
    kind = kinds.pop() if len(kinds) == 1 else ConfigError
    return kind(f"{len(errors)} faults:\n- " + "\n- ".join(map(str, errors)))
