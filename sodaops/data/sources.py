"""Reads and writes tables: CSV, TSV, JSON lines or Parquet, through pyarrow. All cells are read as strings.

Rows are numbered from 1, without the header.
"""

import contextlib
import csv
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from sodaops.config.schema import FORMATS, table_format
from sodaops.data import streams
from sodaops.errors import DataError, nearest, some
from sodaops.io.remote import local_copy

_UNREADABLE = (pa.ArrowException, OSError, EOFError, csv.Error, zlib.error)


def read_batches(path: str, columns: Sequence[str], max_rows: int | None = None) -> Iterator[pa.RecordBatch]:
    """Reads the named columns of a table as strings, a few megabytes at a time; missing cells become empty strings.

    Args:
        path: a local or remote file; its extension determines the format (.csv, .tsv, .jsonl, .parquet; the first three also
            with .gz).
        columns: distinct names of columns.
        max_rows: yield only the first rows; the others are read and checked nevertheless.

    Yields:
        Batches of string columns, in the order of ``columns``. Integers stay integers: a Parquet or JSON column of integers
        with missing cells gives ``"1"``, not ``"1.0"``.

    Raises:
        DataError: no such file, an empty one, a missing column, rows of different lengths, or text that is not UTF-8.
    """
    if not local_copy(path).is_file():
        raise DataError(f"{path}: no such file{_similar_files(path)}. Set data.path to your table.")
    n_rows = 0
    try:
        for batch, whole in streams.stream_batches(path, columns):
            strings = _strings(path, batch, whole, n_rows) if batch.num_rows else batch
            n_yielded = batch.num_rows if max_rows is None else min(batch.num_rows, max_rows - n_rows)
            n_rows += batch.num_rows
            if n_yielded > 0:
                yield strings.slice(0, n_yielded)
    except _UNREADABLE as error:
        _check_utf8(path)
        after = f" after row {n_rows:,}" if n_rows else ""
        raise DataError(f"{path}: not a readable {table_format(path)} table{after} ({str(error).splitlines()[0]}).") from None
    if n_rows == 0:
        raise DataError(f"{path}: has no rows; expected at least one.")


def read_table(path: str, columns: Sequence[str], max_rows: int | None = None) -> pa.Table:
    """Reads the named columns of a whole table; otherwise as :func:`read_batches`."""
    return pa.Table.from_batches(list(read_batches(path, columns, max_rows)))


def column_names(path: str, required: Sequence[str] = (), fix: str = "") -> list[str]:
    """The names of a table's columns, in order.

    Args:
        path: a local or remote file.
        required: columns that it must have.
        fix: how to fix a missing one, for the message.

    Raises:
        DataError: no such file, an unreadable one, or a missing required column.
    """
    if not local_copy(path).is_file():
        raise DataError(f"{path}: no such file{_similar_files(path)}.")
    kind = table_format(path)
    if kind is None:
        raise DataError(f"{path}: expected a name that ends in {', '.join(FORMATS)}.")
    try:
        names = streams.read_header(path)
    except _UNREADABLE as error:
        raise DataError(f"{path}: not a readable {kind} table ({str(error).splitlines()[0]}).") from None
    streams.check_columns(path, required, names, fix)
    return list(names)


def write_table(table: pa.Table, path: str | Path, kind: str) -> None:
    """Writes a table in the named format: csv, tsv, jsonl or parquet."""
    with table_writer(path, kind, table.schema) as write:
        write(table)


@contextlib.contextmanager
def table_writer(path: str | Path, kind: str, schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
    """Opens a file to which several tables are written.

    Args:
        path: the file, which is replaced.
        kind: csv, tsv, jsonl or parquet.
        schema: the schema of every table.

    Yields:
        A function that writes a table; in Parquet each is a row group.
    """
    # The sinks are opened here, so that they are closed, and their disk space is freed, even if closing a writer fails.
    if kind == "parquet":
        with pa.OSFile(str(path), "wb") as sink, pa.parquet.ParquetWriter(sink, schema, compression="zstd") as file:
            yield file.write_table
    elif kind == "jsonl":
        with open(path, "w", encoding="utf-8") as file:
            yield lambda table: file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist())
    else:
        options = pa.csv.WriteOptions(delimiter="\t" if kind == "tsv" else ",")
        with pa.OSFile(str(path), "wb") as sink, pa.csv.CSVWriter(sink, schema, write_options=options) as file:
            yield file.write_table


def _similar_files(path: str) -> str:
    folder = Path(path).parent
    names = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    return nearest(Path(path).name, names) or (f"; {folder} has {some(names)}" if names else "")


def _strings(path: str, batch: pa.RecordBatch, whole: frozenset[str], n_before: int) -> pa.RecordBatch:
    for field in batch.schema:
        if pa.types.is_nested(field.type):
            raise DataError(f"{path}: column {field.name} holds {field.type}; expected text, numbers or true and false.")
    try:
        columns = [as_strings(column, name in whole) for name, column in zip(batch.schema.names, batch.columns, strict=True)]
        for column in columns:
            column.validate(full=True)  # the readers of Parquet and JSON lines do not check UTF-8
    except pa.ArrowException as error:
        _check_utf8(path)
        raise DataError(
            f"{path}: a cell cannot be read as text ({str(error).splitlines()[0]}; rows {n_before + 1:,} to "
            f"{n_before + batch.num_rows:,})."
        ) from None
    return pa.record_batch(columns, names=batch.schema.names)


def as_strings(column: pa.Array, whole: bool) -> pa.Array:
    """A column as strings; nulls become empty strings.

    Args:
        column: an array of any type that is not nested.
        whole: whether it holds floats that are all whole numbers, whose ``.0`` is dropped.

    >>> as_strings(pa.array([1.0, None, 2.0]), whole=True).to_pylist()
    ['1', '', '2']
    """
    if whole:
        column = column.cast(pa.int64())
    return pc.fill_null(column.cast(pa.string()), "")


def _check_utf8(path: str) -> None:
    if table_format(path) == "parquet" or path.endswith(".gz"):
        return
    with open(local_copy(path), "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path} line {number}, byte {error.start + 1}: 0x{line[error.start]:02x} is not UTF-8. "
                    f"Save the table as UTF-8 (for example: iconv -f WINDOWS-1252 -t UTF-8 {Path(path).name})."
                ) from None
