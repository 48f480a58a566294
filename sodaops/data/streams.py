"""Reads CSV, TSV, JSON lines and Parquet tables in batches, so that only a few blocks are in memory."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from sodaops.config.schema import table_format
from sodaops.data.json_lines import json_batches, json_names, raw_json_batches, unique_name
from sodaops.data.text_files import DETECTED, Layout, check_content, csv_header, open_text
from sodaops.errors import SHOWN, DataError, nearest, some
from sodaops.io.remote import local_copy

log = logging.getLogger(__name__)

BLOCK_BYTES = 2 * 2**20  # Arrow reads about 30 of them ahead
MAX_BLOCK_BYTES = 64 * 2**20  # the longest row
MAX_BATCH_ROWS = 65_536


@dataclass(frozen=True)
class Source:
    """A table whose header has been read."""

    path: str
    kind: str  # csv, tsv, jsonl or parquet
    names: list[str]  # of the columns, in order; a name that occurs again has a number
    required: tuple[str, ...]
    encoding: str | None = None
    delimiter: str = ","


def open_table(
    path: str, required: Sequence[str], layout: Layout = DETECTED, fix: str | Mapping[str, str] = "", all_names: bool = False
) -> Source:
    """Reads a table's header.

    Args:
        path: a local or remote file, whose extension determines the format.
        required: columns that the table must have once.
        layout: delimiter and encoding of a text table.
        fix: how to fix a missing column, for the message; or column -> the key that names it.
        all_names: read all JSON lines for their keys, instead of those before the required ones are found.

    Raises:
        DataError: another kind of file, or a required column is missing or occurs twice.
        pyarrow.ArrowException, OSError, EOFError, ValueError: the table is unreadable.
    """
    kind, encoding, delimiter = table_format(path), layout.encoding, ","
    if kind == "parquet":
        names = pq.read_schema(local_copy(path)).names
    else:
        check_content(path, encoding)
        if kind == "jsonl":
            names = json_names(path, encoding, BLOCK_BYTES, required, all_names)
        else:
            delimiter, names = csv_header(path, required, layout)
    check_columns(path, required, names, fix)
    unique = _unique_names(names)
    renamed = [f"{name!r} is now {new!r}" for name, new in zip(names, unique, strict=True) if name != new]
    if renamed and all_names:
        log.warning("%s: columns with the same name were renamed: %s", path, some(renamed))
    return Source(path, kind, unique, tuple(required), encoding, delimiter)


def _unique_names(names: Sequence[str]) -> list[str]:
    unique: list[str] = []
    for name in names:
        unique.append(unique_name(name, {*names, *unique}) if name in unique else name)
    return unique


def stream_batches(source: Source, columns: Sequence[str] | None = None, lists: Sequence[str] = ()) -> Iterator[pa.RecordBatch]:
    """Reads a table.

    Args:
        source: the table.
        lists: those of the columns whose JSON cells may be lists.
        columns: the columns to read; None: all, with JSON cells as JSON (:data:`sodaops.data.json_lines.JSON_CELLS`).

    Yields:
        A batch in the table's own types.

    Raises:
        DataError: rows with more or fewer cells than the header.
        pyarrow.ArrowException, OSError, EOFError, ValueError: the table is unreadable.
    """
    if source.kind == "parquet":
        return _parquet(source, columns)
    if source.kind == "jsonl":
        if columns is not None:
            return json_batches(source.path, source.encoding, BLOCK_BYTES, columns, MAX_BATCH_ROWS, lists)
        return raw_json_batches(source.path, source.encoding, BLOCK_BYTES, source.names, source.required, MAX_BATCH_ROWS)
    return _csv(source, columns)


def check_columns(path: str, columns: Sequence[str], present: Sequence[str], fix: str | Mapping[str, str] = "") -> None:
    """Checks that a table has the required columns.

    Raises:
        DataError: one is missing, or occurs twice.
    """
    missing = [name for name in columns if name not in present]
    if missing:
        if not isinstance(fix, str):
            fix = f"Set {' and '.join(f'{key}=NAME' for key in dict.fromkeys(fix[name] for name in missing))}."
        names = some([name if name.isprintable() else ascii(name) for name in present], 20)
        raise DataError(
            f"{path}: no column {', '.join(name + nearest(name, present) for name in missing)}; the table has {names}. {fix}"
        )
    twice = sorted({name for name in columns if list(present).count(name) > 1})
    if twice:
        raise DataError(f"{path}: column {', '.join(twice)} occurs twice in the header; give each column its own name.")


def _csv(source: Source, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
    n_read = 0
    try:
        for batch in _csv_batches(source, columns, BLOCK_BYTES):
            n_read += batch.num_rows
            yield batch
        return
    except pa.ArrowInvalid as error:
        if "straddling" not in str(error):  # Arrow's message if a row is longer than a block
            raise
    # Start again with larger blocks, and skip the rows that were yielded already.
    for batch in _csv_batches(source, columns, MAX_BLOCK_BYTES):
        n_skipped = min(n_read, batch.num_rows)
        n_read -= n_skipped
        if batch.num_rows > n_skipped:
            yield batch.slice(n_skipped)


def _csv_batches(source: Source, columns: Sequence[str] | None, block_bytes: int) -> Iterator[pa.RecordBatch]:
    ragged: list[pa.csv.InvalidRow] = []
    n_ragged = 0

    def record(row: pa.csv.InvalidRow) -> str:  # skips the row, to find all of them before the error
        nonlocal n_ragged
        n_ragged += 1
        if n_ragged <= SHOWN:
            ragged.append(row)
        return "skip"

    selected = source.names if columns is None else list(columns)
    with pa.csv.open_csv(
        open_text(source.path, source.encoding),
        read_options=pa.csv.ReadOptions(
            block_size=block_bytes, use_threads=False, column_names=source.names, skip_rows_after_names=1
        ),
        parse_options=pa.csv.ParseOptions(delimiter=source.delimiter, newlines_in_values=True, invalid_row_handler=record),
        convert_options=pa.csv.ConvertOptions(
            include_columns=selected, column_types=dict.fromkeys(selected, pa.string()), strings_can_be_null=False
        ),
    ) as reader:
        yield from reader
    if ragged:
        where = ", ".join(f"row {r.number - 1 if r.number else '?'} ({r.actual_columns} cells)" for r in ragged)
        more = f" and {n_ragged - SHOWN} more" if n_ragged > SHOWN else ""
        raise DataError(
            f"{source.path}: {n_ragged} rows do not have the header's {ragged[0].expected_columns} cells: {where}{more}. "
            "Quote cells that contain a separator or a line break."
        )


def _parquet(source: Source, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(local_copy(source.path), buffer_size=2**20) as file:
        footer = file.metadata
        n_bytes = 0
        for group in (footer.row_group(i) for i in range(footer.num_row_groups)):
            chunks = (group.column(j) for j in range(group.num_columns))
            n_bytes += sum(
                c.total_uncompressed_size for c in chunks if columns is None or c.path_in_schema.split(".")[0] in columns
            )
        # Batches in which the requested columns have about BLOCK_BYTES.
        n_rows = min(MAX_BATCH_ROWS, max(1, BLOCK_BYTES * footer.num_rows // max(n_bytes, 1)))
        for batch in file.iter_batches(n_rows, columns=None if columns is None else list(columns), use_threads=False):
            if columns is not None:
                yield batch.select(list(columns))
                continue
            fields = [field.with_name(name) for field, name in zip(batch.schema, source.names, strict=True)]
            yield pa.RecordBatch.from_arrays(batch.columns, schema=pa.schema(fields, batch.schema.metadata))
