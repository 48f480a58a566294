"""Reads JSON lines without changing a cell: numbers keep their digits, strings stay strings."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from sodaops.data.text_files import open_text
from sodaops.errors import DataError

MAX_LINE_BYTES = 64 * 2**20
JSON_CELLS = {b"cells": b"json"}  # metadata of a column whose cells are JSON, as in the file; null: the row has no such key
# Numbers stay text, and objects become tuples of pairs, in which a repeated key is seen.
_DECODER = json.JSONDecoder(object_pairs_hook=tuple, parse_int=str, parse_float=str, parse_constant=str)
_START = re.compile(r"\s*\{\s*(}?)", re.ASCII).match
_KEY = re.compile(r'\s*("(?:[^"\\\x00-\x1f]|\\.)*")\s*:\s*', re.ASCII).match
_SEPARATOR = re.compile(r"\s*([,}])", re.ASCII).match
_BOM = b"\xef\xbb\xbf"
_LITERALS = {None: "", True: "true", False: "false"}

Row = dict[str, Any]


def json_names(path: str, encoding: str | None, block_bytes: int, required: Sequence[str], all_names: bool) -> list[str]:
    """The keys of the lines, in order of appearance: of all lines, or of as many blocks as it takes to find the required."""
    names: dict[str, None] = {}
    for rows in _blocks_of_rows(path, encoding, block_bytes, lambda line: _as_json(line, required)):
        for row in rows:
            names |= dict.fromkeys(row)
        if not all_names and set(required) <= names.keys():
            break
    return list(names)


def json_batches(
    path: str, encoding: str | None, block_bytes: int, columns: Sequence[str], max_rows: int, lists: Sequence[str] = ()
) -> Iterator[pa.RecordBatch]:
    """The cells of some columns as text; a missing key and null become empty, and lists in the columns ``lists`` JSON.

    Raises:
        DataError: a line that is not an object, a repeated key, or another cell that is a list or an object.
    """
    for rows in _blocks_of_rows(path, encoding, block_bytes, lambda line: _as_text(line, columns, lists)):
        for start in range(0, len(rows), max_rows):
            cells = [[row[name] for row in rows[start : start + max_rows]] for name in columns]
            yield pa.RecordBatch.from_arrays([pa.array(column, pa.string()) for column in cells], list(columns))


def raw_json_batches(
    path: str, encoding: str | None, block_bytes: int, columns: Sequence[str], once: Sequence[str], max_rows: int
) -> Iterator[pa.RecordBatch]:
    """The cells of some columns as JSON, byte for byte as in the file; see :data:`JSON_CELLS`.

    Raises:
        DataError: a line that is not an object, or in which a key of ``once`` is repeated.
    """
    schema = pa.schema([pa.field(name, pa.string(), metadata=JSON_CELLS) for name in columns])
    for rows in _blocks_of_rows(path, encoding, block_bytes, lambda line: _as_json(line, once)):
        for start in range(0, len(rows), max_rows):
            cells = [[row.get(name) for row in rows[start : start + max_rows]] for name in columns]
            yield pa.RecordBatch.from_arrays([pa.array(column, pa.string()) for column in cells], schema=schema)


def text_of_json(cell: str | None) -> str | None:
    """A JSON cell as text; None for null and a missing one.

    >>> text_of_json('"a\\\\nb"'), text_of_json("1.50"), text_of_json("null")
    ('a\\nb', '1.50', None)
    """
    if cell is None or cell == "null":
        return None
    return valid_unicode(json.loads(cell)) if cell[0] == '"' else cell


def valid_unicode(text: str) -> str:
    r"""The text with ``\udXXX`` written out for half of a character that UTF-16 writes in two."""
    return text.encode("utf-8", "backslashreplace").decode()


def _as_text(line: str, columns: Sequence[str], lists: Sequence[str]) -> Row:
    members = _DECODER.decode(line)
    if type(members) is not tuple:
        raise ValueError("expected an object, {…}")
    row = dict(members)
    if len(row) < len(members):
        keys = [key for key, _ in members]
        if twice := [name for name in columns if keys.count(name) > 1]:
            raise ValueError(f"{', '.join(twice)} occurs twice")
    cells = {}
    for name in columns:
        value = row.get(name)
        if isinstance(value, list) and name in lists:
            value = json.dumps(value, ensure_ascii=False)
        if type(value) is not str:
            if isinstance(value, list | tuple):
                kind = "a list" if isinstance(value, list) else "an object"
                raise ValueError(f"column {name} holds {kind}; expected text, a number, true or false")
            value = _LITERALS[value]
        cells[name] = value
    return cells


def _as_json(line: str, once: Sequence[str]) -> Row:
    """Key -> cell as it stands in the line; a repeated key gets a number, unless it may occur only once."""
    row: Row = {}
    if (start := _START(line)) is None:
        raise ValueError("expected an object, {…}")
    place, is_end = start.end(), start[1]
    while not is_end:
        key = _KEY(line, place)
        if key is None:
            raise json.JSONDecodeError("Expecting a key in quotes and a colon", line, place)
        _, place = _DECODER.raw_decode(line, key.end())
        name = valid_unicode(json.loads(key[1])) if "\\" in key[1] else key[1][1:-1]
        if name in row:
            if name in once:
                raise ValueError(f"{name} occurs twice")
            name = unique_name(name, row)
        row[name] = line[key.end() : place]
        separator = _SEPARATOR(line, place)
        if separator is None:
            raise json.JSONDecodeError("Expecting a comma or }", line, place)
        place, is_end = separator.end(), separator[1] == "}"
    if line[place:].strip(" \t\n\r"):
        raise json.JSONDecodeError("Extra data", line, place)
    return row


def unique_name(name: str, taken: Any) -> str:
    """A name that is not taken: ``id``, or ``id_2`` and so on."""
    number, unique = 1, name
    while unique in taken:
        number += 1
        unique = f"{name}_{number}"
    return unique


def _blocks_of_rows(
    path: str, encoding: str | None, block_bytes: int, parse: Callable[[str], Row]
) -> Iterator[list[Row]]:  # fmt: skip
    """The rows of about ``block_bytes`` bytes at a time."""
    n_rows = 0
    for block in _blocks(path, encoding, block_bytes):
        rows: list[Row] = []
        for line in filter(bytes.strip, block.split(b"\n")):
            try:
                rows.append(parse(line.decode("utf-8")))
            except UnicodeDecodeError:
                raise  # the caller finds its line
            except (ValueError, RecursionError) as error:
                reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
                raise DataError(
                    f"{path}: not a readable jsonl table in row {n_rows + len(rows) + 1} ({reason}); expected one JSON object "
                    "per line."
                ) from None
        n_rows += len(rows)
        if rows:
            yield rows


def _blocks(path: str, encoding: str | None, block_bytes: int) -> Iterator[bytes]:
    """Blocks of whole lines."""
    with open_text(path, encoding) as file:
        rest = file.read(len(_BOM)).removeprefix(_BOM)
        while data := file.read(block_bytes):
            end = data.rfind(b"\n") + 1
            if end:
                yield rest + data[:end]
            rest = data[end:] if end else rest + data
            if len(rest) > MAX_LINE_BYTES:
                raise DataError(f"{path}: a line has more than {MAX_LINE_BYTES:,} bytes.")
        if rest:
            yield rest
