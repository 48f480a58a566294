"""The request log's far end: closed journal segments become Parquet parts, each once.

Run by the service as a process of its own: ``python -m sodaops.request_log JOURNAL DESTINATION [KEEP_DAYS]`` prints the
number of parts written, and then deletes those of days before KEEP_DAYS.
"""

import contextlib
import fcntl
import io
import os
from datetime import date
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.json
import pyarrow.parquet as pq

from sodaops.errors import StorageError
from sodaops.io import remote, storage

SCHEMA = pa.schema(
    {
        "time": pa.int64(),  # microseconds since 1970, UTC; a timestamp in the part
        "request_id": pa.string(),
        "place": pa.int32(),  # of the text in its request, from 0
        "bundle_id": pa.string(),
        "variant": pa.string(),
        "label": pa.string(),
        "score": pa.float32(),
        "labels": pa.list_(pa.string()),
        "probs": pa.list_(pa.float32()),  # in the order of labels
        "latency_ms": pa.float32(),
        "n_tokens": pa.int32(),
        "text_sha256": pa.string(),  # of the cleaned text
        "text": pa.string(),  # null unless texts are logged
        # For drift, and null where the bundle has no reference; sodaops.bundle.reference says what they are.
        "sketch": pa.list_(pa.float32()),
        "n_chars": pa.int32(),  # of the cleaned text; 0 with a null label: a text refused as empty
        "letters": pa.float32(),
        "non_ascii": pa.float32(),
        "pieces_per_word": pa.float32(),
        "unknown": pa.float32(),
    }
)


def write_parts(folder: str | Path, destination: str) -> int:
    """Turns every segment that no living process holds into ``DESTINATION/date=YYYY-MM-DD/SEGMENT.parquet``.

    A part is named by its segment and written whole, so doing it twice leaves one part; the segment goes when the part
    is there. A line that was cut off at the end of a segment is left out: its answer was never sent.

    Args:
        folder: the journal.
        destination: a folder, or gs://.

    Returns:
        Parts written.

    Raises:
        StorageError: a part could not be written, or a segment is damaged and was put aside as SEGMENT.bad.
    """
    written, bad = 0, []
    for path in sorted(Path(folder).glob("*.jsonl")):
        try:
            segment = path.open("rb")
        except FileNotFoundError:  # another process was quicker
            continue
        with segment:
            try:
                fcntl.flock(segment, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            if not os.fstat(segment.fileno()).st_nlink:  # another process was quicker
                continue
            try:
                table = _read(segment.read())
            except pa.ArrowInvalid:
                bad.append(path.rename(path.with_suffix(".bad")))
                continue
            if table.num_rows:
                day = table["time"][0].as_py().date()  # of the first row: a segment may have waited for it
                write_part(table, f"{destination.rstrip('/')}/date={day}/{path.stem}.parquet")
                written += 1
            path.unlink(missing_ok=True)
    if bad:
        raise StorageError(
            f"{bad[0]}: not readable as JSON lines, and put aside ({len(bad)} such). Look at it, then delete it."
        )
    return written


def _read(content: bytes) -> pa.Table:
    whole = content[: content.rfind(b"\n") + 1]
    if not whole:
        return SCHEMA.empty_table()
    options = pa.json.ParseOptions(explicit_schema=SCHEMA, unexpected_field_behavior="error")
    block = pa.json.ReadOptions(block_size=max(len(whole), 1 << 20), use_threads=False)
    table = pa.json.read_json(io.BytesIO(whole), block, options)
    return table.set_column(0, "time", table["time"].cast(pa.timestamp("us", "UTC")))


def part_addresses(log: str) -> list[str]:
    """Addresses of all parts of a request log, sorted.

    Args:
        log: folder or gs://.

    Raises:
        StorageError: no such log.
    """
    missing = f"{log}: no such request log; serve with serve.request_log={log} to make one."
    if "://" not in log:
        if not Path(log).is_dir():
            raise StorageError(missing)
        return sorted(str(path) for path in Path(log).glob("date=*/*.parquet"))
    with remote.afar(log, "read") as files:
        if not files.exists(log):
            raise StorageError(missing)
        return sorted(files.unstrip_protocol(path) for path in files.find(log) if path.endswith(".parquet"))


def day_of(path: str) -> date:
    """The day in ``date=YYYY-MM-DD``, on which a part's first row was written; ``date.max`` where there is none."""
    try:
        return date.fromisoformat(path.rpartition("date=")[2][:10])
    except ValueError:
        return date.max


def open_part(path: str) -> contextlib.AbstractContextManager[BinaryIO]:
    """A part to read from, wherever it is."""
    return remote.open_anywhere(path, "rb") if "://" in path else open(path, "rb")


def write_part(table: pa.Table, path: str) -> None:
    """Writes a part, whole or not at all; one that is there is replaced.

    Raises:
        StorageError: it could not be written.
    """
    if "://" not in path:
        with storage.atomic_path(path, 0o600) as temporary:  # it may hold texts
            pq.write_table(table, temporary, compression="zstd")
        return
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    with remote.open_anywhere(path, "wb") as there:
        there.write(buffer.getvalue())
