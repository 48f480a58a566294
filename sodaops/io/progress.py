"""Progress of what may take more than two seconds: a bar on a terminal or in Jupyter, elsewhere a line every 30 seconds.

Also the handler that writes the log above the bars.
"""

import contextlib
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, Self

from tqdm import tqdm

INTERVAL_S = 30.0
log = logging.getLogger(__name__)


class ConsoleHandler(logging.Handler):
    """Writes each message as a line on standard error, above any progress bar; warnings and errors name their level."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one message."""
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        try:
            tqdm.write(f"{level}{record.getMessage()}", file=sys.stderr)
            sys.stderr.flush()
        except (OSError, ValueError):  # the terminal is gone
            self.handleError(record)


@contextlib.contextmanager
def shown_log() -> Iterator[None]:
    """Writes the messages of this package to standard error, unless the application has set up logging itself."""
    package = logging.getLogger("sodaops")
    if logging.root.handlers or package.handlers:
        yield
        return
    handler, level = ConsoleHandler(), package.level
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)


def has_bars() -> bool:
    """Whether standard error shows progress bars: it is a terminal, or a cell's output in Jupyter."""
    return sys.stderr.isatty() or type(sys.stderr).__module__.startswith("ipykernel.")


def progress(iterable: Iterable[Any] | None = None, desc: str = "", total: int | None = None, **options: Any) -> "tqdm | Lines":
    """A progress bar if standard error shows one, else :class:`Lines`; both may be iterated, updated and closed.

    Args:
        iterable: what to iterate over; None: ``update`` counts.
        desc: what is done.
        total: the number of units; None: not known, or the iterable's length.
        options: ``unit``, ``unit_scale`` and ``initial``, as tqdm's.
    """
    if has_bars():
        return tqdm(iterable, desc, total, delay=2, leave=False, **options)
    return Lines(iterable, desc, total, **options)


def time_left(seconds: float) -> str:
    """A duration in words.

    >>> time_left(42), time_left(170), time_left(9000)
    ('42 s', '3 min', '2.5 h')
    """
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Lines:
    """Counts as a progress bar does, and logs a line every :data:`INTERVAL_S` seconds."""

    def __init__(
        self, iterable: Iterable[Any] | None, desc: str, total: int | None, unit: str = "row", initial: int = 0,
        unit_scale: bool = False,
    ) -> None:  # fmt: skip
        self._iterable, self._desc, self._initial = iterable, desc, initial
        self._units = unit if unit_scale else f"{unit}s"
        self.total = len(iterable) if total is None and hasattr(iterable, "__len__") else total  # type: ignore[arg-type]
        self.n = initial
        self._start_s = time.monotonic()
        self._next_s = self._start_s + INTERVAL_S

    def update(self, n: int = 1) -> None:
        """Adds n units."""
        self.n += n
        if (now_s := time.monotonic()) >= self._next_s:
            self._next_s = now_s + INTERVAL_S
            rate = (self.n - self._initial) / (now_s - self._start_s)
            left = f", {time_left((self.total - self.n) / rate)} left" if self.total and rate > 0 else ""
            of = f" of {self.total:,}" if self.total else ""
            log.info("%s: %s%s %s, %.3g/s%s", self._desc, f"{self.n:,}", of, self._units, rate, left)

    def close(self) -> None:
        """Nothing is left to do."""

    def __iter__(self) -> Iterator[Any]:
        for item in self._iterable or ():
            yield item
            self.update()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
