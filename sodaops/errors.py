"""The errors that a user can cause. Each names the place, the value, what is allowed, and the mend."""

import difflib
from collections.abc import Iterable, Sequence

SHOWN = 5


class SodaOpsError(Exception):
    """A fault that its message lets a user mend. The command line prints it without a traceback and exits with 2."""

    exit_code = 2


class ConfigError(SodaOpsError):
    """A configuration key or value that is not allowed."""


class DataError(SodaOpsError):
    """A table, a row or a split that cannot be used."""


class ModelError(SodaOpsError):
    """A pretrained model that is missing, damaged or not what was asked for."""


class TrainingError(SodaOpsError):
    """A process of a training that ended early, and took the others with it."""


class BundleError(SodaOpsError):
    """A bundle that is missing, incomplete or damaged."""


class StorageError(SodaOpsError):
    """A file that could not be read or written."""


class RegistryError(SodaOpsError):
    """A version or an alias that is not there, or somebody who was faster."""


class RefusedError(SodaOpsError):
    """A model that the gate did not let through; nothing has changed."""

    exit_code = 3


class AlarmError(SodaOpsError):
    """A rule of the alerts fires."""

    exit_code = 4


class DeliveryError(SodaOpsError):
    """A notification that somebody did not take, or metrics that did not come."""


class Terminated(KeyboardInterrupt):
    """SIGTERM stopped it at a place from which it can go on; the message says how. The exit code is 143."""


class PrunedError(SodaOpsError):
    """A trial that was stopped since it did worse than others at the same epoch."""


def nearest(name: object, allowed: Iterable[object]) -> str:
    """A hint with the allowed name that is most like ``name``, or nothing.

    >>> nearest("sentimnt", ["text", "sentiment"])
    ' (did you mean sentiment?)'
    >>> nearest("xyz", ["text", "sentiment"])
    ''
    """
    found = difflib.get_close_matches(str(name), [str(a) for a in allowed], n=1, cutoff=0.6)
    return f" (did you mean {found[0]}?)" if found else ""


def some(items: Sequence[object], shown: int = SHOWN) -> str:
    """The first items of a list, and how many more there are.

    >>> some([1, 2, 3], shown=2)
    '1, 2 and 1 more'
    """
    text = ", ".join(str(item) for item in items[:shown])
    return f"{text} and {len(items) - shown} more" if len(items) > shown else text
