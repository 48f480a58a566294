"""Reads and writes tables: CSV, TSV, JSON lines or Parquet. No cell is changed on its way.

Rows are numbered from 1, without the header.
"""

import contextlib
import csv
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from sodaops.config.schema import FORMATS, table_format
from sodaops.data import streams
from sodaops.data.cells import as_json, as_text, check_halves, is_json
from sodaops.data.streams import Source
from sodaops.data.text_files import DETECTED, Layout, check_utf8
from sodaops.errors import DataError, nearest, some
from sodaops.io.remote import local_copy

_UNREADABLE = (pa.ArrowException, OSError, EOFError, csv.Error, zlib.error, UnicodeError)


def open_table(
    path: str,
    required: Sequence[str] = (),
    layout: Layout = DETECTED,
    fix: str | Mapping[str, str] = "",
    all_names: bool = True,
) -> Source:
    """Reads a table's header, see :func:`sodaops.data.streams.open_table`.

    Raises:
        DataError: no such file, an unreadable one, or a missing required column.
    """
    if not local_copy(path).is_file():
        raise DataError(f"{path}: no such file{_similar_files(path)}. Check the path; data.path is the table to train on.")
    if table_format(path) is None:
        raise DataError(f"{path}: expected a name that ends in {', '.join(FORMATS)}.")
    try:
        return streams.open_table(path, required, layout, fix, all_names)
    except _UNREADABLE as error:
        raise _unreadable(path, layout.encoding, error, 0) from None


def read_cells(source: Source, columns: Sequence[str] | None = None, lists: Sequence[str] = ()) -> Iterator[pa.RecordBatch]:
    """Reads a table in its own types, a few megabytes at a time; see :func:`sodaops.data.streams.stream_batches`.

    Raises:
        DataError: no rows, rows of different lengths, or a damaged file.
    """
    n_rows = 0
    try:
        for batch in streams.stream_batches(source, columns, lists):
            if batch.num_rows:
                yield batch
            n_rows += batch.num_rows
    except _UNREADABLE as error:
        raise _unreadable(source.path, source.encoding, error, n_rows) from None
    if n_rows == 0:
        raise DataError(f"{source.path}: has no rows; expected at least one.")


def read_batches(
    path: str, columns: Sequence[str], layout: Layout = DETECTED, keys: Mapping[str, str] | None = None,
    lists: Sequence[str] = (),
) -> Iterator[pa.RecordBatch]:  # fmt: skip
    """Reads the named columns of a table as strings, a few megabytes at a time; missing cells become empty strings.

    Args:
        path: a local or remote file; its extension determines the format (.csv, .tsv, .jsonl, .parquet; the first three also
            with .gz).
        columns: distinct names of columns.
        layout: delimiter and encoding of a text table.
        keys: column -> the configuration's key that names it, for the message about a missing one.
        lists: columns whose cells may be lists, which become JSON.

    Yields:
        Batches of string columns, in the order of ``columns``. JSON numbers stay as they are written. Parquet floats that are
        whole numbers give ``"1"``, not ``"1.0"``.

    Raises:
        DataError: no such file, an empty one, a missing column, rows of different lengths, or text that is not UTF-8.
    """
    source = open_table(path, columns, layout, keys or "", all_names=False)
    yield from texts_of(path, read_cells(source, columns, lists), columns, lists)


def texts_of(
    path: str, batches: Iterable[pa.RecordBatch], columns: Sequence[str], lists: Sequence[str] = ()
) -> Iterator[pa.RecordBatch]:
    """Named columns of batches as strings; missing cells become empty, and lists in the columns ``lists`` JSON.

    Raises:
        DataError: see :func:`check_texts`.
    """
    n_rows = 0
    for batch in batches:
        texts = [check_texts(path, batch, name, n_rows, name in lists) for name in columns]
        n_rows += batch.num_rows
        yield pa.record_batch(texts, names=list(columns))


def read_table(path: str, columns: Sequence[str], layout: Layout = DETECTED, lists: Sequence[str] = ()) -> pa.Table:
    """Reads the named columns of a whole table; otherwise as :func:`read_batches`."""
    return pa.Table.from_batches(list(read_batches(path, columns, layout, lists=lists)))


def column_names(path: str, required: Sequence[str] = (), fix: str = "") -> list[str]:
    """The names of a table's columns, in order; otherwise as :func:`open_table`."""
    return open_table(path, required, fix=fix).names


def check_texts(path: str, batch: pa.RecordBatch, name: str, n_before: int, may_be_lists: bool = False) -> pa.StringArray:
    """A column as strings; null becomes empty, and lists JSON.

    Raises:
        DataError: cells that are no text: lists, objects, bytes that are not UTF-8.
    """
    field, column = batch.schema.field(name), batch[name]
    rows = f"rows {n_before + 1:,} to {n_before + batch.num_rows:,}"
    nested = pa.types.is_nested(field.type) or (is_json(field) and pc.any(pc.match_substring_regex(column, r"\A[\[{]")).as_py())
    if nested and not may_be_lists:
        kind = "lists or objects" if is_json(field) else field.type
        raise DataError(f"{path}: column {name} holds {kind} in {rows}; expected text, numbers or true and false.")
    try:
        if is_json(field):
            check_halves(column)
        return pc.fill_null(as_text(column, field), "")
    except (pa.ArrowException, UnicodeError) as error:
        raise DataError(f"{path}: column {name} cannot be read as text ({_shown(error)}; {rows}).") from None


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
        plain = pa.schema([pa.field(field.name, pa.string()) if is_json(field) else field for field in schema], schema.metadata)
        with pa.OSFile(str(path), "wb") as sink, pa.parquet.ParquetWriter(sink, plain, compression="zstd") as file:
            yield lambda table: file.write_table(_as_texts(table, plain))
    elif kind == "jsonl":
        with open(path, "w", encoding="utf-8") as file:
            yield lambda table: file.writelines(_json_lines(table))
    else:
        texts = pa.schema([field if _is_csv(field) else pa.field(field.name, pa.string()) for field in schema])
        options = pa.csv.WriteOptions(delimiter="\t" if kind == "tsv" else ",")
        with pa.OSFile(str(path), "wb") as sink, pa.csv.CSVWriter(sink, texts, write_options=options) as file:
            yield lambda table: file.write_table(_as_texts(table, texts))


def _similar_files(path: str) -> str:
    folder = Path(path).parent
    names = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    return nearest(Path(path).name, names) or (f"; {folder} has {some(names)}" if names else "")


def _is_csv(field: pa.Field) -> bool:
    """Whether Arrow writes a column to CSV as it is."""
    kinds = (pa.types.is_string, pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
    return not is_json(field) and any(is_kind(field.type) for is_kind in kinds)


def _as_texts(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with text in the columns whose type differs from the schema's."""
    columns = [
        as_text(column, field) if is_json(field) or field.type != target.type else column
        for column, field, target in zip(table.columns, table.schema, schema, strict=True)
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _json_lines(table: pa.Table) -> Iterator[str]:
    keys = [json.dumps(name, ensure_ascii=False) for name in table.column_names]
    columns = [as_json(column, field) for column, field in zip(table.columns, table.schema, strict=True)]
    for row in zip(*columns, strict=True):
        yield "{" + ", ".join(f"{key}: {cell}" for key, cell in zip(keys, row, strict=True) if cell is not None) + "}\n"


def _unreadable(path: str, encoding: str | None, error: BaseException, n_rows: int) -> DataError:
    kind = table_format(path)
    if kind != "parquet" and encoding is None:
        with contextlib.suppress(OSError, EOFError, zlib.error):
            check_utf8(path)
    after = f" after row {n_rows:,}" if n_rows else ""
    wrong = f"; check data.encoding={encoding}" if encoding is not None and isinstance(error, UnicodeError) else ""
    return DataError(f"{path}: not a readable {kind} table{after} ({_shown(error)}){wrong}.")


def _shown(error: BaseException) -> str:
    """An error's first line; it may quote a row of the table, so it is cut and has no control characters."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"[^ -~]", lambda character: ascii(character[0])[1:-1], line)[:200]
