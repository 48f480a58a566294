"""Making parts: those of a small table in this process, those of a large one on all cores, or all on a Ray cluster."""

import contextlib
import multiprocessing
import os
import signal
import socket
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess

import pyarrow as pa

from sodaops.config.schema import DataConfig
from sodaops.data.parts import Part, PartsKeptError, prepared, write_part
from sodaops.errors import ConfigError, SodaOpsError, StorageError

ROWS_HERE = 200_000  # rows that this process does itself: about what it does while others start
_MAX_WORKERS = 4  # more of them than the reader can feed; each takes about 150 MB
_AHEAD = 2  # parts in flight for each of them


def make_parts(rows: Iterable[tuple[Part, pa.RecordBatch]], config: DataConfig) -> Iterator[Part]:
    """Makes those parts that are not there yet.

    Args:
        rows: each part with its raw rows.
        config: conf/data.

    Yields:
        The parts in order, each when it is written.

    Raises:
        ConfigError: ``data.ray`` is no cluster that can be reached.
        PartsKeptError: a process was killed, or the system had no memory for it.
        StorageError: a part could not be written.
    """
    rows, n_rows = iter(rows), 0
    if config.ray is not None:
        yield from _elsewhere(rows, config)
    for part, raw in rows:
        if not part.path.exists():
            _make(part, raw, config)
            n_rows += part.n_rows
        yield part
        if n_rows >= ROWS_HERE and _n_workers() > 1:
            yield from _elsewhere(rows, config)


def refuse_while_starting() -> None:
    """Refuses to work in a process of a pool that still imports the script which started it, and would start it all again.

    Raises:
        ConfigError: so it is; here it would wait for its parent, which waits for it.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise ConfigError(
            'a script runs again in each process that it starts; put its calls below `if __name__ == "__main__":`.'
        )


def _elsewhere(rows: Iterator[tuple[Part, pa.RecordBatch]], config: DataConfig) -> Iterator[Part]:
    waiting: deque[tuple[Part, Future[SodaOpsError | None] | None]] = deque()
    pool, n_workers, lost = _pool(config)
    try:
        with pool, _all_end(pool, lost):
            for part, raw in rows:
                there = part.path.exists()
                waiting.append((part, None if there else pool.submit(_make_packed, part, raw.schema, _packed(raw), config)))
                if len(waiting) > n_workers * _AHEAD:
                    yield _finished(waiting)
            while waiting:
                yield _finished(waiting)
    except lost as error:
        raise PartsKeptError(
            f"{part.table}: a process that cleaned its rows ended early, at or before row {part.first + part.n_rows - 1:,}; it "
            "was killed, or there was no memory left for it. Run it again: it goes on from the parts that are finished."
        ) from error


@contextlib.contextmanager
def _all_end(pool: Executor, lost: tuple[type[Exception], ...]) -> Iterator[None]:
    """Kills the other processes of a pool that lost one: Python forgets one that was just being started, and then waits for it
    without end."""
    try:
        yield
    except lost:
        for process in list((getattr(pool, "_processes", None) or {}).values()):
            process.kill()
        raise


def _pool(config: DataConfig) -> tuple[Executor, int, tuple[type[Exception], ...]]:
    """Processes here or on a Ray cluster, how many there are, and what they raise when one is lost."""
    if config.ray is not None:
        from sodaops.data.ray_cluster import RayPool

        ray = RayPool(config.ray)
        return ray, ray.n_workers, ray.lost
    n_workers = _n_workers()
    pool = ProcessPoolExecutor(n_workers, multiprocessing.get_context("spawn"), initializer=_begin)
    return pool, n_workers, (BrokenProcessPool,)


def _finished(waiting: deque[tuple[Part, Future[SodaOpsError | None] | None]]) -> Part:
    part, future = waiting.popleft()
    if future is not None and (error := future.result()) is not None:
        raise error
    return part


def _make(part: Part, raw: pa.RecordBatch, config: DataConfig) -> None:
    write_part(part.path, prepared(raw, part.first, config))


def _make_packed(part: Part, schema: pa.Schema, packed: bytes, config: DataConfig) -> SodaOpsError | None:
    """Returns what went wrong: pools wrap what is raised, each in its way."""
    try:
        if not part.path.parent.is_dir():
            raise StorageError(
                f"{part.path.parent}: {socket.gethostname()} does not see this folder; all machines of the cluster must share "
                "the one that evaluate.splits_dir is in."
            )
        _make(part, pa.ipc.read_record_batch(packed, schema), config)
    except SodaOpsError as error:
        return error
    return None


def _packed(raw: pa.RecordBatch) -> bytes:
    return raw.serialize().to_pybytes()  # pickled, a slice would take the whole batch with it


def n_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _n_workers() -> int:
    return min(n_cores(), _MAX_WORKERS)


def _begin() -> None:
    """In a new process: Ctrl-C is for its parent to act on, and when that is killed, nobody else would end it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)
