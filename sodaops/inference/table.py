"""Predictions for a table of any length; a run that was stopped can be resumed."""

import contextlib
import inspect
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from sodaops.bundle.layout import BundleInfo
from sodaops.config.schema import FORMATS, table_format
from sodaops.data import cells, pairs, tokens
from sodaops.data.cells import is_text
from sodaops.data.sources import DETECTED, Layout, Source, check_texts, open_table, read_cells, table_writer
from sodaops.data.work_folder import work_folder
from sodaops.errors import DataError, StorageError, some
from sodaops.inference import bulk
from sodaops.inference.bulk import PredictionParts, predict_chunks, rechunk
from sodaops.inference.predictor import Predictor
from sodaops.io import remote, storage
from sodaops.io.progress import progress
from sodaops.text import cleaning, columns

log = logging.getLogger(__name__)

CHUNK_ROWS = 8192  # a killed run loses at most two chunks of work
BATCH_TOKENS = 512  # the fastest of 256 to 4,096, in float32 and in int8
_CHUNK_BYTES = 32 * 2**20
_CODE = (bulk, cells, Predictor, cleaning, columns, pairs, tokens)  # whose changes make parts of earlier runs stale


class PredictedTable(NamedTuple):
    """What was written."""

    n_rows: int
    n_resumed: int  # of these, predicted by an earlier run that did not finish


def bulk_predictor(bundle: str | Path, variant: str | None = None) -> Predictor:
    """A predictor for :func:`predict_table`, which computes as many batches at once as there are cores.

    Args:
        bundle: the bundle's folder.
        variant: ``float32`` or ``int8``; None takes the bundle's default.

    Raises:
        BundleError: missing, incomplete or damaged, or without that variant.
    """
    return Predictor(bundle, variant, n_threads=1, batch_tokens=BATCH_TOKENS)


def predict_table(
    predictor: Predictor,
    path: str,
    text_column: str | Sequence[str] | None,
    output: str,
    chunk_rows: int = CHUNK_ROWS,
    layout: Layout = DETECTED,
    abstain: bool = False,
) -> PredictedTable:
    """Predicts the rows of a table, and writes its columns with label, score and prob_LABEL beside them.

    The columns stay as they are: JSON lines byte for byte, Parquet in its types. In another format a cell becomes text; lists
    and objects become JSON, and a column of bytes that are not UTF-8 is left out, with a warning.

    The table is read once to check it and once more to predict; memory does not grow with its rows. Rows whose text is
    empty after cleaning get empty predictions. After a crash, a kill or a full disk the same call resumes, unless the
    table, the bundle or the text column has changed.

    Args:
        predictor: :func:`bulk_predictor` makes a fast one.
        path: .csv, .tsv, .jsonl or .parquet, local or at gs://.
        text_column: the column with the raw texts, or the columns with their parts; None: those of the training.
        output: .csv, .tsv, .jsonl or .parquet; written whole or not at all.
        chunk_rows: rows that are predicted together, at most.
        layout: delimiter and encoding of a text table.
        abstain: also write ``abstain``, whether the bundle abstains from the answer.

    Returns:
        How many rows were written, and how many of them an earlier run had predicted.

    Raises:
        ConfigError: ``abstain`` with a bundle without thresholds.
        DataError: a table that cannot be read or that changes meanwhile, an unknown output format, or another number of columns
            than the bundle's.
        StorageError: the output cannot be written, or another process is writing it.
    """
    _check_output(output)
    if abstain:
        predictor.require_thresholds("--abstain")
    names = text_columns_of(predictor.info, text_column)
    source = open_table(path, names, layout, "Set --text-column.")
    table = _identity(path)
    n_rows, binary = _check_rows(source, names)
    dropped = binary if table_format(output) != "parquet" else []
    if dropped:
        log.warning("%s: left out %s, whose bytes are not UTF-8 text; write .parquet to keep them", output, some(dropped))
    target = Path(output).resolve()
    bundle = {"bundle_id": predictor.info.bundle_id, "variant": predictor.variant}
    shape = {"text_column": names[0] if len(names) == 1 else names, "chunk": [chunk_rows, _CHUNK_BYTES], "layout": layout}
    code = [storage.sha256_of(inspect.getfile(part)) for part in _CODE]
    own_code = cleaning.code_of(predictor.info.cleaning)
    fingerprint = storage.sha256_of_json({**table, **bundle, **shape, "code": code, **own_code})
    with work_folder(target, fingerprint, wait=False, kept_after=StorageError) as folder:
        parts = PredictionParts(folder, len(predictor.info.labels))
        try:
            with _replacing(folder / "output", target) as file:
                chunks = rechunk(read_cells(source), chunk_rows, _CHUNK_BYTES)
                _write(predictor, chunks, names, parts, file, table_format(output), n_rows, dropped, abstain)
                if _identity(path) != table:
                    raise DataError(f"{path}: was changed while it was read; run it again.")
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"the same command resumes after {parts.n_rows:,} of {n_rows:,} rows") from None
    return PredictedTable(n_rows, parts.n_resumed)


def text_columns_of(info: BundleInfo, given: str | Sequence[str] | None) -> list[str]:
    """The columns of a table with the parts of its texts, by default those of the training; a DataError if they are too few."""
    names, trained = columns.names_of(given) if given else info.text_columns, ", ".join(info.text_columns)
    if len(names) != len(info.text_columns):
        raise DataError(f"text columns {', '.join(names)}: the bundle was trained on {trained}; give as many.")
    return names


def _check_output(output: str) -> None:
    if remote.is_address(output):
        raise DataError(f"--output {output}: expected a local file; copy it to its address afterwards.")
    if table_format(output) is None or output.endswith(".gz") or Path(output).is_dir():
        raise DataError(f"--output {output}: expected a file whose name ends in {', '.join(FORMATS)}.")


def _identity(path: str) -> dict[str, Any]:
    """What changes when the table does."""
    try:
        table = remote.local_copy(path)
        stat = table.stat()
    except OSError as error:
        raise DataError(f"{path}: could not be read ({error.strerror}); run it again with a table that stays.") from None
    return {"path": str(table.resolve()), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _check_rows(source: Source, text_columns: Sequence[str]) -> tuple[int, list[str]]:
    """Reads the table, to find a damaged row before hours of computing.

    Returns:
        The number of rows, and the columns with bytes that are not UTF-8.
    """
    n_rows = 0
    binary: set[str] = set()
    with progress(desc=f"reading {source.path}", unit="row") as bar:
        for batch in read_cells(source):
            for name in text_columns:
                check_texts(source.path, batch, name, n_rows)
            if source.kind == "parquet":
                names = [field.name for field in batch.schema if _may_be_binary(field.type)]
                binary.update(name for name in names if name not in binary and not is_text(batch[name]))
            n_rows += batch.num_rows
            bar.update(batch.num_rows)
    return n_rows, sorted(binary)


def _may_be_binary(kind: pa.DataType) -> bool:
    return not (pa.types.is_primitive(kind) or pa.types.is_nested(kind) or pa.types.is_null(kind))


@contextlib.contextmanager
def _replacing(file: Path, target: Path) -> Iterator[Path]:
    """A file to write to; it replaces ``target`` if the block succeeds, and is deleted if not."""
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
    predictor: Predictor,
    chunks: Iterator[pa.Table],
    names: Sequence[str],
    parts: PredictionParts,
    file: Path,
    kind: str,
    n_rows: int,
    dropped: list[str],
    abstain: bool,
) -> None:
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(progress(total=n_rows, initial=parts.n_rows, desc="predicting", unit="text"))
        predicted = stack.enter_context(contextlib.closing(predict_chunks(predictor, chunks, names, parts, bar.update)))
        write_chunk = None
        for rows, probs in predicted:
            table = with_predictions(rows, probs, predictor, abstain).drop_columns(dropped)
            write_chunk = write_chunk or stack.enter_context(table_writer(file, kind, table.schema))
            write_chunk(table)


def with_predictions(rows: pa.Table, probs: np.ndarray, predictor: Predictor, abstain: bool = False) -> pa.Table:
    """Adds the task's columns, perhaps also ``abstain``, with ``predicted_`` before a name that the table already has."""
    answered = ~np.isnan(probs[:, 0])  # the other rows have no text: nulls in every added column
    places = pa.array(np.where(answered, np.cumsum(answered) - 1, 0), mask=~answered)
    added = predictor.task.columns(probs[answered].astype(np.float64), predictor.info.labels)
    if abstain and predictor.abstainer:
        reasons = map(predictor.abstainer.reason, added["label"].to_pylist(), added["score"].to_pylist())
        added["abstain"] = pa.array([reason is not None for reason in reasons], pa.bool_())
    for name, answers in added.items():
        values = answers.take(places)
        while name in rows.column_names:
            name = f"predicted_{name}"
        rows = rows.append_column(name, values)
    return rows
