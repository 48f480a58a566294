"""The request log's far end: closed journal segments become Parquet parts, each once.

Run by the service as a process of its own: ``python -m sodaops.serving.parts JOURNAL DESTINATION`` prints the number of
parts written.
"""

import fcntl
import io
import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.json
import pyarrow.parquet as pq

from sodaops import storage
from sodaops.errors import SodaOpsError, StorageError

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
                date = f"{path.name[:4]}-{path.name[4:6]}-{path.name[6:8]}"
                _write(table, f"{destination.rstrip('/')}/date={date}/{path.stem}.parquet")
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


def _write(table: pa.Table, path: str) -> None:
    if "://" not in path:
        with storage.atomic_path(path) as temporary:
            pq.write_table(table, temporary, compression="zstd")
        return
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    with storage.open_anywhere(path, "wb") as there:
        there.write(buffer.getvalue())


if __name__ == "__main__":
    try:
        print(write_parts(*sys.argv[1:]))
    except SodaOpsError as error:
        sys.exit(f"{type(error).__name__}: {error}")
