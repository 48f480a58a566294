"""A part: some thousand rows of a table, cleaned and hashed, in a temporary file.

Parts can be made in any order and by any process. After a crash the next run uses those that are finished.
"""

import functools
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
from sodaops.data.cells import join_texts
from sodaops.errors import SHOWN, DataError
from sodaops.io import storage
from sodaops.tasks.base import Task
from sodaops.text.bulk_cleaning import clean_many
from sodaops.text.columns import SEPARATOR

PART_ROWS = 65_536
PART_BYTES = 8 * 2**20  # of raw cells; a part has at least one row
_CRC_BYTES = 4
_SELECTION_COLUMNS = ["hash_hi", "hash_lo", "label"]  # a part's first columns, which select_rows needs


class PartsKeptError(DataError):
    """An error after which another run may succeed; the finished parts are kept for it."""


@dataclass(frozen=True)
class Part:
    """A part's file, and the rows that it holds."""

    path: Path
    table: str
    source: int  # index of the table among the sources
    first: int  # number of its first row, from 1
    n_rows: int


@dataclass(frozen=True)
class Fault:
    """Rows of a table with the same fault: their number, the first few, and the value in the first one."""

    n_rows: int
    rows: list[int]
    value: str | int

    def merge(self, later: "Fault") -> "Fault":
        """This fault and the same one in later rows."""
        return Fault(self.n_rows + later.n_rows, (self.rows + later.rows)[:SHOWN], self.value)


def split_batch(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Slices of a batch that are small enough for one part each."""
    n_parts = max(-(-batch.num_rows // PART_ROWS), min(-(-batch.nbytes // PART_BYTES), batch.num_rows))
    size = -(-batch.num_rows // n_parts)
    yield from (batch.slice(start, size) for start in range(0, batch.num_rows, size))


def prepare_rows(raw: pa.RecordBatch, first: int, config: DataConfig, task: Task) -> pa.RecordBatch:
    """Cleans and hashes rows.

    Args:
        raw: string columns, as :func:`sodaops.data.sources.read_batches` gives them.
        first: number of the first row, for the faults.
        config: conf/data.
        task: gives the cells of the targets.

    Returns:
        The columns hash_hi and hash_lo (uint64: the first 128 bits of the clean text's SHA-256), label (dictionary of
        strings: the cells of the targets), text (clean; several columns are joined, see :mod:`sodaops.text.columns`), and
        vote_LABEL (int64) and slice_NAME (string) for the configured ones. The schema's metadata hold the faults as JSON: too
        long texts, which become empty, and votes that are not numbers.
    """
    clean, n_chars = clean_texts(raw, config)
    too_long = pc.greater(n_chars, config.max_chars)
    faults = {"long": _fault(too_long, n_chars, first)} if pc.any(too_long).as_py() else {}
    hashes = hash_many(clean)
    columns = {
        "hash_hi": pa.array(hashes[:, 0]),
        "hash_lo": pa.array(hashes[:, 1]),
        "label": task.cells(raw, config).dictionary_encode(),
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
    faults_json = json.dumps({name: asdict(fault) for name, fault in faults.items()})
    return pa.RecordBatch.from_pydict(columns).replace_schema_metadata({"faults": faults_json})


def clean_texts(raw: pa.RecordBatch, config: DataConfig) -> tuple[pa.StringArray, pa.IntegerArray]:
    """Texts, clean, of several columns joined; and their characters before that. Too long ones become empty."""
    texts = [raw[name] for name in config.text_columns]
    n_chars = functools.reduce(pc.add, map(pc.utf8_length, texts))
    too_long = pc.greater(n_chars, config.max_chars)
    if pc.any(too_long).as_py():
        texts = [pc.if_else(too_long, "", text) for text in texts]
    clean = join_texts([clean_many(text, config.cleaning) for text in texts])
    if len(texts) > 1:
        clean = pc.if_else(pc.equal(pc.utf8_trim(clean, SEPARATOR), ""), "", clean)  # no part has anything left
    return clean, n_chars


def hash_many(texts: pa.StringArray) -> np.ndarray:
    """The first 128 bits of each text's SHA-256, see :func:`sodaops.data.splits.text_hash`.

    Args:
        texts: string [n], without nulls.

    Returns:
        uint64 [n, 2]; the first column determines the split, as in :func:`sodaops.data.splits.assign_split`.
    """
    sha256 = hashlib.sha256
    digests = b"".join([sha256(text).digest() for text in texts.cast(pa.binary()).to_pylist()])
    return np.frombuffer(digests, ">u8").reshape(-1, 4)[:, :2].astype(np.uint64)


def write_part(path: Path, rows: pa.RecordBatch) -> None:
    """Writes a part, whole or not at all: four bytes of CRC-32, then an Arrow IPC file.

    Raises:
        StorageError: the disk is full, or the folder is not writable.
    """
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, rows.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        writer.write_batch(rows)
    content = sink.getvalue()
    with storage.atomic_path(path) as name, open(name, "wb") as file:
        file.write(zlib.crc32(content).to_bytes(_CRC_BYTES, "big"))
        file.write(content)


def read_part(part: Part, selection_only: bool = False) -> tuple[pa.RecordBatch, dict[str, Fault]]:
    """Reads a part.

    Args:
        part: the part.
        selection_only: read only hash_hi, hash_lo and label.

    Returns:
        Its rows, as :func:`prepare_rows` made them, and their faults.

    Raises:
        PartsKeptError: the part is missing or damaged; a damaged one is deleted, so that the next run recomputes it.
    """
    try:
        data, fault = memoryview(part.path.read_bytes()), "wrong checksum"
    except OSError as error:
        data, fault = memoryview(b""), str(error.strerror)
    crc, content = bytes(data[:_CRC_BYTES]), data[_CRC_BYTES:]
    # Arrow itself accepts most damaged files, and crashes on some.
    if crc != zlib.crc32(content).to_bytes(_CRC_BYTES, "big"):
        part.path.unlink(missing_ok=True)
        raise PartsKeptError(f"{part.path}: damaged part ({fault}); run the command again to recompute it.")
    options = pa.ipc.IpcReadOptions(included_fields=list(range(len(_SELECTION_COLUMNS))) if selection_only else None)
    with pa.ipc.open_file(pa.py_buffer(content), options=options) as reader:
        rows, faults = reader.get_batch(0), json.loads(reader.schema.metadata[b"faults"])
    return rows, {name: Fault(**values) for name, values in faults.items()}


def _fault(bad: pa.BooleanArray, values: pa.Array, first: int) -> Fault:
    places = np.flatnonzero(bad.to_numpy(zero_copy_only=False))
    return Fault(len(places), [first + int(place) for place in places[:SHOWN]], values[int(places[0])].as_py())
