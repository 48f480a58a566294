"""Answers rows by the ten thousand, on all cores: while one chunk is computed, the next is cleaned and tokenised."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sodaops.data.workers import n_cores
from sodaops.errors import BundleError
from sodaops.inference.predictor import Output, Predictor
from sodaops.io import storage

_SLICE_ROWS = 1024  # a chunk ends at one of these
_AHEAD = 1  # chunks that the cores have to do while the one before is written and the next is prepared


class Answered(NamedTuple):
    """Rows and what the bundle says of them."""

    rows: pa.Table
    probs: np.ndarray  # float32 [n_rows, n_labels]; a row whose text is empty is not-a-number


class _Waiting(NamedTuple):
    """A chunk whose batches the pool has."""

    first: int
    rows: pa.Table
    places: np.ndarray  # int64 [n_rows]: the place of the row's text among the distinct ones, -1 where it is empty
    batches: list[tuple[np.ndarray, Future[Output]]]


class Parts:
    """Probabilities of chunks, a Parquet file each: what a run that is stopped leaves to the next one.

    Args:
        folder: where they lie.
        n_labels: columns of each.
    """

    def __init__(self, folder: Path, n_labels: int) -> None:
        self.folder = folder
        self.n_taken = 0  # rows that were read
        self._names = [str(i) for i in range(n_labels)]

    @property
    def n_rows(self) -> int:
        """How many rows are answered."""
        return sum(int(file.stem.partition("-")[2]) for file in self.folder.glob("*.parquet"))

    def read(self, first: int, n_rows: int) -> np.ndarray | None:
        """The part of rows ``first`` (from 0) and after, float32 [n_rows, n_labels]; None where it is not there whole."""
        path = self._path(first, n_rows)
        if not path.exists():
            return None
        try:
            with pa.OSFile(str(path)) as file:
                found = pq.ParquetFile(file, page_checksum_verification=True).read(use_threads=False)
        except (pa.ArrowException, OSError):  # damaged: it is made anew, as one that is not there
            return None
        if found.column_names != self._names or found.num_rows != n_rows:
            return None
        self.n_taken += n_rows
        return np.column_stack([column.to_numpy() for column in found.columns])

    def write(self, first: int, probs: np.ndarray) -> None:
        """Writes a part, whole or not at all.

        Raises:
            StorageError: it could not be written.
        """
        table = pa.table({name: probs[:, i] for i, name in enumerate(self._names)})
        with storage.atomic_path(self._path(first, len(probs))) as file, pa.OSFile(str(file), "wb") as sink:
            pq.write_table(table, sink, compression="zstd", write_page_checksum=True)

    def _path(self, first: int, n_rows: int) -> Path:
        return self.folder / f"{first:012}-{n_rows}.parquet"


def cut(batches: Iterable[pa.RecordBatch], n_rows: int, n_bytes: int) -> Iterator[pa.Table]:
    """Puts batches together to chunks, and cuts large ones; the same batches give the same chunks.

    Args:
        batches: of one schema.
        n_rows: a chunk ends when it has as many rows,
        n_bytes: or as many bytes.

    Yields:
        Tables with one row at least.
    """
    held: list[pa.RecordBatch] = []
    rows = size = 0
    for batch in batches:
        start = 0
        while start < batch.num_rows:
            piece = batch.slice(start, min(_SLICE_ROWS, n_rows - rows))
            held.append(piece)
            start, rows, size = start + piece.num_rows, rows + piece.num_rows, size + piece.nbytes
            if rows >= n_rows or size >= n_bytes:
                yield pa.Table.from_batches(held)
                held, rows, size = [], 0, 0
    if held:
        yield pa.Table.from_batches(held)


def answer(
    predictor: Predictor, chunks: Iterable[pa.Table], text_column: str, parts: Parts, tell: Callable[[int], object]
) -> Generator[Answered, None, None]:
    """Answers chunks of a table, each from its part where there is one; what is computed becomes a part.

    Args:
        predictor: one whose batches take one thread each; a batch a core is computed at once.
        chunks: in the table's order.
        text_column: the column with the raw texts.
        parts: what was answered before.
        tell: is told how many rows were answered by the model since it was called last.

    Yields:
        The chunks in order with their answers.

    Raises:
        BundleError: the model gives something other than probabilities.
        StorageError: a part could not be written.
    """
    waiting: deque[_Waiting | Answered] = deque()
    pool = ThreadPoolExecutor(n_cores(), "model")
    try:
        first = 0
        for rows in chunks:
            known = parts.read(first, rows.num_rows)
            texts = rows[text_column]
            waiting.append(Answered(rows, known) if known is not None else _begin(predictor, pool, first, rows, texts))
            first += rows.num_rows
            if len(waiting) > _AHEAD:
                yield _finished(predictor, waiting.popleft(), parts, tell)
        while waiting:
            yield _finished(predictor, waiting.popleft(), parts, tell)
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(predictor: Predictor, pool: ThreadPoolExecutor, first: int, rows: pa.Table, texts: pa.ChunkedArray) -> _Waiting:
    cleaned = [predictor.clean(text) for text in texts.to_pylist()]
    place_of = {text: place for place, text in enumerate(dict.fromkeys(filter(None, cleaned)))}
    places = np.array([place_of.get(text, -1) for text in cleaned], dtype=np.int64)
    batches = predictor.plan(list(place_of)) if place_of else []
    # The longest first: at the end of the last chunk no core computes a long batch while the others have none.
    return _Waiting(first, rows, places, [(mine, pool.submit(predictor.run, ids)) for mine, ids in reversed(batches)])


def _finished(predictor: Predictor, chunk: _Waiting | Answered, parts: Parts, tell: Callable[[int], object]) -> Answered:
    if isinstance(chunk, Answered):
        return chunk
    distinct = np.empty((int(chunk.places.max(initial=-1)) + 1, len(predictor.info.labels)), dtype=np.float32)
    n_told = 0
    for mine, future in chunk.batches:
        distinct[mine] = future.result().probs
        n_told += len(mine)
        tell(len(mine))
    if not np.isfinite(distinct).all():
        raise BundleError(f"{predictor.info.bundle_id}: answers something other than probabilities; export the bundle anew.")
    probs = np.full((len(chunk.places), distinct.shape[1]), np.nan, dtype=np.float32)
    full = chunk.places >= 0
    probs[full] = distinct[chunk.places[full]]
    parts.write(chunk.first, probs)
    tell(len(probs) - n_told)
    return Answered(chunk.rows, probs)
