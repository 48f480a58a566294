"""Deletion from the request log: parts of old days, and rows of single requests or texts."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sodaops.io import remote, storage
from sodaops.io.progress import progress
from sodaops.request_log.journal import shadow_of
from sodaops.request_log.parts import all_logs, day_of, lock_segment, open_part, part_addresses, write_log_part


@dataclass
class Deletion:
    """What :func:`forget` deleted, and what it could not.

    Attributes:
        rows: file -> number of rows deleted.
        request_ids: of the deleted rows.
        held: journal segments with such rows that are in use by a process.
        unread: files that could not be read -> why.
    """

    rows: dict[str, int] = field(default_factory=dict)
    request_ids: set[str] = field(default_factory=set)
    held: list[str] = field(default_factory=list)
    unread: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """One line per file, and what remains to be done."""
        lines = [f"{path}: {n} rows deleted" for path, n in self.rows.items()]
        lines.append(f"{sum(self.rows.values())} rows of {len(self.request_ids)} requests deleted")
        lines += [f"{path}: in use by a service; run this again when it has become a part" for path in self.held]
        lines += [f"{path}: not readable ({why}); look at it, then delete it" for path, why in self.unread.items()]
        return "\n".join(lines)


def prune(log: str, days: int, today: date | None = None) -> list[str]:
    """Deletes the parts of old days.

    Args:
        log: folder or gs:// address.
        days: number of days to keep, besides today.
        today: in UTC.

    Returns:
        Paths of the deleted parts.

    Raises:
        StorageError: there is no such log, or a part could not be deleted.
    """
    oldest = (today or datetime.now(UTC).date()) - timedelta(days=days)
    expired = [path for path in part_addresses(log) if day_of(path) < oldest]
    for path in progress(expired, desc="deleting", unit="part"):
        _delete(path)
    return expired


def forget(log: str, journal: str | None, request_ids: Sequence[str], text_hashes: Sequence[str]) -> Deletion:
    """Deletes rows from parts and from closed journal segments, also those of a shadow; each file is rewritten whole.

    Args:
        log: folder or gs:// address of the parts.
        journal: local folder of the journal; None: only parts are searched.
        request_ids: rows of these requests are deleted.
        text_hashes: as are rows with these SHA-256 of cleaned texts.

    Raises:
        StorageError: there is no such log, or a file could not be written.
    """
    deletion = Deletion()
    folders = [Path(each) for each in (journal, shadow_of(journal)) if Path(each).is_dir()] if journal else []
    for segment in sorted(
        path for folder in folders for path in folder.glob("*.jsonl")
    ):  # before the parts: one may become a part meanwhile
        _forget_in_segment(segment, set(request_ids), set(text_hashes), deletion)
    for damaged in sorted(path for folder in folders for path in folder.glob("*.bad")):
        deletion.unread[str(damaged)] = "damaged journal segment"
    for path in progress([path for each in all_logs(log) for path in part_addresses(each)], desc="searching", unit="part"):
        try:
            _forget_in_part(path, request_ids, text_hashes, deletion)
        except (pa.ArrowException, KeyError) as error:
            deletion.unread[path] = str(error).splitlines()[0][:200]
    return deletion


def _forget_in_part(path: str, request_ids: Sequence[str], text_hashes: Sequence[str], deletion: Deletion) -> None:
    with open_part(path) as file:
        table = pq.ParquetFile(io.BytesIO(file.read())).read()
    matches = pc.or_(
        pc.is_in(table["request_id"], pa.array(list(request_ids), pa.string())),
        pc.is_in(table["text_sha256"], pa.array(list(text_hashes), pa.string())),
    )
    n_matches = pc.sum(matches).as_py() or 0
    if not n_matches:
        return
    deletion.request_ids |= set(table.filter(matches)["request_id"].to_pylist())
    kept = table.filter(pc.invert(matches))
    if len(kept):
        write_log_part(kept, path)
    else:
        _delete(path)
    deletion.rows[path] = n_matches


def _forget_in_segment(path: Path, request_ids: set[str], text_hashes: set[str], deletion: Deletion) -> None:
    try:
        segment = path.open("rb")
    except FileNotFoundError:  # it has become a part, where its rows are found
        return
    with segment:
        is_locked = lock_segment(segment)
        kept: list[bytes] = []
        matches: list[dict[str, Any]] = []
        for line in segment.read().rpartition(b"\n")[0].split(b"\n"):  # an incomplete last line was never answered
            row = _parse(line)
            if row.get("request_id") in request_ids or row.get("text_sha256") in text_hashes:
                matches.append(row)
            else:
                kept.append(line)
        if not matches:
            return
        if not is_locked:
            deletion.held.append(str(path))
            return
        with storage.atomic_path(path, 0o600) as temporary:
            temporary.write_bytes(b"".join(line + b"\n" for line in kept))
    deletion.rows[str(path)] = len(matches)
    deletion.request_ids |= {row["request_id"] for row in matches}


def _parse(line: bytes) -> dict:
    """The row of a line; empty if the line is damaged."""
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
    with remote.filesystem(path, "deleted") as files:
        if files.exists(path):  # another service may have deleted it
            files.rm_file(path)
