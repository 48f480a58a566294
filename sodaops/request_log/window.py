"""Reads a window of the request log, the newest rows or a span of time, part by part in bounded memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sodaops.errors import ConfigError, StorageError, some
from sodaops.io.progress import progress
from sodaops.request_log.parts import PART, SCHEMA, day_of, open_part, part_addresses
from sodaops.text.columns import SEPARATOR

_REQUIRED = {"time", "request_id", "bundle_id", "label", "score", "text_sha256"}
_SCHEMA = pa.schema(
    [
        pa.field("time", pa.timestamp("us", "UTC")) if field.name == "time" else field
        for field in SCHEMA if field.name not in ("variant", "latency_ms", "labels")
    ]
)  # fmt: skip
_BATCH_ROWS = 20_000
_MAX_SKEW = timedelta(minutes=5)  # by which a server's clock may be ahead


@dataclass
class Window:
    """Rows of the request log, newest last.

    Attributes:
        rows: the columns that drift checks and annotation read; columns that a part lacks are null.
        n_found: number of rows in the window; ``rows`` is a sample of them when they exceed ``max_rows``.
        ahead: number of rows left out because their time lies in the future.
        skipped: parts that could not be read -> why.
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
        log: folder or gs:// address of the parts.
        last: number of newest rows, if neither ``since`` nor ``until`` is given.
        since: start of the span, ISO 8601, inclusive; in UTC unless it has an offset.
        until: end of the span, exclusive.
        max_rows: a longer span is sampled at random down to this many rows.
        now: the current time; later rows are left out, since their clock was wrong.

    Raises:
        ConfigError: a time cannot be parsed, or the span is empty.
        StorageError: there is no such log.
    """
    now = now or datetime.now(UTC)
    start, end = _parse_option("since", since), _parse_option("until", until)
    if start and end and start >= end:
        raise ConfigError(f"drift.since={since} is not before drift.until={until}.")
    is_span = start is not None or end is not None
    keeper, rng = _Smallest(max_rows if is_span else min(last, max_rows)), np.random.default_rng(0)
    window = Window(_SCHEMA.empty_table())
    # A part lies under the day of its first row, and its last rows may be of the next day.
    first_day, last_day = start.date() - timedelta(days=1) if start else date.min, end.date() if end else date.max
    paths = [path for path in part_addresses(log) if first_day <= day_of(path) <= last_day]
    with progress(total=len(paths), desc=f"reading {log}", unit="part") as bar:
        for day in sorted({day_of(path) for path in paths}, reverse=True):
            if not is_span and keeper.is_complete(day):
                break
            for path in (path for path in paths if day_of(path) == day):
                for batch in _read_part(path, window):
                    rows = _select(batch, start, end, now + _MAX_SKEW, window)
                    # Random keys make a uniform sample of the span; ages as keys keep the newest rows.
                    ages = -rows["time"].cast(pa.int64()).to_numpy().astype(float)
                    keeper.add(rows, rng.random(len(rows)) if is_span else ages)
                bar.update()
    window.rows = keeper.rows().sort_by("time")
    window.n_found = keeper.n_added if is_span else len(window.rows)
    return window


def _select(batch: pa.Table, start: datetime | None, end: datetime | None, latest: datetime, window: Window) -> pa.Table:
    """The rows of the span; rows later than ``latest`` are left out and counted."""
    times = batch["time"]
    ahead = pc.greater(times, pa.scalar(latest, times.type))
    window.ahead += pc.sum(ahead).as_py() or 0
    keep = pc.invert(ahead)
    if start:
        keep = pc.and_(keep, pc.greater_equal(times, pa.scalar(start, times.type)))
    if end:
        keep = pc.and_(keep, pc.less(times, pa.scalar(end, times.type)))
    return batch.filter(keep)


class _Smallest:
    """Keeps the ``n`` rows with the smallest keys, in bounded memory."""

    def __init__(self, n: int) -> None:
        self._n, self._table, self._keys, self.n_added = n, _SCHEMA.empty_table(), np.empty(0), 0

    def add(self, batch: pa.Table, keys: np.ndarray) -> None:
        """Adds rows with their keys, float64 [n_rows]."""
        self.n_added += len(batch)
        self._table = pa.concat_tables([self._table, batch])
        self._keys = np.concatenate([self._keys, keys])
        if len(self._keys) > 2 * self._n:
            self.rows()

    def rows(self) -> pa.Table:
        """The rows kept."""
        if len(self._keys) > self._n:
            kept = np.argsort(self._keys, kind="stable")[: self._n]
            self._table, self._keys = self._table.take(kept), self._keys[kept]
        return self._table

    def is_complete(self, day: date) -> bool:
        """Whether no part of ``day``, with rows of that day and the next, can hold a newer row than those kept."""
        rows = self.rows()
        return len(rows) == self._n and pc.min(rows["time"]).as_py().date() > day + timedelta(days=1)


def _read_part(path: str, window: Window) -> Iterator[pa.Table]:
    """Rows of one part in batches; a part that cannot be read is noted in ``window.skipped``."""
    try:
        with open_part(path) as file:
            part = pq.ParquetFile(file)
            missing = _REQUIRED - set(part.schema_arrow.names)
            if missing:
                window.skipped[path] = f"not a part of a request log: without {some(sorted(missing))}"
                return
            names = [name for name in part.schema_arrow.names if name in _SCHEMA.names or name.startswith(PART)]
            for batch in part.iter_batches(_BATCH_ROWS, columns=names):
                yield _conform(pa.Table.from_batches([batch]))
    except (pa.ArrowException, OSError, StorageError) as error:
        window.skipped[path] = str(error).splitlines()[0][:200]


def _conform(table: pa.Table) -> pa.Table:
    """Brings a batch to the current columns; parts of older versions lack some, and texts of several columns are joined."""
    parts = [table[name] for name in table.column_names if name.startswith(PART)]
    if parts:
        table = table.append_column("text", pc.binary_join_element_wise(*parts, SEPARATOR))
    columns = [
        table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(len(table), field.type)
        for field in _SCHEMA
    ]
    return pa.Table.from_arrays(columns, schema=_SCHEMA)


def _parse_option(key: str, text: str | None) -> datetime | None:
    try:
        return parse_time(text)
    except ValueError as error:
        raise ConfigError(f"drift.{key}={text!r}: {error}.") from None


def parse_time(text: str | None) -> datetime | None:
    """Parses an ISO 8601 date or time, in UTC unless it has an offset; None stays None.

    Raises:
        ValueError: it is not a time, or is before 1970.

    >>> parse_time("2026-11-25T06:00").isoformat()
    '2026-11-25T06:00:00+00:00'
    """
    if text is None:
        return None
    try:
        time = datetime.fromisoformat(text)
        time = (time if time.tzinfo else time.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        time = None
    if time is None or time.year < 1970:
        raise ValueError("expected a time as 2026-11-25 or 2026-11-25T06:00+01:00")
    return time


def count_by_bundle(rows: pa.Table) -> dict[str, int]:
    """Number of rows by bundle id, the largest first."""
    counts: Sequence[dict[str, Any]] = pc.value_counts(rows["bundle_id"]).to_pylist()
    return {entry["values"]: entry["counts"] for entry in sorted(counts, key=lambda entry: -entry["counts"])}
