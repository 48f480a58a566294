"""Opens text tables, which may be compressed or in another encoding, and reads the header of CSV and TSV."""

import codecs
import csv
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from sodaops.config.schema import table_format
from sodaops.config.sections import check_delimiter, check_encoding
from sodaops.errors import ConfigError, DataError
from sodaops.io.remote import local_copy

log = logging.getLogger(__name__)

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_GZIP = b"\x1f\x8b"
_OTHER_KINDS = {
    b"PK\x03\x04": "a zip archive or an Excel workbook; export the table as CSV in UTF-8",
    b"\xd0\xcf\x11\xe0": "an Excel workbook; export the table as CSV in UTF-8",
    b"PAR1": "a Parquet file; give it a name that ends in .parquet",
}


class Layout(NamedTuple):
    """How a text table is written; None: detected."""

    delimiter: str | None = None
    encoding: str | None = None  # None: UTF-8


DETECTED = Layout()


def layout_of(delimiter: str | None, encoding: str | None) -> Layout:
    """The layout of the options --delimiter and --encoding.

    Raises:
        ConfigError: a value that is not allowed.
    """
    try:
        return Layout(*(kind and check(kind) for kind, check in ((delimiter, check_delimiter), (encoding, check_encoding))))
    except ValueError as error:
        raise ConfigError(f"--delimiter {delimiter!r}, --encoding {encoding!r}: {error}.") from None


def open_text(path: str, encoding: str | None) -> pa.NativeFile:
    """The file's text in UTF-8, decompressed."""
    stream = pa.input_stream(str(local_copy(path)), compression="gzip" if path.lower().endswith(".gz") else None)
    return stream if encoding is None else pa.transcoding_input_stream(stream, encoding, "utf-8")


def check_content(path: str, encoding: str | None) -> None:
    """Checks by its first bytes that a file is what its name says.

    Raises:
        DataError: it is empty, compressed under another name, of another kind, or in UTF-16.
    """
    with open(local_copy(path), "rb") as file:
        start = file.read(4)
    name, is_gzip = Path(path).name, path.lower().endswith(".gz")
    if not start:
        expected = "one JSON object per line" if table_format(path) == "jsonl" else "a header and rows"
        raise DataError(f"{path}: the file is empty; expected {expected}.")
    if start.startswith(_GZIP) and not is_gzip:
        raise DataError(f"{path}: is compressed with gzip; rename it to {name}.gz.")
    if is_gzip and not start.startswith(_GZIP):
        raise DataError(f"{path}: is not compressed with gzip; rename it to {name[:-3]}.")
    with open_text(path, None) as stream:
        start = stream.read(4)
    for magic, kind in _OTHER_KINDS.items():
        if start.startswith(magic):
            raise DataError(f"{path}: is {kind}.")
    is_wide = codecs.lookup(encoding or "utf-8").name.startswith(("utf-16", "utf-32"))
    if not is_wide and (found := _wide_encoding(start)):
        raise DataError(f"{path}: is in {found.upper()}, not {(encoding or 'utf-8').upper()}; {encoding_fix(path, found)}")


def _wide_encoding(start: bytes) -> str | None:
    if start in (b"\xff\xfe\0\0", b"\0\0\xfe\xff"):
        return "utf-32"
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    if len(start) == 4 and start.count(0) == 2 and start[0::2].count(0) in (0, 2):  # ASCII characters of two bytes
        return "utf-16-le" if start[0] else "utf-16-be"
    return None


def encoding_fix(path: str, encoding: str) -> str:
    """How to read a table in another encoding, for messages."""
    save = f"iconv -f {encoding.upper()} -t UTF-8 {Path(path).name} > NEW"
    if path.lower().endswith(".gz"):
        save = f"gzip -dc {Path(path).name} | iconv -f {encoding.upper()} -t UTF-8 > NEW"
    return f"set data.encoding={encoding} (predict: --encoding {encoding}), or save the table as UTF-8 ({save})."


def check_utf8(path: str) -> None:
    """Finds the first byte of a text table that is not UTF-8.

    Raises:
        DataError: with its line and place.
    """
    with open_text(path, None) as stream, io.BufferedReader(stream) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path} line {number}, byte {error.start + 1}: 0x{line[error.start]:02x} is not UTF-8. If the file is in "
                    f"Latin-1 or a Western European Windows encoding, {encoding_fix(path, 'windows-1252')}"
                ) from None


def csv_header(path: str, required: Sequence[str], layout: Layout) -> tuple[str, list[str]]:
    """Finds the delimiter of a CSV or TSV table, and reads its header.

    Args:
        path: the table.
        required: columns that it should have. The usual delimiter of the format is used if its header has them, else another
            one with which the header has them, else the one that gives most columns.
        layout: may give the delimiter.

    Returns:
        The delimiter, and the names of the columns. Columns that only the rows have, all empty in the first row, as behind
        trailing commas, are named "".
    """
    usual = "\t" if table_format(path) == "tsv" else ","
    candidates = [layout.delimiter] if layout.delimiter else sorted(_DELIMITERS, key=lambda delimiter: delimiter != usual)
    headers = {delimiter: _header(path, delimiter, layout.encoding) for delimiter in candidates}
    fitting = [delimiter for delimiter, names in headers.items() if set(required) <= set(names)]
    delimiter = fitting[0] if fitting else max(headers, key=lambda each: len(headers[each]))
    if delimiter != usual and not layout.delimiter:
        log.info("%s: the columns are separated by %s", path, _DELIMITERS[delimiter])
    return delimiter, headers[delimiter]


def _header(path: str, delimiter: str, encoding: str | None) -> list[str]:
    with open_text(path, encoding) as stream, io.TextIOWrapper(stream, "utf-8-sig", errors="replace", newline="") as text:
        lines = csv.reader(text, delimiter=delimiter)
        try:
            names, first = next(lines, []), next(lines, [])
        except csv.Error:  # with another delimiter the quotes do not match
            return []
    extra = first[len(names) :]
    return names if any(extra) else names + extra
