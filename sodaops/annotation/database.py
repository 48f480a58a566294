"""The files of an annotation store: store.json with its labels, and the SQLite database."""

import contextlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from sodaops.annotation.tasks import TASK_FIELDS, Task
from sodaops.errors import DataError, StorageError
from sodaops.io import storage
from sodaops.tasks.make import VARIABLE, is_allowed

FORMAT = 2
TASK_FORMAT = 3  # of a store whose info has a task; the database is the same, and older versions refuse it
INFO = "store.json"
# Later rows have larger numbers. `batch` is the argument of `Store.add_tasks`. The label of a skipped task is NULL.
# A feedback row has a request id and the text's place in the request; it counts for the task picked from there, if any.
_SCHEMA = """
PRAGMA journal_mode = WAL;
CREATE TABLE tasks (
    number INTEGER PRIMARY KEY AUTOINCREMENT, batch TEXT NOT NULL, task TEXT NOT NULL UNIQUE, text TEXT NOT NULL,
    text_sha256 TEXT NOT NULL UNIQUE, why TEXT NOT NULL, label TEXT, score REAL, probs TEXT, request_id TEXT, place INTEGER,
    bundle_id TEXT
);
CREATE INDEX task_of_request ON tasks (request_id, place);
CREATE TABLE answers (
    number INTEGER PRIMARY KEY, time TEXT NOT NULL, annotator TEXT NOT NULL, session TEXT, task TEXT, request_id TEXT,
    place INTEGER, label TEXT, source TEXT NOT NULL, undone INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX answers_of_session ON answers (session, annotator);
CREATE VIEW current_answers AS
    SELECT answers.number, tasks.task, answers.annotator, answers.label FROM answers JOIN tasks
    ON tasks.task = answers.task OR (tasks.request_id = answers.request_id AND tasks.place = answers.place)
    WHERE NOT answers.undone;
"""
_FIX = "create one with `sodaops annotate pick` or `sodaops annotate import FILE`, or choose another with annotate.store"
_FIXES = {
    sqlite3.SQLITE_BUSY: "another process is using it; try again",
    sqlite3.SQLITE_FULL: "free disk space there",
    sqlite3.SQLITE_IOERR: "free disk space there, or check the disk",
}
_BUSY_TIMEOUT_S = 10.0  # other processes write for milliseconds; after this time the page shows an error and retries


def write_store_info(folder: Path, labels: Sequence[str], task: Mapping[str, Any], text_columns: Sequence[str]) -> None:
    """Writes store.json, which marks a folder as a store; ``task`` is the section of what people are asked."""
    more: dict[str, Any] = {"task": task} if task else {}
    more |= {"text_columns": list(text_columns)} if len(text_columns) > 1 else {}
    storage.write_json(folder / INFO, {"format": TASK_FORMAT if more else FORMAT, "labels": labels, **more})


def read_store_info(folder: Path) -> tuple[int, list[str], dict[str, Any], list[str]]:
    """Reads the format, the ordered labels, the section of the task and the text columns of the store in a folder.

    Raises:
        DataError: there is no store, or store.json is damaged.
    """
    path = folder / INFO
    if not path.is_file():
        reason = f"there is no {INFO}" if folder.is_dir() else "no such folder"
        raise DataError(f"{folder}: not an annotation store ({reason}); {_FIX}.")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        version, labels, task = info["format"], info["labels"], info.get("task", {})
        columns = info.get("text_columns", ["text"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: could not be read ({error!r}); restore it from a backup, or {_FIX}.") from None
    lists = isinstance(labels, list) and isinstance(columns, list)
    if version not in range(1, TASK_FORMAT + 1) or not lists or not all(isinstance(a, str) for a in (*labels, *columns)):
        raise DataError(
            f"{path}: format={version!r}, labels={labels!r}; expected format 1 to {TASK_FORMAT} and a list of strings."
        )
    if not isinstance(task, dict) or (task and not is_allowed(str(task.get("_target_")))):
        raise DataError(f"{path}: task={task!r} may not be used here. If you trust it, name it in {VARIABLE}.")
    return version, labels, task, columns


def create_database(path: Path) -> None:
    """Creates the tables in an empty file and sets WAL mode, which the file keeps."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript(_SCHEMA)


def connect(path: Path) -> sqlite3.Connection:
    """Opens an existing database for all threads of the process. Callers begin transactions explicitly.

    Raises:
        StorageError: the file does not exist or is not a store's database.
    """
    with database_errors(path):
        database = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=_BUSY_TIMEOUT_S, isolation_level=None,
            check_same_thread=False,
        )  # fmt: skip
        try:
            # FULL syncs at each commit, so a power failure loses no acknowledged answer. NORMAL would only survive kill -9.
            database.execute("PRAGMA synchronous = FULL")
            database.execute("SELECT 1 FROM tasks LIMIT 1")  # fails now if this is not a store's database
        except sqlite3.Error:
            database.close()
            raise
        return database


@contextlib.contextmanager
def database_errors(path: Path) -> Iterator[None]:
    """Converts SQLite errors to a StorageError that names the file and the fix."""
    try:
        yield
    except sqlite3.Error as error:
        fix = _FIXES.get(getattr(error, "sqlite_errorcode", 0) & 0xFF, "check that you may write there, or restore a backup")
        raise StorageError(f"{path}: could not be used ({error}); {fix}.") from error


def insert_tasks(database: sqlite3.Connection, batch: str, tasks: Iterable[Task]) -> int:
    """Adds the tasks whose text is new, and returns their number."""
    columns = ("batch", *TASK_FIELDS)
    rows = [(batch, *astuple(task)) for task in tasks]
    probs = columns.index("probs")
    rows = [(*row[:probs], row[probs] and json.dumps(row[probs]), *row[probs + 1 :]) for row in rows]
    n_before = database.total_changes
    database.executemany(f"INSERT OR IGNORE INTO tasks ({', '.join(columns)}) VALUES ({_marks(columns)})", rows)
    return database.total_changes - n_before


def select_tasks(database: sqlite3.Connection) -> list[Task]:
    """Returns all tasks, ordered by the name of their batch."""
    rows = database.execute(f"SELECT {', '.join(TASK_FIELDS)} FROM tasks ORDER BY batch, number")
    tasks = [dict(zip(TASK_FIELDS, row, strict=True)) for row in rows]
    return [Task(**{**task, "probs": task["probs"] and json.loads(task["probs"])}) for task in tasks]


def insert_answers(database: sqlite3.Connection, answers: Iterable[dict[str, object]]) -> None:
    """Adds answers, each a mapping from column to value."""
    for answer in answers:
        database.execute(f"INSERT INTO answers ({', '.join(answer)}) VALUES ({_marks(answer)})", tuple(answer.values()))


def _marks(columns: Iterable[str]) -> str:
    return ", ".join("?" for _ in columns)
