"""Taking rows out of the request log: old days, and what somebody asked to be forgotten."""

import fcntl
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from sodaops.io import remote, storage
from sodaops.request_log.parts import day_of, open_part, part_addresses, write_part


@dataclass
class Forgotten:
    """What was deleted, and where it could not be."""

    rows: dict[str, int] = field(default_factory=dict)  # file -> rows deleted
    request_ids: set[str] = field(default_factory=set)  # of the rows deleted
    held: list[str] = field(default_factory=list)  # journal segments with such rows that a process has in hand
    unread: dict[str, str] = field(default_factory=dict)  # files that could not be read, and why

    def summary(self) -> str:
        """A line for each file, and what is left to do."""
        lines = [f"{path}: {n} rows deleted" for path, n in self.rows.items()]
        lines.append(f"{sum(self.rows.values())} rows of {len(self.request_ids)} requests deleted")
        lines += [f"{path}: a service has it in hand; run this again when it has become a part" for path in self.held]
        lines += [f"{path}: not readable ({why}); look at it, then delete it" for path, why in self.unread.items()]
        return "\n".join(lines)


def prune(log: str, days: int, today: date | None = None) -> list[str]:
    """Deletes the parts of every day that lies further back.

    Args:
        log: folder or gs://.
        days: that are kept, today's not counted.
        today: UTC.

    Returns:
        What was deleted.

    Raises:
        StorageError: no such log, or a part that could not be deleted.
    """
    oldest = (today or datetime.now(UTC).date()) - timedelta(days=days)
    gone = [path for path in part_addresses(log) if day_of(path) < oldest]
    for path in tqdm(gone, desc="deleting", unit="part", delay=2, leave=False, disable=None):
        _delete(path)
    return gone


def forget(log: str, journal: str | None, request_ids: Sequence[str], text_hashes: Sequence[str]) -> Forgotten:
    """Deletes rows from parts and from closed journal segments; each file is written anew, whole.

    Args:
        log: folder or gs:// of the parts.
        journal: local folder of what is in no part yet.
        request_ids: every text of these requests.
        text_hashes: SHA-256 of cleaned texts.

    Raises:
        StorageError: no such log, or a file that could not be written.
    """
    found = Forgotten()
    folder = Path(journal) if journal and Path(journal).is_dir() else None
    for segment in sorted(folder.glob("*.jsonl")) if folder else ():  # first: one may become a part meanwhile
        _forget_in_segment(segment, set(request_ids), set(text_hashes), found)
    for damaged in sorted(folder.glob("*.bad")) if folder else ():
        found.unread[str(damaged)] = "damaged, and put aside when it should have become a part"
    for path in tqdm(part_addresses(log), desc="looking", unit="part", delay=2, leave=False, disable=None):
        try:
            _forget_in_part(path, request_ids, text_hashes, found)
        except (pa.ArrowException, KeyError) as error:
            found.unread[path] = str(error).splitlines()[0][:200]
    return found


def _forget_in_part(path: str, request_ids: Sequence[str], text_hashes: Sequence[str], found: Forgotten) -> None:
    with open_part(path) as file:
        table = pq.ParquetFile(io.BytesIO(file.read())).read()
    gone = pc.or_(
        pc.is_in(table["request_id"], pa.array(list(request_ids), pa.string())),
        pc.is_in(table["text_sha256"], pa.array(list(text_hashes), pa.string())),
    )
    n_gone = pc.sum(gone).as_py() or 0
    if not n_gone:
        return
    found.request_ids |= set(table.filter(gone)["request_id"].to_pylist())
    rest = table.filter(pc.invert(gone))
    if len(rest):
        write_part(rest, path)
    else:
        _delete(path)
    found.rows[path] = n_gone


def _forget_in_segment(path: Path, request_ids: set[str], text_hashes: set[str], found: Forgotten) -> None:
    try:
        segment = path.open("rb")
    except FileNotFoundError:  # it has become a part, and is looked at there
        return
    with segment:
        try:
            fcntl.flock(segment, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = not os.fstat(segment.fileno()).st_nlink  # a part by now
        except BlockingIOError:
            held = True
        kept: list[bytes] = []
        gone: list[dict[str, Any]] = []
        for line in segment.read().rpartition(b"\n")[0].split(b"\n"):  # one that was cut off was never answered
            row = _parsed(line)
            mine = row.get("request_id") in request_ids or row.get("text_sha256") in text_hashes
            if mine:
                gone.append(row)
            else:
                kept.append(line)
        if not gone:
            return
        if held:
            found.held.append(str(path))
            return
        with storage.atomic_path(path, 0o600) as temporary:
            temporary.write_bytes(b"".join(line + b"\n" for line in kept))
    found.rows[str(path)] = len(gone)
    found.request_ids |= {row["request_id"] for row in gone}


def _parsed(line: bytes) -> dict:
    """The row of a line; empty where it is damaged."""
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def _delete(path: str) -> None:
    if "://" not in path:
        with storage.writing(path):
            Path(path).unlink(missing_ok=True)
        return
    with remote.afar(path, "deleted") as files:
        if files.exists(path):  # another service may have deleted it
            files.rm_file(path)
