"""Answers for a whole table, of any length, that can be stopped and goes on."""

import contextlib
import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from sodaops.config.schema import FORMATS, table_format
from sodaops.data import streams, tokens
from sodaops.data.sources import column_names, read_batches, table_writer
from sodaops.data.work_folder import work_folder
from sodaops.errors import DataError, StorageError
from sodaops.inference import bulk
from sodaops.inference.bulk import Parts, answer, cut
from sodaops.inference.predictor import Predictor
from sodaops.io import remote, storage
from sodaops.text import cleaning

CHUNK_ROWS = 8192  # a kill -9 loses the work of two at most
BATCH_TOKENS = 512  # of 256 to 4,096, what takes least time a text, in float32 and in int8
_CHUNK_BYTES = 32 * 2**20


class Written(NamedTuple):
    """What became of a table."""

    n_rows: int
    n_resumed: int  # of these, answered by an earlier run that did not finish


def bulk_predictor(bundle: str | Path, variant: str | None = None) -> Predictor:
    """A predictor for :func:`predict_table`, which computes as many batches at once as there are cores.

    Args:
        bundle: the bundle's folder.
        variant: ``float32`` or ``int8``; None takes the bundle's own choice.

    Raises:
        BundleError: missing, incomplete or damaged, or without that variant.
    """
    return Predictor(bundle, variant, n_threads=1, batch_tokens=BATCH_TOKENS)


def predict_table(predictor: Predictor, path: str, text_column: str, output: str, chunk_rows: int = CHUNK_ROWS) -> Written:
    """Answers a table: its columns, cells as text, and label, score and prob_LABEL beside them, in the table's order.

    The table is read through to check it, then again to answer it; memory does not grow with its rows. Rows whose
    text is empty after cleaning get empty answers. After a crash, a kill or a full disk the same call goes on from what
    was answered, unless the table, the bundle or the text column is another.

    Args:
        predictor: the bundle that answers; :func:`bulk_predictor` makes one that is fast here.
        path: .csv, .tsv, .jsonl or .parquet, here or at gs://.
        text_column: the column with the raw texts.
        output: .csv, .tsv, .jsonl or .parquet; written whole or not at all.
        chunk_rows: rows that are answered together, at most.

    Returns:
        How many rows were written, and how many of them an earlier run had answered.

    Raises:
        DataError: a table that cannot be read or that changes meanwhile, or an output format that is not known.
        StorageError: the output cannot be written, or another process is writing it.
    """
    if remote.is_address(output):
        raise DataError(f"--output {output}: expected a file of this machine; copy it to its address afterwards.")
    if table_format(output) is None or output.endswith(".gz") or Path(output).is_dir():
        raise DataError(f"--output {output}: expected a file whose name ends in {', '.join(FORMATS)}.")
    names = column_names(path, [text_column], "Set --text-column.")
    streams.require(path, names, names)
    table = _identity(path)
    n_rows = _n_rows(path, names)
    target = Path(output).resolve()
    bundle = {"bundle_id": predictor.info.bundle_id, "variant": predictor.variant}
    shape = {"text_column": text_column, "chunk": [chunk_rows, _CHUNK_BYTES]}
    code = [storage.sha256_of(inspect.getfile(part)) for part in (bulk, Predictor, cleaning, tokens)]
    fingerprint = storage.sha256_of_json({**table, **bundle, **shape, "code": code})
    with work_folder(target, fingerprint, wait=False, kept_after=StorageError) as folder:
        parts = Parts(folder, len(predictor.info.labels))
        try:
            with _written_at_once(folder / "output", target) as file:
                chunks = cut(read_batches(path, names), chunk_rows, _CHUNK_BYTES)
                _write(predictor, chunks, text_column, parts, file, table_format(output), n_rows)
                if _identity(path) != table:
                    raise DataError(f"{path}: was changed while it was read; run it again.")
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"the same command goes on after {parts.n_rows:,} of {n_rows:,} rows") from None
    return Written(n_rows, parts.n_taken)


def _identity(path: str) -> dict[str, Any]:
    try:
        table = remote.local_copy(path)
        found = table.stat()
    except OSError as error:
        raise DataError(f"{path}: could not be read ({error.strerror}); run it again with a table that stays.") from None
    return {"path": str(table.resolve()), "size": found.st_size, "mtime_ns": found.st_mtime_ns}


def _n_rows(path: str, names: list[str]) -> int:
    """Reads the whole table, so that its faults are told before an hour of computing."""
    n_rows = 0
    with tqdm(desc=f"reading {path}", unit="row", delay=2, leave=False, disable=None) as bar:
        for batch in read_batches(path, names):
            n_rows += batch.num_rows
            bar.update(batch.num_rows)
    return n_rows


@contextlib.contextmanager
def _written_at_once(file: Path, target: Path) -> Iterator[Path]:
    """A file to write to; it takes the place of ``target`` when the block ends well, and vanishes when it does not."""
    with storage.writing(target):
        try:
            yield file
            file.chmod(0o644)
            storage.sync(file)
            os.replace(file, target)
            storage.sync(target.parent)
        finally:
            file.unlink(missing_ok=True)


def _write(
    predictor: Predictor, chunks: Iterator[pa.Table], text_column: str, parts: Parts, file: Path, kind: str, n_rows: int
) -> None:
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(total=n_rows, initial=parts.n_rows, desc="predicting", unit="text", delay=2, leave=False, disable=None)
        )
        answered = stack.enter_context(contextlib.closing(answer(predictor, chunks, text_column, parts, bar.update)))
        write = None
        for rows, probs in answered:
            table = _with_answers(rows, probs, predictor.info.labels)
            write = write or stack.enter_context(table_writer(file, kind, table.schema))
            write(table)


def _with_answers(rows: pa.Table, probs: np.ndarray, labels: list[str]) -> pa.Table:
    """Adds label, score and prob_LABEL, with ``predicted_`` before a name that the table has already."""
    empty = np.isnan(probs[:, 0])
    known = np.where(empty[:, None], 0, probs).astype(np.float64)
    added = {
        "label": pa.array(np.array(labels, dtype=object)[known.argmax(axis=1)], pa.string(), mask=empty),
        "score": pa.array(known.max(axis=1), mask=empty),
        **{f"prob_{label}": pa.array(known[:, i], mask=empty) for i, label in enumerate(labels)},
    }
    for name, values in added.items():
        while name in rows.column_names:
            name = f"predicted_{name}"
        rows = rows.append_column(name, values)
    return rows
