"""Converts a store of format 1, files of JSON lines, to the database of format 2."""

import json
import logging
import os
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from sodaops.annotation.database import connect, create_database, insert_answers, insert_tasks
from sodaops.annotation.tasks import check_annotator, check_label, task_of
from sodaops.errors import DataError, some
from sodaops.io import storage

CONVERTED = "format-1"  # the old files are kept in this folder of the store
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
log = logging.getLogger(__name__)


class _Line(NamedTuple):
    place: str
    entry: dict[str, Any]
    file: Path


def convert_files(folder: Path, path: Path, labels: Sequence[str]) -> None:
    """Writes the tasks and answers of a folder's files to a new database; lines that cannot be used are logged.

    The files are first moved to format-1/, and a file takes the place of each folder: a process of an older version then fails
    to write, and acknowledges no answer that is not converted. An interrupted conversion starts again from format-1/.

    Args:
        folder: the store's; its lock is held by the caller.
        path: of the database, which appears when it is whole.
        labels: the store's.

    Raises:
        StorageError: a file could not be read or written.
    """
    damaged: list[str] = []
    with storage.writing(folder):
        (folder / CONVERTED).mkdir(exist_ok=True)
        for name in ("tasks", "answers"):
            if (folder / name).is_dir():
                os.rename(folder / name, folder / CONVERTED / name)
                (folder / name).write_text(f"moved to {path.name} by a newer version of sodaops\n", encoding="utf-8")
        answers = sorted(_answers(folder, labels, damaged), key=lambda line: line.entry["time"])  # stable: then file and line
        with storage.atomic_path(path, 0o600) as temporary:
            create_database(temporary)
            with closing(connect(temporary)) as database, database:
                database.execute("BEGIN")
                for line in _lines(folder, "tasks", damaged):
                    try:
                        insert_tasks(database, line.file.stem, [task_of(line.entry, labels)])
                    except DataError:
                        damaged.append(line.place)
                for line in answers:
                    _insert(database, line)
    if damaged:
        log.warning("%s: %d damaged lines were not converted: %s", folder / CONVERTED, len(damaged), some(sorted(damaged)))


def _lines(folder: Path, kind: str, damaged: list[str]) -> Iterator[_Line]:
    """The JSON objects of all files; what comes after the last line break is an answer that was never acknowledged."""
    for file in sorted((folder / CONVERTED / kind).glob("*.jsonl")):
        for number, text in enumerate(file.read_bytes().split(b"\n")[:-1], 1):
            place = f"{kind}/{file.name} line {number}"
            try:
                entry = json.loads(text or b"null")
            except ValueError:
                entry = text
            if isinstance(entry, dict):
                yield _Line(place, entry, file)
            elif entry is not None:
                damaged.append(place)


def _answers(folder: Path, labels: Sequence[str], damaged: list[str]) -> Iterator[_Line]:
    for line in _lines(folder, "answers", damaged):
        try:
            _check(line.entry, labels)
            yield line
        except (DataError, KeyError, TypeError, ValueError):
            damaged.append(line.place)


def _check(entry: dict[str, Any], labels: Sequence[str]) -> None:
    """Refuses an answer without a task or request, an annotator, a time, and a label, a skip or an undo."""
    if not all(isinstance(entry.get(key), kind) for key, kind in _key(entry).items()) or not _TIME.fullmatch(entry["time"]):
        raise ValueError
    datetime.fromisoformat(entry["time"])
    check_annotator(entry.get("annotator"))
    if entry.get("undo") is not True and not (entry.get("label") is None and entry.get("skip") is True):
        check_label(entry.get("label"), labels)


def _key(entry: dict[str, Any]) -> dict[str, type]:
    """What an answer belongs to, and the types."""
    return {"request_id": str, "place": int} if entry.get("source") == "feedback" else {"task": str}


def _insert(database: sqlite3.Connection, line: _Line) -> None:
    entry, annotator = line.entry, check_annotator(line.entry["annotator"])
    if entry.get("undo") is True:  # of the annotator's last answer to the task
        last = "SELECT max(number) FROM answers WHERE annotator = ? AND task = ? AND NOT undone"
        database.execute(f"UPDATE answers SET undone = 1 WHERE number = ({last})", (annotator, entry.get("task")))
        return
    columns = {key: entry.get(key) for key in ("time", "label", *_key(entry))}
    session = line.file.stem.rpartition("-")[2]  # TIME-ANNOTATOR-SESSION.jsonl
    source = str(entry.get("source", "page"))
    insert_answers(database, [{**columns, "annotator": annotator, "session": session, "source": source}])
