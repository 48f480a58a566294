"""Second stage of the request log: closed journal segments become Parquet parts.

``python -m sodaops.request_log`` runs this, so that a service needs neither pyarrow nor gcsfs in its own process.
"""

import contextlib
import fcntl
import io
import os
from datetime import date
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
import pyarrow.parquet as pq

from sodaops.errors import StorageError
from sodaops.io import remote, storage
from sodaops.request_log.journal import shadow_of
from sodaops.text.columns import SEPARATOR

SCHEMA = pa.schema(
    {
        "time": pa.int64(),  # microseconds since 1970, UTC; a timestamp in a part
        "request_id": pa.string(),
        "place": pa.int32(),  # position of the text in its request, from 0
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
        # For drift checks; sodaops.bundle.reference describes them. The sketch is null for a bundle without a reference.
        "sketch": pa.list_(pa.float32()),
        "n_chars": pa.int32(),  # of the cleaned text; 0 with a null label means a text refused as empty
        "letters": pa.float32(),
        "non_ascii": pa.float32(),
        "pieces_per_word": pa.float32(),
        "unknown": pa.float32(),
        "context": pa.string(),  # JSON object, slice column -> value; null without
        "abstained": pa.bool_(),  # whether the answer was below the bundle's threshold; null for a bundle without one
    }
)


_TEXT_COLUMNS = pa.field("text_columns", pa.list_(pa.string()))  # in the journal, of texts of several columns
_LIVE_COLUMNS = pa.schema({  # of the log of a shadow: what the bundle in use answered, and whether the shadow disagreed
    "live_bundle_id": pa.string(), "live_label": pa.string(), "live_score": pa.float32(), "live_probs": pa.list_(pa.float32()),
    "disagreed": pa.bool_(),
})  # fmt: skip
PART = "part_"  # and the name of a column: the texts' parts in that column, in place of `text`


def write_parts(folder: str | Path, destination: str) -> int:
    """Turns every closed segment into ``DESTINATION/date=YYYY-MM-DD/SEGMENT.parquet``, and deletes it.

    A part has its segment's name and is written whole, so writing it twice leaves one part. An incomplete last line is
    skipped, since its answer was never sent.

    Args:
        folder: the journal.
        destination: folder or gs:// address.

    Returns:
        Number of parts written.

    Raises:
        StorageError: a part could not be written, or a segment is damaged and was renamed to SEGMENT.bad.
    """
    n_written, damaged = 0, []
    for path in sorted(Path(folder).glob("*.jsonl")):
        try:
            segment = path.open("rb")
        except FileNotFoundError:  # another process has turned it into a part
            continue
        with segment:
            if not lock_segment(segment):
                continue
            try:
                table = _read_rows(segment.read())
            except pa.ArrowInvalid:
                damaged.append(path.rename(path.with_suffix(".bad")))
                continue
            if table.num_rows:
                day = table["time"][0].as_py().date()  # of the first row, however long the segment has waited
                write_log_part(table, f"{destination.rstrip('/')}/date={day}/{path.stem}.parquet")
                n_written += 1
            path.unlink(missing_ok=True)
    if damaged:
        raise StorageError(
            f"{damaged[0]}: not readable as JSON lines, and renamed to .bad ({len(damaged)} such files). "
            "Look at it, then delete it."
        )
    return n_written


def lock_segment(segment: BinaryIO) -> bool:
    """Locks a journal segment; False if a process holds it, or has already turned it into a part and deleted it."""
    try:
        fcntl.flock(segment, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return os.fstat(segment.fileno()).st_nlink > 0


def _read_rows(content: bytes) -> pa.Table:
    complete = content[: content.rfind(b"\n") + 1]
    if not complete:
        return SCHEMA.empty_table()
    options = pa.json.ParseOptions(
        explicit_schema=pa.schema([*SCHEMA, _TEXT_COLUMNS, *_LIVE_COLUMNS]), unexpected_field_behavior="error"
    )
    one_block = pa.json.ReadOptions(block_size=max(len(complete), 1 << 20), use_threads=False)
    table = pa.json.read_json(io.BytesIO(complete), one_block, options)
    if table["disagreed"].null_count:  # a request log
        table = table.drop_columns(_LIVE_COLUMNS.names)
    return _with_parts(table.set_column(0, "time", table["time"].cast(pa.timestamp("us", "UTC"))))


def _with_parts(table: pa.Table) -> pa.Table:
    """The rows with a column for each part of a text, if texts have several; all texts of a segment are of one service."""
    names: list[str] = next(filter(None, table["text_columns"].to_pylist()), [])
    parts, table = pc.split_pattern(table["text"], SEPARATOR), table.drop_columns("text_columns")
    for i, name in enumerate(names):
        table = table.append_column(PART + name, pc.list_element(parts, i))
    return table.drop_columns("text") if names else table


def part_addresses(log: str) -> list[str]:
    """Paths or addresses of all parts of a request log, sorted.

    Args:
        log: folder or gs:// address.

    Raises:
        StorageError: there is no such log.
    """
    missing = f"{log}: no such request log; serve with serve.request_log={log} to make one."
    if "://" not in log:
        if not Path(log).is_dir():
            raise StorageError(missing)
        return sorted(str(path) for path in Path(log).glob("date=*/*.parquet"))
    with remote.filesystem(log, "read") as files:
        if not files.exists(log):
            raise StorageError(missing)
        return sorted(files.unstrip_protocol(path) for path in files.find(log) if path.endswith(".parquet"))


def all_logs(request_log: str) -> list[str]:
    """The request log and, if there is one, the log of a shadow's answers beside it."""
    shadow = shadow_of(request_log)
    if "://" not in shadow:
        return [request_log, shadow] if Path(shadow).is_dir() else [request_log]
    with remote.filesystem(shadow, "read") as files:
        return [request_log, shadow] if files.exists(shadow) else [request_log]


def read_disagreements(request_log: str, live: str) -> dict[str, dict[str, str]]:
    """The texts to which a challenger gave another answer than the bundle with the id ``live``; none without a shadow's log.

    Returns:
        SHA-256 of the cleaned text -> the newest ``bundle_id``, that of the challenger, ``label`` and ``live_label``.

    Raises:
        StorageError: a part cannot be read.
    """
    columns, wanted = ["text_sha256", "bundle_id", "label", "live_label"], (pc.field("live_bundle_id") == live)
    rows: dict[str, dict[str, str]] = {}
    for path in [path for log in all_logs(request_log)[1:] for path in part_addresses(log)]:
        try:
            with open_part(path) as file:
                table = pq.read_table(file, columns=columns, filters=wanted & pc.field("disagreed"))
        except (pa.ArrowException, OSError) as error:
            raise StorageError(
                f"{path}: not readable ({str(error).splitlines()[0][:200]}); look at it, then delete it."
            ) from error
        rows |= {row.pop("text_sha256"): row for row in table.to_pylist()}
    return rows


def find_in_parts(log: str, request_id: str, place: int) -> bool:
    """Whether a part, the newest first, has the row of an answered text; parts that cannot be read are passed over.

    Raises:
        StorageError: there is no such log.
    """
    wanted = (pc.field("request_id") == request_id) & (pc.field("place") == place)
    for path in reversed(part_addresses(log)):
        with contextlib.suppress(pa.ArrowException, OSError, StorageError), open_part(path) as file:
            if pq.read_table(file, columns=["place"], filters=wanted).num_rows:
                return True
    return False


def day_of(path: str) -> date:
    """The day in a part's path, ``date=YYYY-MM-DD``, which is that of its first row; ``date.max`` without one."""
    try:
        return date.fromisoformat(path.rpartition("date=")[2][:10])
    except ValueError:
        return date.max


def open_part(path: str) -> contextlib.AbstractContextManager[BinaryIO]:
    """Opens a local or remote part for reading."""
    return remote.open_remote(path, "rb") if "://" in path else open(path, "rb")


def write_log_part(table: pa.Table, path: str) -> None:
    """Writes a part, whole or not at all; an existing one is replaced.

    Raises:
        StorageError: it could not be written.
    """
    if "://" not in path:
        with storage.atomic_path(path, 0o600) as temporary:  # it may hold texts
            pq.write_table(table, temporary, compression="zstd")
        return
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    with remote.open_remote(path, "wb") as file:
        file.write(buffer.getvalue())
