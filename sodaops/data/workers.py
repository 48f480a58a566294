"""Makes parts: those of a small table in this process, those of a large one in several processes or on a Ray cluster."""

import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool

import pyarrow as pa

from sodaops.config.schema import DataConfig
from sodaops.data.parts import Part, PartsKeptError, prepare_rows, write_part
from sodaops.errors import SodaOpsError, StorageError
from sodaops.tasks.base import Task

LOCAL_ROWS = 200_000  # rows that this process cleans before it starts others, which takes about as long
_MAX_WORKERS = 4  # the reader cannot supply more, and each takes about 150 MB
_PENDING_PER_WORKER = 2
_PARENT_CHECK_S = 1.0


def make_parts(rows: Iterable[tuple[Part, pa.RecordBatch]], config: DataConfig, task: Task) -> Iterator[Part]:
    """Makes the parts that do not exist yet.

    Args:
        rows: each part with its raw rows.
        config: conf/data.

    Yields:
        The parts in order, each after it is written.

    Raises:
        ConfigError: no cluster answers at ``data.ray``.
        PartsKeptError: a process was killed, or ran out of memory.
        StorageError: a part could not be written.
    """
    rows, n_rows = iter(rows), 0
    if config.ray is not None:
        yield from _in_pool(rows, config, task)
    for part, raw in rows:
        if not part.path.exists():
            _make(part, raw, config, task)
            n_rows += part.n_rows
        yield part
        if n_rows >= LOCAL_ROWS and _n_workers() > 1:
            yield from _in_pool(rows, config, task)


def _in_pool(rows: Iterator[tuple[Part, pa.RecordBatch]], config: DataConfig, task: Task) -> Iterator[Part]:
    pending: deque[tuple[Part, Future[SodaOpsError | None] | None]] = deque()
    pool, n_workers, worker_died = _pool(config)
    try:
        with pool:
            for part, raw in rows:
                exists = part.path.exists()
                pending.append(
                    (part, None if exists else pool.submit(_make_serialized, part, raw.schema, _serialize(raw), config, task))
                )
                if len(pending) > n_workers * _PENDING_PER_WORKER:
                    yield _wait(pending)
            while pending:
                yield _wait(pending)
    except worker_died as error:
        raise PartsKeptError(
            f"{part.table}: a worker process died at or before row {part.first + part.n_rows - 1:,}; it was killed or ran out "
            "of memory. Run the command again: it continues from the finished parts."
        ) from error


def _pool(config: DataConfig) -> tuple[Executor, int, tuple[type[Exception], ...]]:
    """A pool of local processes or of a Ray cluster, its size, and the exceptions that it raises when a worker died."""
    if config.ray is not None:
        from sodaops.data.ray_cluster import RayPool

        ray = RayPool(config.ray)
        return ray, ray.n_workers, ray.worker_died
    # Unlike the standard library's pool, this one never hangs when a worker is killed while it starts, and it does not run the
    # user's script again in each worker.
    from joblib.externals.loky import ProcessPoolExecutor

    n_workers = _n_workers()
    return ProcessPoolExecutor(n_workers, initializer=_init_worker, initargs=(os.getpid(),)), n_workers, (BrokenProcessPool,)


def _wait(pending: deque[tuple[Part, Future[SodaOpsError | None] | None]]) -> Part:
    part, future = pending.popleft()
    if future is not None and (error := future.result()) is not None:
        raise error
    return part


def _make(part: Part, raw: pa.RecordBatch, config: DataConfig, task: Task) -> None:
    write_part(part.path, prepare_rows(raw, part.first, config, task))


def _make_serialized(part: Part, schema: pa.Schema, raw: bytes, config: DataConfig, task: Task) -> SodaOpsError | None:
    """Makes a part; returns an error instead of raising it, since each pool wraps exceptions in its own way."""
    try:
        if not part.path.parent.is_dir():
            raise StorageError(
                f"{part.path.parent}: not visible from {socket.gethostname()}; all machines of the cluster must share the "
                "folder that holds evaluate.splits_dir."
            )
        _make(part, pa.ipc.read_record_batch(raw, schema), config, task)
    except SodaOpsError as error:
        return error
    return None


def _serialize(raw: pa.RecordBatch) -> bytes:
    return raw.serialize().to_pybytes()  # pickle would send the whole batch with a slice of it


def n_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _n_workers() -> int:
    return min(n_cores(), _MAX_WORKERS)


def _init_worker(parent: int) -> None:
    """In a new worker: leaves Ctrl-C to the parent process, and ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK_S)
    os._exit(1)
