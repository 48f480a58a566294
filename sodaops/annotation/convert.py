"""Converts a store of format 1, files of JSON lines, to the database of format 2."""

import json
import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

from sodaops.annotation.database import connect, create_database, insert_answers, insert_tasks
from sodaops.annotation.tasks import check_annotator, task_of
from sodaops.errors import DataError, some
from sodaops.io import storage
from sodaops.tasks import SINGLE_LABEL

CONVERTED = "format-1"  # the old files are kept in this folder of the store
log = logging.getLogger(__name__)


def convert_files(folder: Path, path: Path, labels: Sequence[str]) -> None:
    """Writes the tasks and answers of a folder's files to a new database, and logs the lines that are damaged.

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
        with storage.atomic_path(path, 0o600) as temporary:
            create_database(temporary)
            with closing(connect(temporary)) as database, database:
                database.execute("BEGIN")
                for file, place, entry in _entries(folder / CONVERTED / "tasks", damaged):
                    try:
                        insert_tasks(database, file.stem, [task_of(entry, labels, SINGLE_LABEL)])
                    except DataError:
                        damaged.append(place)
                insert_answers(database, _answers(folder / CONVERTED / "answers", labels, damaged))
    if damaged:
        log.warning("%s: %d damaged lines were not converted: %s", folder / CONVERTED, len(damaged), some(damaged))


def _entries(folder: Path, damaged: list[str]) -> Iterator[tuple[Path, str, dict[str, Any]]]:
    """File, place and object of each line. A last line without a line break was never acknowledged, and is left out."""
    for file in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], 1):
            place = f"{folder.name}/{file.name} line {number}"
            try:
                entry = json.loads(line) if line.strip() else None
            except ValueError:
                entry = line
            if isinstance(entry, dict):
                yield file, place, entry
            elif entry is not None:
                damaged.append(place)


def _answers(folder: Path, labels: Sequence[str], damaged: list[str]) -> list[dict[str, Any]]:
    """The columns of all answers, in the order in which they were given."""
    entries = []
    for file, place, entry in _entries(folder, damaged):
        try:
            session = file.stem.rpartition("-")[2]  # TIME-ANNOTATOR-SESSION.jsonl
            entries.append(({**_columns(entry, labels), "session": session, "undone": 0}, entry.get("undo") is True))
        except (DataError, KeyError, TypeError, ValueError):
            damaged.append(place)
    answers: list[dict[str, Any]] = []
    by_task: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)  # those that can be undone
    for columns, undo in sorted(entries, key=lambda entry: entry[0]["time"]):  # stable: at one time, in the files' order
        before = by_task[columns["annotator"], columns.get("task", "")]
        if not undo:
            before.append(columns)
            answers.append(columns)
        elif before:
            before.pop()["undone"] = 1
    return answers


def _columns(entry: dict[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    """Refuses an answer without a task or request, an annotator, a time, and a label, a skip or an undo."""
    kinds = {"request_id": str, "place": int} if entry.get("source") == "feedback" else {"task": str}
    if not all(isinstance(entry[key], kind) for key, kind in kinds.items()):
        raise TypeError
    datetime.strptime(entry["time"], "%Y-%m-%dT%H:%M:%S.%fZ")
    label = entry.get("label")
    if not (label is None and (entry.get("skip") is True or entry.get("undo") is True)):
        SINGLE_LABEL.check_answer(label, labels)
    columns = {key: entry[key] for key in ("time", *kinds)}
    return {**columns, "label": label, "annotator": check_annotator(entry["annotator"]), "source": str(entry.get("source"))}
