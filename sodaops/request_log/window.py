"""Reading a window of the request log: the newest rows or a span of time, part by part, in bounded memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from sodaops.errors import ConfigError, StorageError, some
from sodaops.request_log.parts import SCHEMA, day_of, open_part, part_addresses

_NEEDED = {"time", "request_id", "bundle_id", "label", "score", "text_sha256"}
_COLUMNS = [name for name in SCHEMA.names if name not in ("variant", "latency_ms", "labels")]
_BATCH = 20_000
_SKEW = timedelta(minutes=5)  # a clock may run so far ahead


@dataclass
class Window:
    """Rows of the request log, newest last.

    Attributes:
        rows: the columns of a part that are read; those that a part lacks are null.
        n_found: rows of the span, of which ``rows`` is a sample when they are more.
        ahead: rows whose time lies in the future, left out.
        skipped: parts that could not be read, and why.
    """

    rows: pa.Table
    n_found: int = 0
    ahead: int = 0
    skipped: dict[str, str] = field(default_factory=dict)


def read_window(
    log: str, last: int, since: str | None = None, until: str | None = None, max_rows: int = 100_000,
    now: datetime | None = None,
) -> Window:  # fmt: skip
    """Reads a window.

    Args:
        log: folder or gs:// of the parts.
        last: the newest rows, where neither ``since`` nor ``until`` is given.
        since: ISO 8601, included; UTC unless it says otherwise.
        until: not included.
        max_rows: of a span with more rows, this many at random are kept.
        now: the time; later rows have a clock that is ahead, and are left out.

    Raises:
        ConfigError: a time that cannot be read.
        StorageError: no such log.
    """
    now = now or datetime.now(UTC)
    first, end = _asked("since", since), _asked("until", until)
    if first and end and first >= end:
        raise ConfigError(f"drift.since={since} is not before drift.until={until}.")
    span = first is not None or end is not None
    keeper: _Sample | _Newest = _Sample(max_rows) if span else _Newest(min(last, max_rows))
    window = Window(_empty())
    early, late = first.date() - timedelta(days=1) if first else date.min, end.date() if end else date.max
    paths = [path for path in part_addresses(log) if early <= day_of(path) <= late]  # rows may reach into the next day
    with tqdm(total=len(paths), desc=f"reading {log}", unit="part", delay=2, leave=False, disable=None) as bar:
        for day in sorted({day_of(path) for path in paths}, reverse=True):
            if isinstance(keeper, _Newest) and keeper.has_all(day):
                break
            for path in (path for path in paths if day_of(path) == day):
                for batch in _read(path, window):
                    keeper.add(_within(batch, first, end, now + _SKEW, window))
                bar.update()
    window.rows = keeper.rows().sort_by("time")
    window.n_found = keeper.n_found if isinstance(keeper, _Sample) else len(window.rows)
    return window


def _within(batch: pa.Table, first: datetime | None, end: datetime | None, latest: datetime, window: Window) -> pa.Table:
    """The rows of the span; those later than any clock can be are counted."""
    times = batch["time"]
    ahead = pc.greater(times, pa.scalar(latest, times.type))
    window.ahead += pc.sum(ahead).as_py() or 0
    keep = pc.invert(ahead)
    if first:
        keep = pc.and_(keep, pc.greater_equal(times, pa.scalar(first, times.type)))
    if end:
        keep = pc.and_(keep, pc.less(times, pa.scalar(end, times.type)))
    return batch.filter(keep)


class _Newest:
    """Keeps the newest rows of what it is given."""

    def __init__(self, n: int) -> None:
        self._n, self._table = n, _empty()

    def add(self, batch: pa.Table) -> None:
        """Takes rows in."""
        self._table = pa.concat_tables([self._table, batch])
        if len(self._table) > 2 * self._n:
            self._table = self.rows()

    def has_all(self, day: date) -> bool:
        """Whether no part of this day, whose rows may reach into the next, can hold a newer row."""
        kept = self.rows()
        return len(kept) == self._n and pc.min(kept["time"]).as_py().date() > day + timedelta(days=1)

    def rows(self) -> pa.Table:
        """What is kept."""
        if len(self._table) <= self._n:
            return self._table
        return self._table.take(pc.sort_indices(self._table, [("time", "descending")])[: self._n])


class _Sample:
    """Keeps a uniform sample of what it is given: the rows with the smallest of random keys."""

    def __init__(self, n: int) -> None:
        self._n, self._table, self._keys, self.n_found = n, _empty(), np.empty(0), 0
        self._rng = np.random.default_rng(0)

    def add(self, batch: pa.Table) -> None:
        """Takes rows in."""
        self.n_found += len(batch)
        self._table = pa.concat_tables([self._table, batch])
        self._keys = np.concatenate([self._keys, self._rng.random(len(batch))])
        if len(self._keys) > 2 * self._n:
            self._table, self._keys = self.rows(), np.sort(self._keys)[: self._n]

    def rows(self) -> pa.Table:
        """What is kept."""
        if len(self._keys) <= self._n:
            return self._table
        return self._table.take(np.argsort(self._keys, kind="stable")[: self._n])


def _empty() -> pa.Table:
    return _schema().empty_table()


def _schema() -> pa.Schema:
    time = pa.field("time", pa.timestamp("us", "UTC"))
    return pa.schema([time, *(SCHEMA.field(name) for name in _COLUMNS if name != "time")])


def _read(path: str, window: Window) -> Iterator[pa.Table]:
    """The rows of one part; one that cannot be read is noted, and gives none."""
    try:
        with open_part(path) as file:
            part = pq.ParquetFile(file)
            missing = _NEEDED - set(part.schema_arrow.names)
            if missing:
                window.skipped[path] = f"no part of a request log: without {some(sorted(missing))}"
                return
            names = [name for name in _COLUMNS if name in part.schema_arrow.names]
            for batch in part.iter_batches(_BATCH, columns=names):
                yield _conform(pa.Table.from_batches([batch]))
    except (pa.ArrowException, OSError, StorageError) as error:
        window.skipped[path] = str(error).splitlines()[0][:200]


def _conform(table: pa.Table) -> pa.Table:
    """The columns of today's log; an older part lacks some."""
    columns = [
        table[column.name].cast(column.type) if column.name in table.column_names else pa.nulls(len(table), column.type)
        for column in _schema()
    ]
    return pa.Table.from_arrays(columns, schema=_schema())


def _asked(key: str, text: str | None) -> datetime | None:
    try:
        return time_of(text)
    except ValueError as error:
        raise ConfigError(f"drift.{key}={text!r}: {error}.") from None


def time_of(text: str | None) -> datetime | None:
    """A time as it is asked for.

    Raises:
        ValueError: it is none.

    >>> time_of("2026-11-25T06:00").isoformat()
    '2026-11-25T06:00:00+00:00'
    """
    if text is None:
        return None
    try:
        found = datetime.fromisoformat(text)
        found = (found if found.tzinfo else found.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        found = None
    if found is None or found.year < 1970:
        raise ValueError("expected a time as 2026-11-25 or 2026-11-25T06:00+01:00")
    return found


def by_bundle(rows: pa.Table) -> dict[str, int]:
    """How many rows each bundle answered, most first."""
    counted: Sequence[dict[str, Any]] = pc.value_counts(rows["bundle_id"]).to_pylist()
    return {entry["values"]: entry["counts"] for entry in sorted(counted, key=lambda entry: -entry["counts"])}
