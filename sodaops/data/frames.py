"""Tables in memory, for the Python API. pandas is not imported here, since a caller with a DataFrame has imported it."""

import hashlib
import io
import logging
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sodaops.data.cells import plain
from sodaops.errors import DataError, nearest, some
from sodaops.io import storage

log = logging.getLogger(__name__)
FOLDER = Path("data/tables")


def is_frame(data: object) -> bool:
    """Whether something is a pandas DataFrame."""
    return "pandas" in sys.modules and isinstance(data, sys.modules["pandas"].DataFrame)


def named_columns(data: Any) -> dict[str, Any]:
    """Name -> column of a DataFrame (without its index), of what exports an Arrow stream, or of rows as dictionaries.

    Raises:
        DataError: something else, no rows, or names that are repeated or are neither text nor a number.
    """
    if is_frame(data):
        columns = [(name, data.iloc[:, i]) for i, name in enumerate(data.columns)]
    elif hasattr(data, "__arrow_c_stream__"):
        table = pa.table(data)
        columns = list(zip(table.column_names, table.columns, strict=True))
    else:
        columns = _columns_of_rows(data)
    for name, _ in columns:
        if not isinstance(name, str | int | np.integer):
            raise DataError(f"column {name!r}: expected a name that is text, not {type(name).__name__}; rename it.")
    names = [str(name) for name, _ in columns]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise DataError(f"the table has several columns {some(sorted(repeated))}; rename all but one of each.")
    if not columns or not len(columns[0][1]):
        raise DataError("the table has no rows; expected at least one. (A generator can be read only once.)")
    return dict(zip(names, (column for _, column in columns), strict=True))


def _columns_of_rows(data: Any) -> list[tuple[object, Any]]:
    if not isinstance(data, Iterable) or isinstance(data, str | bytes | Mapping):
        raise DataError(f"expected a path, a DataFrame, an Arrow table, or rows as dictionaries; got {type(data).__name__}.")
    rows = list(data)
    if other := [i for i, row in enumerate(rows, 1) if not isinstance(row, Mapping)]:
        raise DataError(
            f"row {some(other)}: expected a dictionary from column to cell, got {type(rows[other[0] - 1]).__name__}."
        )
    return [(name, [row.get(name) for row in rows]) for name in dict.fromkeys(name for row in rows for name in row)]


def check_column(name: str, columns: Mapping[str, Any], data: Any) -> None:
    """Raises a DataError if a table, which has these columns, lacks one."""
    if name not in columns:
        is_index = name in getattr(getattr(data, "index", None), "names", ())
        hint = "; it is the index: call .reset_index() first" if is_index else nearest(name, columns)
        raise DataError(f"column {name}: not in the table{hint}; it has {some(list(columns), 20)}.")


def to_array(name: str, column: Any) -> pa.Array:
    """A column in Arrow's types, one for each content: categories become their values, and all kinds of text ``string``.

    Raises:
        DataError: the cells have no common type.
    """
    try:
        array = plain(column if isinstance(column, pa.ChunkedArray) else pa.array(column, from_pandas=True))
        return array.cast(pa.string()) if array.type in (pa.large_string(), pa.string_view()) else array
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        kinds = ", ".join(sorted({type(cell).__name__ for cell in column} - {"NoneType", "NAType"}))
        first = str(error).partition("\n")[0]
        raise DataError(f"column {name}: cells of {kinds} ({first}); convert them to one type, as by .astype(str).") from None


def write_table(data: Any, needed: Collection[str]) -> str:
    """Writes a table to :data:`FOLDER`, under a name made from its content, so that the same table is the same file.

    Args:
        data: as for :func:`named_columns`.
        needed: columns that it must have. Others that Arrow cannot hold are left out, with a warning.

    Returns:
        The path.
    """
    columns, arrays = named_columns(data), {}
    for name in needed:
        check_column(name, columns, data)
    for name, column in columns.items():
        try:
            arrays[name] = to_array(name, column)
        except DataError as error:
            if name in needed:
                raise
            log.warning("left out %s", error)
    content = io.BytesIO()
    pq.write_table(pa.table(arrays), content, compression="zstd")
    path = FOLDER / f"table-{hashlib.sha256(content.getbuffer()).hexdigest()[:12]}.parquet"
    with storage.atomic_path(path) as file:
        file.write_bytes(content.getbuffer())
    return str(path)
