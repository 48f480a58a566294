"""The request log's near end: an append-only journal on local disk, and its segments' way into Parquet parts.

The guarantee: an answer is in the journal before it is sent, so a request that was answered survives the end of the
process, kill -9 included; the end of the machine loses at most the last second. What the journal cannot take (a full
disk, or its bound reached while parts cannot be written) is answered all the same, and counted in
``sodaops_request_log_lost_total``.
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

log = logging.getLogger("sodaops.serving")
SEGMENT = ".jsonl"
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_TICK_S = 1.0
_MOVE_S = 300.0


class JournalMetrics:
    """What the journal counts, for Prometheus."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.logged = Counter("sodaops_request_log_rows", "Answers written to the journal.", registry=registry)
        self.lost = Counter("sodaops_request_log_lost", "Answers that the journal could not take.", registry=registry)
        self.journal_bytes = Gauge("sodaops_request_log_journal_bytes", "Journal not in a Parquet part yet.", registry=registry)
        self.parts = Counter(
            "sodaops_request_log_parts", "Parquet parts, by how writing ended.", ("outcome",), registry=registry
        )


class Journal:
    """Segments of JSON lines in a folder; the open one is locked, and a process that dies lets go of it.

    Args:
        folder: local; made if missing.
        destination: folder or gs:// of the Parquet parts.
        part_s: seconds after which a segment becomes a part.
        part_bytes: or its size.
        max_bytes: bound of all segments together.
        metrics: told what was written, lost and moved.
        keep_days: parts of earlier days are deleted; None: never.

    Raises:
        OSError: the folder cannot be made or written to.
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
        self._closed_bytes = self._others()
        self._open()
        metrics.journal_bytes.set_function(lambda: self._closed_bytes + self._size)

    def append(self, rows: Sequence[dict[str, Any]]) -> bool:
        """Writes rows in one call, all or none.

        Returns:
            Whether they are in the journal; if not, they are counted as lost.
        """
        lines = b"".join(_encode(row).encode() + b"\n" for row in rows)
        written = 0
        if self._closed_bytes + self._size + len(lines) <= self._max_bytes:
            with contextlib.suppress(OSError):  # counted below
                written = os.write(self._descriptor, lines)
        if written == len(lines):
            self._size += written
            self._metrics.logged.inc(len(rows))
            return True
        if written:
            os.ftruncate(self._descriptor, self._size)  # no half line
        self._metrics.lost.inc(len(rows))
        return False

    async def run(self) -> None:
        """Syncs every second, and moves what is due into parts, until cancelled."""
        await self._move()  # what an earlier process left
        while True:
            await asyncio.sleep(_TICK_S)
            try:
                await self._tick()
            except Exception as error:  # whatever it was, the next tick comes
                log.error("request log: %s", error, extra={"reason": repr(error)})

    async def _tick(self) -> None:
        await asyncio.to_thread(self._sync, self._descriptor)
        old = time.monotonic() - self._since >= self._part_s
        if (self._size and old) or self._size >= self._part_bytes:
            self._turn()
        if self._closed_bytes and time.monotonic() >= self._retry_at:
            await self._move()

    async def close(self) -> None:
        """Ends the open segment and moves everything; what cannot be moved now is moved at the next start."""
        self._turn()
        await self._move()
        os.close(self._descriptor)
        if not self._size and self._path is not None:
            self._path.unlink()

    def _open(self) -> None:
        path = self._folder / f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{os.urandom(6).hex()}{SEGMENT}"
        young = path.with_suffix(".new")  # nobody looks for this name, and so nobody takes it before it is locked
        descriptor = os.open(young, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        young.rename(path)
        self._path, self._descriptor = path, descriptor
        self._size, self._since = 0, time.monotonic()

    def _turn(self) -> None:
        """Begins a new segment; an empty one goes on, and so does a full one where no file can be made."""
        if not self._size:
            return
        done, size = self._descriptor, self._size
        try:
            self._open()
        except OSError as error:
            log.error("request log: no new segment (%s); the old one goes on", error.strerror)
            return
        self._sync(done)
        os.close(done)
        self._closed_bytes += size

    def _sync(self, descriptor: int) -> None:
        try:
            os.fsync(descriptor)
        except OSError as error:
            log.error("request log: the journal could not be synced (%s)", error.strerror)

    async def _move(self) -> None:
        """Turns closed segments into parts, in a process of its own: pyarrow and gcsfs stay out of this one."""
        if not self._closed_bytes:
            return
        try:
            n_parts, said = await self._run_parts()
        except OSError as error:  # no process to be had
            n_parts, said = None, str(error)
        if n_parts is None:
            self._metrics.parts.labels("failed").inc()
            self._retry_at = time.monotonic() + self._retry_s
            self._retry_s = min(60.0, 2 * self._retry_s)
            log.error("request log: parts not written, tried again later", extra={"reason": said})
        else:
            self._metrics.parts.labels("written").inc(n_parts)
            self._retry_at, self._retry_s = 0.0, _TICK_S
            if said:
                log.error("request log: old parts not deleted, tried again with the next", extra={"reason": said})
        self._closed_bytes = self._others()

    async def _run_parts(self) -> tuple[int | None, str]:
        """How many parts were written, or None; and what the process said of what failed."""
        days = [] if self._keep_days is None else [str(self._keep_days)]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "sodaops.request_log", str(self._folder), self._destination, *days,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            output, said = await asyncio.wait_for(process.communicate(), _MOVE_S)
        except TimeoutError:
            return None, f"not done within {_MOVE_S:.0f} s"
        finally:
            if process.returncode is None:
                process.kill()
        n_parts = output.strip()
        failed = said.decode(errors="replace")[-500:].strip() if process.returncode else ""
        return (int(n_parts) if n_parts.isdigit() else None), failed

    def _others(self) -> int:
        """Bytes of the segments that no living process writes; another process may take some away meanwhile."""
        total = 0
        for path in self._folder.glob(f"*{SEGMENT}"):
            with contextlib.suppress(FileNotFoundError, BlockingIOError), path.open("rb") as segment:
                fcntl.flock(segment, fcntl.LOCK_SH | fcntl.LOCK_NB)
                total += os.fstat(segment.fileno()).st_size
        return total
