"""First stage of the request log: an append-only journal of JSON lines on local disk.

An answer is written to the journal before it is sent, so no answered request is lost when the process is killed; if the
machine fails, the last second may be lost. If the disk is full or ``max_bytes`` is reached, requests are still answered, but
their rows are lost, and counted in ``sodaops_request_log_lost_total``.
"""

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge

log = logging.getLogger(__name__)
SEGMENT = ".jsonl"
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_TICK_S = 1.0
_WRITER_S = 300.0  # time limit of the process that writes parts
_MAX_RETRY_S = 60.0


class JournalMetrics:
    """Prometheus metrics of the journal."""

    def __init__(self, registry: CollectorRegistry, log: str = "sodaops_request_log") -> None:
        self.logged = Counter(f"{log}_rows", "Answers written to the journal.", registry=registry)
        self.lost = Counter(f"{log}_lost", "Answers that the journal could not take.", registry=registry)
        self.journal_bytes = Gauge(f"{log}_journal_bytes", "Journal not in a Parquet part yet.", registry=registry)
        self.parts = Counter(f"{log}_parts", "Parquet parts, by how writing ended.", ("outcome",), registry=registry)


class Journal:
    """Writes segments, which are files of JSON lines, and lets another process convert closed segments to Parquet parts.

    The open segment is locked, so that other processes do not read it. If a process dies, the operating system releases its
    lock, and the next process that uses the folder converts its segments.

    Args:
        folder: local folder for the segments; created if missing.
        destination: folder or gs:// address for the Parquet parts.
        part_s: age in seconds at which a segment is closed.
        part_bytes: size in bytes at which a segment is closed.
        max_bytes: limit for the total size of all segments.
        metrics: counts rows written and lost, and parts.
        keep_days: age in days at which parts are deleted; None keeps all.

    Raises:
        OSError: the folder cannot be created or written to.
    """

    def __init__(
        self, folder: Path, destination: str, part_s: float, part_bytes: int, max_bytes: int, metrics: JournalMetrics,
        keep_days: int | None = None,
    ) -> None:  # fmt: skip
        self._folder, self._destination = folder, destination
        self._part_s, self._part_bytes, self._max_bytes = part_s, part_bytes, max_bytes
        self._metrics, self._keep_days = metrics, keep_days
        self._path: Path | None = None
        self._retry_at, self._retry_s = 0.0, _TICK_S
        folder.mkdir(parents=True, exist_ok=True)
        self._closed_bytes = self._measure_closed()
        self._open()
        metrics.journal_bytes.set_function(lambda: self._closed_bytes + self._size)

    def append(self, rows: Sequence[dict[str, Any]]) -> bool:
        """Writes all rows in one call, or none.

        Returns:
            Whether the rows were written; otherwise they are counted as lost.
        """
        lines = b"".join(_encode(row).encode() + b"\n" for row in rows)
        written = 0
        if self._closed_bytes + self._size + len(lines) <= self._max_bytes:
            with contextlib.suppress(OSError):  # counted as lost below
                written = os.write(self._descriptor, lines)
        if written == len(lines):
            self._size += written
            self._metrics.logged.inc(len(rows))
            return True
        if written:
            os.ftruncate(self._descriptor, self._size)  # removes the incomplete line
        self._metrics.lost.inc(len(rows))
        return False

    async def run(self) -> None:
        """Syncs to disk every second and converts closed segments to parts, until cancelled."""
        await self._write_parts()  # segments of an earlier process
        while True:
            await asyncio.sleep(_TICK_S)
            try:
                await self._tick()
            except Exception as error:  # any error: the next tick tries again
                log.error("request log: %s", error, extra={"reason": repr(error)})

    async def _tick(self) -> None:
        await asyncio.to_thread(self._sync, self._descriptor)
        is_old = time.monotonic() - self._opened_at >= self._part_s
        if (self._size and is_old) or self._size >= self._part_bytes:
            self._rotate()
        if self._closed_bytes and time.monotonic() >= self._retry_at:
            await self._write_parts()

    async def close(self) -> None:
        """Closes the open segment and writes the last parts; if this fails, the next start writes them."""
        self._rotate()
        await self._write_parts()
        os.close(self._descriptor)
        if not self._size and self._path is not None:
            self._path.unlink()

    def _open(self) -> None:
        """Creates a segment. Only after it is locked does it get the suffix that other processes look for."""
        path = self._folder / f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{os.urandom(6).hex()}{SEGMENT}"
        unlocked = path.with_suffix(".new")
        descriptor = os.open(unlocked, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        unlocked.rename(path)
        self._path, self._descriptor = path, descriptor
        self._size, self._opened_at = 0, time.monotonic()

    def _rotate(self) -> None:
        """Closes the open segment and creates a new one, unless it is empty or no file can be created."""
        if not self._size:
            return
        closed, size = self._descriptor, self._size
        try:
            self._open()
        except OSError as error:
            log.error("request log: cannot create a new segment (%s); keeping the old one", error.strerror)
            return
        self._sync(closed)
        os.close(closed)
        self._closed_bytes += size

    def _sync(self, descriptor: int) -> None:
        try:
            os.fsync(descriptor)
        except OSError as error:
            log.error("request log: cannot sync the journal (%s)", error.strerror)

    async def _write_parts(self) -> None:
        """Converts closed segments to parts; each failure doubles the time until the next attempt."""
        if not self._closed_bytes:
            return
        try:
            n_parts, reason = await self._run_writer()
        except OSError as error:  # no process can be started
            n_parts, reason = None, str(error)
        if n_parts is None:
            self._metrics.parts.labels("failed").inc()
            self._retry_at = time.monotonic() + self._retry_s
            self._retry_s = min(_MAX_RETRY_S, 2 * self._retry_s)
            log.error("request log: parts not written; will retry", extra={"reason": reason})
        else:
            self._metrics.parts.labels("written").inc(n_parts)
            self._retry_at, self._retry_s = 0.0, _TICK_S
            if reason:
                log.error("request log: old parts not deleted; will retry with the next part", extra={"reason": reason})
        self._closed_bytes = self._measure_closed()

    async def _run_writer(self) -> tuple[int | None, str]:
        """Runs ``python -m sodaops.request_log``, so that pyarrow and gcsfs stay out of the service's process.

        Returns:
            The number of parts written, None if that failed; and the error message, if any.
        """
        days = [] if self._keep_days is None else [str(self._keep_days)]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "sodaops.request_log", str(self._folder), self._destination, *days,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            output, errors = await asyncio.wait_for(process.communicate(), _WRITER_S)
        except TimeoutError:
            return None, f"not finished within {_WRITER_S:.0f} s"
        finally:
            if process.returncode is None:
                process.kill()
        n_parts = output.strip()
        reason = errors.decode(errors="replace")[-500:].strip() if process.returncode else ""
        return (int(n_parts) if n_parts.isdigit() else None), reason

    def _measure_closed(self) -> int:
        """The total size of the segments that no process has locked; another process may delete some meanwhile."""
        total = 0
        for path in self._folder.glob(f"*{SEGMENT}"):
            with contextlib.suppress(FileNotFoundError, BlockingIOError), path.open("rb") as segment:
                fcntl.flock(segment, fcntl.LOCK_SH | fcntl.LOCK_NB)
                total += os.fstat(segment.fileno()).st_size
        return total


def shadow_of(place: str) -> str:
    """The place of the log of a shadow's answers beside a request log, or of its journal beside that one's."""
    return f"{place.rstrip('/')}-shadow"


def find_in_journal(folder: Path, request_id: str, place: int) -> bool:
    """Whether a segment of the journal, of whatever process, has the row of an answered text."""
    key = f'"request_id":{_encode(request_id)},'.encode()
    for path in folder.glob(f"*{SEGMENT}"):
        with contextlib.suppress(FileNotFoundError), path.open("rb") as segment:  # it may have become a part
            if any(key in line and json.loads(line)["place"] == place for line in segment if line.endswith(b"\n")):
                return True
    return False
