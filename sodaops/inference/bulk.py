"""Predictions for the chunks of a table, on all cores: while one chunk is computed, the next is cleaned and tokenised."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sodaops.data.cells import as_text, join_texts
from sodaops.data.workers import n_cores
from sodaops.errors import BundleError
from sodaops.inference.predictor import Predictor
from sodaops.io import storage

_SLICE_ROWS = 1024  # chunks end at a multiple of this within a batch
_AHEAD = 1  # chunks that wait in the pool while the one before them is written and the next one is prepared


class ChunkPredictions(NamedTuple):
    """The rows of a chunk and their predictions."""

    rows: pa.Table
    probs: np.ndarray  # float32 [n_rows, n_labels]; NaN in rows whose text is empty


class PredictionParts:
    """The probabilities of finished chunks, one Parquet file each, from which a stopped run resumes.

    Args:
        folder: where the files are.
        n_labels: columns of each file.
    """

    def __init__(self, folder: Path, n_labels: int) -> None:
        self.folder = folder
        self.n_resumed = 0  # rows that were read
        self._names = [str(i) for i in range(n_labels)]

    @property
    def n_rows(self) -> int:
        """How many rows are finished."""
        return sum(int(file.stem.partition("-")[2]) for file in self.folder.glob("*.parquet"))

    def read(self, first: int, n_rows: int) -> np.ndarray | None:
        """The part that starts at row ``first`` (from 0), float32 [n_rows, n_labels]; None if it is missing or damaged."""
        path = self._path(first, n_rows)
        if not path.exists():
            return None
        try:
            with pa.OSFile(str(path)) as file:
                part = pq.ParquetFile(file, page_checksum_verification=True).read(use_threads=False)
        except (pa.ArrowException, OSError):  # damaged: it is computed again
            return None
        if part.column_names != self._names or part.num_rows != n_rows:
            return None
        self.n_resumed += n_rows
        return np.column_stack([column.to_numpy() for column in part.columns])

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


def rechunk(batches: Iterable[pa.RecordBatch], n_rows: int, n_bytes: int) -> Iterator[pa.Table]:
    """Joins small batches and cuts large ones; the same batches always give the same chunks.

    Args:
        batches: of one schema.
        n_rows: a chunk ends when it has this many rows,
        n_bytes: or at least this many bytes.

    Yields:
        Tables of at least one row.
    """
    pieces: list[pa.RecordBatch] = []
    rows = size = 0
    for batch in batches:
        start = 0
        while start < batch.num_rows:
            piece = batch.slice(start, min(_SLICE_ROWS, n_rows - rows))
            pieces.append(piece)
            start, rows, size = start + piece.num_rows, rows + piece.num_rows, size + piece.nbytes
            if rows >= n_rows or size >= n_bytes:
                yield pa.Table.from_batches(pieces)
                pieces, rows, size = [], 0, 0
    if pieces:
        yield pa.Table.from_batches(pieces)


def predict_chunks(
    predictor: Predictor,
    chunks: Iterable[pa.Table],
    text_columns: Sequence[str],
    parts: PredictionParts,
    progress: Callable[[int], object],
) -> Generator[ChunkPredictions, None, None]:
    """Predicts the chunks of a table; a chunk with a finished part is read from it, others are written as parts.

    ONNX Runtime releases the GIL, so threads use all cores, and an error in one of them is raised here.

    Args:
        predictor: with one thread per batch; as many batches as there are cores are computed at once.
        chunks: in the table's order.
        text_columns: the columns with the parts of the raw texts.
        parts: of an earlier run.
        progress: called with the number of rows that were computed since the last call.

    Yields:
        The chunks in order, with their predictions.

    Raises:
        BundleError: the model's output is not finite.
        StorageError: a part could not be written.
    """
    waiting: deque[Callable[[], ChunkPredictions]] = deque()
    pool = ThreadPoolExecutor(n_cores(), "model")
    try:
        first = 0
        for rows in chunks:
            waiting.append(_start(predictor, pool, first, rows, text_columns, parts, progress))
            first += rows.num_rows
            if len(waiting) > _AHEAD:
                yield waiting.popleft()()
        while waiting:
            yield waiting.popleft()()
    finally:
        pool.shutdown(cancel_futures=True)


def _start(
    predictor: Predictor,
    pool: ThreadPoolExecutor,
    first: int,
    rows: pa.Table,
    text_columns: Sequence[str],
    parts: PredictionParts,
    progress: Callable[[int], object],
) -> Callable[[], ChunkPredictions]:
    """Cleans and tokenises a chunk and gives its batches to the pool; the result waits for them and writes the part."""
    known = parts.read(first, rows.num_rows)
    if known is not None:
        return lambda: ChunkPredictions(rows, known)
    texts = join_texts([as_text(rows[name], rows.schema.field(name)) for name in text_columns])
    cleaned = [predictor.clean(text or "") for text in texts.to_pylist()]
    # Each distinct text is computed once; -1 stands for an empty one.
    id_of = {text: i for i, text in enumerate(dict.fromkeys(filter(None, cleaned)))}
    text_ids = np.array([id_of.get(text, -1) for text in cleaned], dtype=np.int64)
    batches = predictor.plan(list(id_of)) if id_of else []
    # Longest first, so that at the end of the last chunk no core computes a long batch while the others are idle.
    submitted = [(ids, pool.submit(predictor.run, tokens)) for ids, tokens in reversed(batches)]

    def finish() -> ChunkPredictions:
        distinct = np.full((len(id_of), len(predictor.info.labels)), np.nan, dtype=np.float32)
        for ids, future in submitted:
            distinct[ids] = future.result().probs
            progress(len(ids))
        if not np.isfinite(distinct[[i for ids, _ in submitted for i in ids]]).all():
            raise BundleError(f"{predictor.info.bundle_id}: the model's output is not finite; export the bundle again.")
        # Every row gets the probabilities of its text; rows with an empty text, or one without tokens, stay NaN.
        probs = np.full((len(rows), distinct.shape[1]), np.nan, dtype=np.float32)
        probs[text_ids >= 0] = distinct[text_ids[text_ids >= 0]]
        parts.write(first, probs)
        progress(len(probs) - sum(len(ids) for ids, _ in submitted))  # repeated and empty texts
        return ChunkPredictions(rows, probs)

    return finish
