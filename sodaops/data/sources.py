"""Reading a user's table: CSV, TSV, JSON lines or Parquet, always through pyarrow, every needed cell as a string.

Rows are counted from 1, the header not among them.
"""

import csv
import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from sodaops.config import FORMATS, table_format
from sodaops.errors import DataError, nearest, some

_KEYS = "Set data.text_column, data.label_column, data.vote_columns or data.slice_columns."
_UNREADABLE = (pa.ArrowException, OSError, EOFError, csv.Error)
_BLOCK_BYTES = 64 * 2**20  # a cell must fit into one block


def read_table(path: str, columns: Sequence[str], max_rows: int | None = None) -> pa.Table:
    """Reads the named columns of a table as strings; empty and missing cells become empty strings.

    Args:
        path: a file whose name tells its format (.csv, .tsv, .jsonl, .parquet; the first three also with .gz).
        columns: names in the header; each once.
        max_rows: keep only the first rows.

    Returns:
        A table of string columns, in the order asked for. Whole numbers stay whole: a Parquet or JSON column of
        integers with gaps gives ``"1"``, never ``"1.0"``.

    Raises:
        DataError: no such file, an empty one, a missing column, ragged rows, or text that is not UTF-8.
    """
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file{_beside(path)}. Set data.path to your table.")
    try:
        table = {"csv": _read_csv, "tsv": _read_csv, "jsonl": _read_jsonl, "parquet": _read_parquet}[table_format(path)](
            path, columns
        )
    except _UNREADABLE as error:
        _raise_if_not_utf8(path)
        raise DataError(f"{path}: not a readable {table_format(path)} table ({str(error).splitlines()[0]}).") from None
    if table.num_rows == 0:
        raise DataError(f"{path}: has no rows; expected a table with at least one row for each label.")
    for name in columns:
        if pa.types.is_nested(table[name].type):
            raise DataError(f"{path}: column {name} holds {table[name].type}; expected text, numbers or true and false.")
    try:
        return pa.table({name: as_strings(table[name]) for name in columns}).slice(0, max_rows)
    except pa.ArrowException as error:
        raise DataError(f"{path}: a cell cannot be read as text ({str(error).splitlines()[0]}).") from None


def column_names(path: str, required: Sequence[str] = (), mend: str = "") -> list[str]:
    """The columns of a table, in order.

    Raises:
        DataError: no such file, one that cannot be read, or a required column that is not there.
    """
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file{_beside(path)}.")
    kind = table_format(path)
    if kind is None:
        raise DataError(f"{path}: expected a name that ends in {', '.join(FORMATS)}.")
    try:
        if kind == "parquet":
            names = pa.parquet.read_schema(path).names
        else:
            names = _header(path) if kind in ("csv", "tsv") else _jsonl(path).column_names
    except _UNREADABLE as error:
        raise DataError(f"{path}: not a readable {kind} table ({str(error).splitlines()[0]}).") from None
    _require(path, required, names, mend)
    return list(names)


def write_table(table: pa.Table, path: str | Path, kind: str) -> None:
    """Writes a table in the named format: csv, tsv, jsonl or parquet."""
    if kind == "parquet":
        pa.parquet.write_table(table, path, compression="zstd")
    elif kind == "jsonl":
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist())
    else:
        pa.csv.write_csv(table, path, pa.csv.WriteOptions(delimiter="\t" if kind == "tsv" else ","))


def _beside(path: str) -> str:
    folder = Path(path).parent
    names = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    return nearest(Path(path).name, names) or (f"; {folder} has {some(names)}" if names else "")


def _require(path: str, columns: Sequence[str], present: Sequence[str], mend: str = _KEYS) -> None:
    missing = [name for name in columns if name not in present]
    if missing:
        raise DataError(
            f"{path}: no column {', '.join(name + nearest(name, present) for name in missing)}; "
            f"the table has {some(list(present), 20)}. {mend}"
        )
    twice = sorted({name for name in columns if list(present).count(name) > 1})
    if twice:
        raise DataError(f"{path}: column {', '.join(twice)} stands twice in the header; give each its own name.")


def _read_csv(path: str, columns: Sequence[str]) -> pa.Table:
    if Path(path).stat().st_size == 0:
        raise DataError(f"{path}: the file is empty; expected a header and rows.")
    ragged: list[pa.csv.InvalidRow] = []

    def note(row: pa.csv.InvalidRow) -> str:
        ragged.append(row)
        return "skip"

    _require(path, columns, _header(path))
    table = pa.csv.read_csv(
        path,
        read_options=pa.csv.ReadOptions(block_size=_BLOCK_BYTES, use_threads=False),
        parse_options=pa.csv.ParseOptions(delimiter=_delimiter(path), newlines_in_values=True, invalid_row_handler=note),
        convert_options=pa.csv.ConvertOptions(
            include_columns=list(columns), column_types={name: pa.string() for name in columns}, strings_can_be_null=False
        ),
    )
    if ragged:
        where = some([f"row {r.number - 1 if r.number else '?'} ({r.actual_columns} cells)" for r in ragged])
        raise DataError(
            f"{path}: {len(ragged)} rows do not have the header's {ragged[0].expected_columns} cells: {where}. "
            "Put cells that hold a separator or a line break into double quotes."
        )
    return table


def _delimiter(path: str) -> str:
    return "\t" if table_format(path) == "tsv" else ","


def _header(path: str) -> list[str]:
    opener = gzip.open if path.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8-sig", errors="replace", newline="") as file:
        return next(csv.reader(file, delimiter=_delimiter(path)), [])


def _read_jsonl(path: str, columns: Sequence[str]) -> pa.Table:
    if Path(path).stat().st_size == 0:
        raise DataError(f"{path}: the file is empty; expected one JSON object a line.")
    table = _jsonl(path)
    _require(path, columns, table.column_names)
    return table


def _jsonl(path: str) -> pa.Table:
    return pa.json.read_json(path, read_options=pa.json.ReadOptions(block_size=_BLOCK_BYTES))


def _read_parquet(path: str, columns: Sequence[str]) -> pa.Table:
    _require(path, columns, pa.parquet.read_schema(path).names)
    return pa.parquet.read_table(path, columns=list(columns))


def as_strings(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column as strings, nulls as empty ones, whole floats as whole numbers.

    >>> as_strings(pa.chunked_array([[1.0, None, 2.0]])).to_pylist()
    ['1', '', '2']
    """
    if pa.types.is_floating(column.type):
        whole = pc.and_(pc.equal(column, pc.floor(column)), pc.less(pc.abs(column), 2**53))
        if pc.all(whole).as_py() is not False:
            column = column.cast(pa.int64())
    return pc.fill_null(column.cast(pa.string()), "")


def _raise_if_not_utf8(path: str) -> None:
    if table_format(path) == "parquet" or path.endswith(".gz"):
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path} line {number}, byte {error.start + 1}: 0x{line[error.start]:02x} is not UTF-8. "
                    f"Save the table as UTF-8 (for example: iconv -f WINDOWS-1252 -t UTF-8 {Path(path).name})."
                ) from None
