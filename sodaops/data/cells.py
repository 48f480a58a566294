"""Cells of any type as text or as JSON, for the readers and writers of tables."""

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sodaops.data.json_lines import JSON_CELLS, text_of_json, valid_unicode
from sodaops.text.columns import SEPARATOR

_JSON_FLOATS = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


def as_text(column: pa.Array | pa.ChunkedArray, field: pa.Field | None = None) -> pa.Array:
    """A column as strings; nulls stay null. Lists and objects become JSON, and floats that are whole numbers lose their ``.0``.

    Args:
        column: of any type.
        field: its field; one with :data:`~sodaops.data.json_lines.JSON_CELLS` has strings that are JSON.

    Raises:
        pyarrow.ArrowException: bytes that are not UTF-8.

    >>> as_text(pa.array([1.0, None, 2.5])).to_pylist()
    ['1', None, '2.5']
    """
    column = plain(column)
    if is_json(field):
        return pa.array([text_of_json(cell) for cell in column.to_pylist()], pa.string())
    if pa.types.is_nested(column.type):
        return pa.array([None if cell is None else _dump(cell) for cell in column.to_pylist()], pa.string())
    if pa.types.is_floating(column.type):
        # Arrow writes 1e10 for 10000000000, which is an identifier more often than a measurement.
        whole = pc.and_(pc.equal(column, pc.floor(column)), pc.less(pc.abs(column), 2**53))
        whole = pc.fill_null(pc.and_(whole, pc.not_equal(column, 0)), False)
        integers = pc.if_else(whole, column, 0).cast(pa.int64()).cast(pa.string())
        return pc.if_else(whole, integers, column.cast(pa.string()))
    try:
        text = column.cast(pa.string())
    except pa.ArrowNotImplementedError:
        return pa.array([None if cell is None else str(cell) for cell in column.to_pylist()], pa.string())
    text.validate(full=True)  # the reader of Parquet does not check UTF-8
    return text


def join_texts(columns: Sequence[pa.StringArray]) -> pa.StringArray:
    """Columns of texts as one, in which the parts are joined as by :func:`sodaops.text.columns.join`; one stays as it is."""
    if len(columns) == 1:
        return columns[0]
    return pc.binary_join_element_wise(
        *(pc.replace_substring(pc.fill_null(column, ""), SEPARATOR, "") for column in columns), SEPARATOR
    )


def as_json(column: pa.Array | pa.ChunkedArray, field: pa.Field) -> list[str | None]:
    """A column as JSON values; None where a row of a JSON table has no such key."""
    column = plain(column)
    if is_json(field):
        return column.to_pylist()
    kind = column.type
    if pa.types.is_nested(kind):
        return [_dump(cell) for cell in column.to_pylist()]
    if pa.types.is_floating(kind):
        return [_float(cell) for cell in column.cast(pa.string()).to_pylist()]
    cells = as_text(column, field).to_pylist()
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_decimal(kind):
        return [cell or "null" for cell in cells]
    return [json.dumps(cell, ensure_ascii=False) for cell in cells]


def is_json(field: pa.Field | None) -> bool:
    """Whether the cells of a column are JSON as in the file."""
    return field is not None and JSON_CELLS.items() <= (field.metadata or {}).items()


def check_halves(cells: pa.StringArray) -> None:
    r"""Refuses JSON cells with half of a character, such as ``\\ud83d`` alone.

    Raises:
        UnicodeEncodeError: for the first of them.
    """
    for cell in cells.filter(pc.match_substring_regex(cells, r"\\u[dD][89a-fA-F]")).to_pylist():
        json.loads(cell).encode()


def is_text(column: pa.Array) -> bool:
    """Whether a column can be written as text: it has no bytes that are not UTF-8."""
    try:
        as_text(column)
    except pa.ArrowInvalid:
        return False
    return True


def plain(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """One array, without dictionaries and extension types."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if isinstance(column.type, pa.BaseExtensionType):
        column = column.storage
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _dump(cell: Any) -> str:
    return valid_unicode(json.dumps(cell, ensure_ascii=False, default=_inner))


def _inner(value: Any) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def _float(text: str | None) -> str:
    if text is None:
        return "null"
    return _JSON_FLOATS.get(text) or (text if "." in text or "e" in text else f"{text}.0")
