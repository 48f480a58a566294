"""Reads CSV, TSV, JSON lines and Parquet tables in batches, so that only a few blocks are in memory."""

import csv
import gzip
import re
from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from sodaops.config.schema import table_format
from sodaops.errors import SHOWN, DataError, nearest, some
from sodaops.io.remote import local_copy

BLOCK_BYTES = 2 * 2**20  # Arrow reads about 30 of them ahead
MAX_BLOCK_BYTES = 64 * 2**20  # the longest row
MAX_BATCH_ROWS = 65_536
_COLUMN_KEYS = "Set data.text_column, data.label_column, data.vote_columns or data.slice_columns."
# From narrow to wide: how Arrow changes the type of a JSON column when later values need a wider one.
_WIDENING_ORDERS = ([pa.null(), pa.int64(), pa.float64()], [pa.null(), pa.timestamp("s"), pa.timestamp("ns"), pa.string()])


def stream_batches(path: str, columns: Sequence[str]) -> Iterator[tuple[pa.RecordBatch, frozenset[str]]]:
    """Reads the named columns of a table.

    Args:
        path: a local or remote file, whose extension determines the format.
        columns: distinct names of columns.

    Yields:
        A batch of these columns in the table's own types, and the names of the float columns that hold only whole numbers in
        the whole table.

    Raises:
        DataError: a missing column, or rows with more or fewer cells than the header.
        pyarrow.ArrowException, OSError, EOFError, csv.Error: the table is unreadable.
    """
    if table_format(path) != "parquet" and local_copy(path).stat().st_size == 0:
        expected = "one JSON object per line" if table_format(path) == "jsonl" else "a header and rows"
        raise DataError(f"{path}: the file is empty; expected {expected}.")
    read = {"csv": _csv, "tsv": _csv, "jsonl": _jsonl, "parquet": _parquet}[table_format(path)]
    return read(path, columns)


def read_header(path: str) -> list[str]:
    """The names of a table's columns, in order; for JSON lines, the keys of all lines."""
    kind = table_format(path)
    if kind == "parquet":
        return pq.read_schema(local_copy(path)).names
    return _csv_header(path) if kind in ("csv", "tsv") else list(_json_types(path)[0])


def check_columns(path: str, columns: Sequence[str], present: Sequence[str], fix: str = _COLUMN_KEYS) -> None:
    """Checks that a table has the required columns.

    Raises:
        DataError: one is missing, or occurs twice.
    """
    missing = [name for name in columns if name not in present]
    if missing:
        raise DataError(
            f"{path}: no column {', '.join(name + nearest(name, present) for name in missing)}; "
            f"the table has {some(list(present), 20)}. {fix}"
        )
    twice = sorted({name for name in columns if list(present).count(name) > 1})
    if twice:
        raise DataError(f"{path}: column {', '.join(twice)} occurs twice in the header; give each column its own name.")


def all_whole(column: pa.Array | pa.ChunkedArray) -> bool:
    """Whether all numbers are whole and below 2**53, where floats are exact; nulls are ignored."""
    whole = pc.and_(pc.equal(column, pc.floor(column)), pc.less(pc.abs(column), 2**53))
    return pc.all(whole).as_py() is not False


def _csv(path: str, columns: Sequence[str]) -> Iterator[tuple[pa.RecordBatch, frozenset[str]]]:
    check_columns(path, columns, _csv_header(path))
    n_read = 0
    try:
        for batch in _csv_batches(path, columns, BLOCK_BYTES):
            n_read += batch.num_rows
            yield batch, frozenset()
        return
    except pa.ArrowInvalid as error:
        if "straddling" not in str(error):  # Arrow's message if a row is longer than a block
            raise
    # Start again with larger blocks, and skip the rows that were yielded already.
    for batch in _csv_batches(path, columns, MAX_BLOCK_BYTES):
        n_skipped = min(n_read, batch.num_rows)
        n_read -= n_skipped
        if batch.num_rows > n_skipped:
            yield batch.slice(n_skipped), frozenset()


def _csv_batches(path: str, columns: Sequence[str], block_bytes: int) -> Iterator[pa.RecordBatch]:
    ragged: list[pa.csv.InvalidRow] = []
    n_ragged = 0

    def record(row: pa.csv.InvalidRow) -> str:  # skips the row, to find all of them before the error
        nonlocal n_ragged
        n_ragged += 1
        if n_ragged <= SHOWN:
            ragged.append(row)
        return "skip"

    with pa.csv.open_csv(
        local_copy(path),
        read_options=pa.csv.ReadOptions(block_size=block_bytes, use_threads=False),
        parse_options=pa.csv.ParseOptions(delimiter=_delimiter(path), newlines_in_values=True, invalid_row_handler=record),
        convert_options=pa.csv.ConvertOptions(
            include_columns=list(columns), column_types={name: pa.string() for name in columns}, strings_can_be_null=False
        ),
    ) as reader:
        yield from reader
    if ragged:
        where = ", ".join(f"row {r.number - 1 if r.number else '?'} ({r.actual_columns} cells)" for r in ragged)
        more = f" and {n_ragged - SHOWN} more" if n_ragged > SHOWN else ""
        raise DataError(
            f"{path}: {n_ragged} rows do not have the header's {ragged[0].expected_columns} cells: {where}{more}. "
            "Quote cells that contain a separator or a line break."
        )


def _csv_header(path: str) -> list[str]:
    opener = gzip.open if path.endswith(".gz") else open
    with opener(local_copy(path), "rt", encoding="utf-8-sig", errors="replace", newline="") as file:
        return next(csv.reader(file, delimiter=_delimiter(path)), [])


def _delimiter(path: str) -> str:
    return "\t" if table_format(path) == "tsv" else ","


def _parquet(path: str, columns: Sequence[str]) -> Iterator[tuple[pa.RecordBatch, frozenset[str]]]:
    with pq.ParquetFile(local_copy(path), buffer_size=2**20) as file:
        schema, footer = file.schema_arrow, file.metadata
        check_columns(path, columns, schema.names)
        n_bytes = 0
        for group in (footer.row_group(i) for i in range(footer.num_row_groups)):
            chunks = (group.column(j) for j in range(group.num_columns))
            n_bytes += sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] in columns)
        # Batches in which the requested columns have about BLOCK_BYTES.
        n_rows = min(MAX_BATCH_ROWS, max(1, BLOCK_BYTES * footer.num_rows // max(n_bytes, 1)))

        def read(names: Sequence[str]) -> Iterator[pa.RecordBatch]:
            return file.iter_batches(n_rows, columns=list(names), use_threads=False)

        floats = [name for name in columns if pa.types.is_floating(schema.field(name).type)]
        whole = _whole_columns(read, floats) if floats else frozenset()
        for batch in read(columns):
            yield batch.select(list(columns)), whole


def _whole_columns(read: Callable[[Sequence[str]], Iterator[pa.RecordBatch]], floats: Sequence[str]) -> frozenset[str]:
    """Those of the float columns that hold only whole numbers in the whole table."""
    whole = set(floats)
    for batch in read(floats):
        whole -= {name for name in whole if not all_whole(batch[name])}
    return frozenset(whole)


def _jsonl(path: str, columns: Sequence[str]) -> Iterator[tuple[pa.RecordBatch, frozenset[str]]]:
    types, whole = _json_types(path)
    check_columns(path, columns, list(types))
    known = {name: pa.string() if types[name] == pa.null() else types[name] for name in columns}
    parse = pa.json.ParseOptions(explicit_schema=pa.schema(list(known.items())), unexpected_field_behavior="ignore")
    for table in _json_tables(path, parse):
        for batch in table.select(list(columns)).to_batches(max_chunksize=MAX_BATCH_ROWS):
            yield batch, whole


def _json_types(path: str) -> tuple[dict[str, pa.DataType], frozenset[str]]:
    """The type of each column in the whole file, and the float columns that hold only whole numbers."""
    types: dict[str, pa.DataType] = {}
    fractional: set[str] = set()
    for table in _json_tables(path, pa.json.ParseOptions()):
        for field in table.schema:
            types[field.name] = _widened(field, types.get(field.name, pa.null()))
            is_number = pa.types.is_floating(field.type) or pa.types.is_integer(field.type)
            if is_number and not all_whole(table[field.name].cast(pa.float64(), safe=False)):
                fractional.add(field.name)
    if not types:
        raise pa.ArrowInvalid("Empty JSON file")
    return types, frozenset(name for name, kind in types.items() if pa.types.is_floating(kind)) - fractional


def _widened(field: pa.Field, before: pa.DataType) -> pa.DataType:
    """The type that Arrow gives a column of type ``before`` when the field's values follow."""
    kinds = [before, field.type]
    if before == field.type or before == pa.null() or all(map(pa.types.is_nested, kinds)):
        return field.type
    if field.type == pa.null():
        return before
    for order in _WIDENING_ORDERS:
        if all(kind in order for kind in kinds):
            return max(kinds, key=order.index)
    raise pa.ArrowInvalid(f"JSON parse error: Column(/{field.name}) changed from {before} to {field.type}")


def _json_tables(path: str, parse: pa.json.ParseOptions) -> Iterator[pa.Table]:
    n_rows = 0
    for block in _json_blocks(path):
        read = pa.json.ReadOptions(block_size=len(block) + 1, use_threads=False)
        try:
            table = pa.json.read_json(pa.BufferReader(block), read, parse)
        except pa.ArrowInvalid as error:  # Arrow counts rows from 0 within the block
            row = re.search(r"in row (\d+)", str(error))
            message = str(error).replace(row[0], f"in row {int(row[1]) + n_rows + 1}") if row else str(error)
            raise pa.ArrowInvalid(message) from None
        n_rows += table.num_rows
        yield table


def _json_blocks(path: str) -> Iterator[bytes]:
    """Blocks of whole lines, of about ``BLOCK_BYTES`` each."""
    with pa.input_stream(str(local_copy(path))) as file:
        rest = b""
        while data := file.read(BLOCK_BYTES):
            end = data.rfind(b"\n") + 1
            if end and (rest + data[:end]).strip():
                yield rest + data[:end]
            rest = data[end:] if end else rest + data
            if len(rest) > MAX_BLOCK_BYTES:
                raise pa.ArrowInvalid(f"a line has more than {MAX_BLOCK_BYTES:,} bytes")
        if rest.strip():
            yield rest
