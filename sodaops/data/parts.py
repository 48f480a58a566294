"""A part: some thousand rows of a table on their way to the splits, cleaned and hashed, in a file of its own.

Parts can be made in any order and in any process; a finished one is taken as it is by a run that goes on after a crash.
"""

import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sodaops.config.schema import DataConfig
from sodaops.errors import SHOWN, DataError
from sodaops.io import storage
from sodaops.text.bulk_cleaning import clean_many

PART_ROWS = 65_536
PART_BYTES = 8 * 2**20  # of raw cells; a part has one row at least
MAX_VALUES = 65_536  # different cells in the column of labels
_CRC_BYTES = 4
_SMALL = ["hash_hi", "hash_lo", "label"]  # the columns by which it is told what is kept; they come first


class PartsKeptError(DataError):
    """Something went wrong that another run may get over; the parts that are finished are kept for it."""


@dataclass(frozen=True)
class Part:
    """Where a part is, and which rows it holds."""

    path: Path
    table: str
    source: int  # the table's place among the sources
    first: int  # row number of its first row, from 1
    n_rows: int


@dataclass(frozen=True)
class Fault:
    """Rows of a table with the same fault: how many, the first few, and what the first one holds."""

    n_rows: int
    rows: list[int]
    value: str | int

    def and_later(self, other: "Fault") -> "Fault":
        """Both, of which the other has the later rows."""
        return Fault(self.n_rows + other.n_rows, (self.rows + other.rows)[:SHOWN], self.value)


def cut(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Slices that are small enough for a part each."""
    n_parts = max(-(-batch.num_rows // PART_ROWS), min(-(-batch.nbytes // PART_BYTES), batch.num_rows))
    size = -(-batch.num_rows // n_parts)
    yield from (batch.slice(start, size) for start in range(0, batch.num_rows, size))


def prepared(raw: pa.RecordBatch, first: int, config: DataConfig) -> pa.RecordBatch:
    """Cleans and hashes rows; a function of its arguments alone.

    Args:
        raw: string columns, as :func:`sodaops.data.sources.read_batches` gives them.
        first: row number of the first row, for the faults.
        config: conf/data.

    Returns:
        hash_hi and hash_lo (uint64: the first 128 bits of the clean text's SHA-256), label (dictionary of strings, as in
        the table), text (clean), vote_LABEL (int64) and slice_NAME (string) for each that is configured. The schema's
        metadata hold the faults as JSON: texts that are too long, which are left empty, and votes that are no numbers.
    """
    faults: dict[str, Fault] = {}
    texts = raw[config.text_column]
    n_chars = pc.utf8_length(texts)
    long = pc.greater(n_chars, config.max_chars)
    if pc.any(long).as_py():
        faults["long"] = _fault(long, n_chars, first)
        texts = pc.if_else(long, "", texts)
    clean = clean_many(texts, config.cleaning)
    hashes = hash_many(clean)
    columns = {
        "hash_hi": pa.array(hashes[:, 0]),
        "hash_lo": pa.array(hashes[:, 1]),
        "label": raw[config.label_column].dictionary_encode(),
        "text": clean,
    }
    for label, name in (config.vote_columns or {}).items():
        cells = raw[name]
        bad = pc.invert(pc.match_substring_regex(cells, r"\A[0-9]{0,18}\z"))
        if pc.any(bad).as_py():
            faults[f"vote_{label}"] = _fault(bad, cells, first)
            cells = pc.if_else(bad, "", cells)
        columns[f"vote_{label}"] = pc.if_else(pc.equal(cells, ""), "0", cells).cast(pa.int64())
    columns |= {f"slice_{name}": raw[name] for name in config.slice_columns}
    told = json.dumps({name: asdict(fault) for name, fault in faults.items()})
    return pa.RecordBatch.from_pydict(columns).replace_schema_metadata({"faults": told})


def hash_many(texts: pa.StringArray) -> np.ndarray:
    """The first 128 bits of each text's SHA-256, which :func:`sodaops.data.splits.text_hash` gives in full.

    Args:
        texts: string [n], without nulls.

    Returns:
        uint64 [n, 2]; the first column are the bits by which :func:`sodaops.data.splits.assign_split` goes.
    """
    sha256 = hashlib.sha256
    digests = b"".join([sha256(text).digest() for text in texts.cast(pa.binary()).to_pylist()])
    return np.frombuffer(digests, ">u8").reshape(-1, 4)[:, :2].astype(np.uint64)


def write_part(path: Path, rows: pa.RecordBatch) -> None:
    """Writes a part, whole or not at all: the CRC-32 of the rest in four bytes, and an Arrow IPC file.

    Raises:
        StorageError: the disk is full, or the folder cannot be written to.
    """
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, rows.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        writer.write_batch(rows)
    content = sink.getvalue()
    with storage.atomic_path(path) as name, open(name, "wb") as file:
        file.write(zlib.crc32(content).to_bytes(_CRC_BYTES, "big"))
        file.write(content)


def read_part(part: Part, small: bool = False) -> tuple[pa.RecordBatch, dict[str, Fault]]:
    """Reads a part.

    Args:
        part: which.
        small: only hash_hi, hash_lo and label.

    Returns:
        Its rows, as :func:`prepared` made them, and their faults.

    Raises:
        PartsKeptError: it is damaged or gone; it is deleted, so that the next run makes it anew.
    """
    try:
        whole, fault = memoryview(part.path.read_bytes()), "another checksum"
    except OSError as error:
        whole, fault = memoryview(b""), str(error.strerror)
    crc, content = bytes(whole[:_CRC_BYTES]), whole[_CRC_BYTES:]
    if crc != zlib.crc32(content).to_bytes(_CRC_BYTES, "big"):  # Arrow itself takes most of these, and dies of some
        part.path.unlink(missing_ok=True)
        raise PartsKeptError(f"{part.path}: a damaged part ({fault}); run it again, and it is made anew.")
    options = pa.ipc.IpcReadOptions(included_fields=list(range(len(_SMALL))) if small else None)
    with pa.ipc.open_file(pa.py_buffer(content), options=options) as reader:
        rows, told = reader.get_batch(0), json.loads(reader.schema.metadata[b"faults"])
    return rows, {name: Fault(**fault) for name, fault in told.items()}


def _fault(bad: pa.BooleanArray, values: pa.Array, first: int) -> Fault:
    places = np.flatnonzero(bad.to_numpy(zero_copy_only=False))
    return Fault(len(places), [first + int(place) for place in places[:SHOWN]], values[int(places[0])].as_py())
