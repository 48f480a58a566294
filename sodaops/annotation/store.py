"""A folder with texts to annotate and the answers to them; several processes of one machine may use it at once."""

import contextlib
import re
import secrets
import shutil
import sqlite3
import threading
import weakref
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from sodaops.annotation.convert import CONVERTED, convert_files
from sodaops.annotation.database import (
    FORMAT,
    INFO,
    connect,
    create_database,
    database_errors,
    insert_answers,
    insert_tasks,
    read_info,
    select_tasks,
    write_info,
)  # fmt: skip
from sodaops.annotation.state import AnnotationState
from sodaops.annotation.tasks import Task, check_annotator, check_label, task_of
from sodaops.errors import DataError, StorageError, some
from sodaops.io import storage

DATABASE, LOCK = "annotations.sqlite", ".lock"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_SESSION = re.compile("[0-9a-f]{8,32}")


class Store:
    """An annotation store that exists; :meth:`create` makes one. A store of format 1 is converted when it is opened.

    Args:
        folder: with store.json.
        labels: the labels that it must have; None: any.

    Raises:
        DataError: no store, a damaged store.json, or a store with other labels.
        StorageError: the database could not be opened.
    """

    def __init__(self, folder: str | Path, labels: Sequence[str] | None = None) -> None:
        self.folder = Path(folder)
        self._path = self.folder / DATABASE
        version, self.labels = read_info(self.folder)
        if labels is not None and list(labels) != self.labels:
            raise DataError(
                f"{self.folder}: has the labels {some(self.labels, 20)}; expected {some(labels, 20)}. "
                "Name another folder with annotate.store, or give the store's labels in its order."
            )
        if version < FORMAT:
            self._convert()
        # One connection for all threads of the process: a transaction takes the lock.
        self._lock, self._database = threading.RLock(), connect(self._path)
        weakref.finalize(self, self._database.close)
        self._tasks: list[Task] = []
        self._tasks_version: tuple[int, int | None] = (0, None)

    @classmethod
    def create(cls, folder: str | Path, labels: Sequence[str]) -> "Store":
        """Makes a store, or opens the one that exists.

        Raises:
            DataError: fewer than two labels, or one twice; a store with other labels; a folder with other files.
            StorageError: it could not be written.
        """
        folder, labels = Path(folder), list(labels)
        if len(set(labels)) < max(2, len(labels)) or not all(isinstance(label, str) and label.strip() for label in labels):
            raise DataError(f"labels={labels}; expected at least two different ones, none of them empty.")
        with storage.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with storage.writing(folder), FileLock(folder / LOCK):
            if not (folder / INFO).exists():
                foreign = sorted(file.name for file in folder.iterdir() if file.name != LOCK)
                if foreign:
                    raise DataError(f"{folder}: holds other files ({some(foreign)}); name a new folder.")
                with storage.atomic_path(folder / DATABASE, 0o600) as temporary, database_errors(folder / DATABASE):
                    create_database(temporary)
                write_info(folder, labels)
        return cls(folder, labels)

    def _convert(self) -> None:
        with storage.writing(self.folder), FileLock(self.folder / LOCK):
            if read_info(self.folder)[0] < FORMAT:  # another process may have converted it
                with database_errors(self._path):
                    convert_files(self.folder, self._path, self.labels)
                write_info(self.folder, self.labels)

    def add_tasks(self, batch: str, tasks: Iterable[Mapping[str, Any]]) -> int:
        """Adds texts to annotate, except those that are tasks already.

        Args:
            batch: tasks are shown batch by batch, in the order of the batches' names. A batch may grow.
            tasks: the fields of :class:`~sodaops.annotation.tasks.Task`.

        Returns:
            The number of new tasks.

        Raises:
            DataError: the name of the batch or a task is not valid; then nothing is added.
            StorageError: the database could not be written.
        """
        if not _NAME.fullmatch(batch):
            raise DataError(f"batch={batch!r}; expected letters, digits, '.', '_' and '-', at most 100.")
        checked = [self._check_task(f"task {number} of {batch}", entry) for number, entry in enumerate(tasks, 1)]
        with self._transaction() as database:
            return insert_tasks(database, batch, checked)

    def _check_task(self, position: str, entry: Mapping[str, Any]) -> Task:
        try:
            return task_of(entry, self.labels)
        except DataError as error:
            raise DataError(f"{position}: {error}") from None

    def forget(self, request_ids: Collection[str], text_hashes: Collection[str]) -> int:
        """Deletes the texts of these requests, and those with these SHA-256, so that no file holds them any more.

        Answers hold no text, and stay. The files that a conversion kept hold texts, and are deleted altogether.

        Returns:
            The number of deleted texts.

        Raises:
            StorageError: the database could not be written, or another process was reading it all the time.
        """
        with storage.writing(self.folder):
            shutil.rmtree(self.folder / CONVERTED, ignore_errors=True)
        with self._lock:
            with self._transaction() as database:
                n_before = database.total_changes
                database.executemany("DELETE FROM tasks WHERE request_id = ?", [(name,) for name in request_ids])
                database.executemany("DELETE FROM tasks WHERE text_sha256 = ?", [(digest,) for digest in text_hashes])
                n_deleted = database.total_changes - n_before
            with database_errors(self._path):
                self._database.execute("VACUUM")  # a deleted row's bytes stay in the file until then
                busy, *_ = self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()  # and in the -wal file
        if busy:
            raise StorageError(f"{self._path}-wal: may still hold deleted texts, since another process reads; run it again.")
        return n_deleted

    def session(self, annotator: str, code: str | None = None, source: str = "page") -> "Session":
        """The answers of an annotator in one sitting.

        Args:
            annotator: a name.
            code: 8 to 32 hexadecimal digits that identify the sitting; None: random ones.
            source: where the answers come from.

        Raises:
            DataError: a name or a code that is not valid.
        """
        return Session(self, check_annotator(annotator), code, source)

    def append_feedback(self, request_id: str, place: int, label: str, annotator: str = "feedback") -> None:
        """Writes what an answer of the service should have been; it is on the disk when this returns.

        Raises:
            DataError: a label that the store does not have, or a name that is not valid.
            StorageError: the database could not be written.
        """
        check_label(label, self.labels)
        key = {"request_id": request_id, "place": place, "annotator": check_annotator(annotator)}
        with self._transaction() as database:
            insert_answers(database, [{**key, "time": _now(), "label": label, "source": "feedback"}])

    def feedback_without_task(self) -> set[tuple[str, int]]:
        """Request ids and places with feedback that are no task."""
        with self._transaction("DEFERRED") as database:
            keys = "SELECT request_id, place FROM {} WHERE request_id IS NOT NULL"
            return set(database.execute(f"{keys.format('answers')} EXCEPT {keys.format('tasks')}"))

    def state(self) -> AnnotationState:
        """What the store holds now, including what other processes wrote.

        Raises:
            StorageError: the database could not be read.
        """
        with self._transaction("DEFERRED") as database:
            answers: dict[str, dict[str, str | None]] = defaultdict(dict)
            for task, annotator, label in database.execute(
                "SELECT task, annotator, label FROM current_answers ORDER BY number"  # an annotator's last one counts
            ):
                answers[task][annotator] = label
            ((n_strays,),) = database.execute(
                "SELECT count(*) FROM answers WHERE NOT undone AND task NOTNULL AND task NOT IN (SELECT task FROM tasks)"
            )
            # Tasks never change, and no number is given twice: with the same count and last number they are the same.
            version = database.execute("SELECT count(*), max(number) FROM tasks").fetchone()
            if version != self._tasks_version:
                self._tasks, self._tasks_version = select_tasks(database), version
            return AnnotationState(self.labels, self._tasks, dict(answers), n_strays)

    @contextlib.contextmanager
    def _transaction(self, kind: str = "IMMEDIATE") -> Iterator[sqlite3.Connection]:
        """One transaction; IMMEDIATE waits for other writers, and DEFERRED reads one snapshot."""
        with self._lock, database_errors(self._path), self._database:
            self._database.execute(f"BEGIN {kind}")
            yield self._database


class Session:
    """The answers of one annotator in one sitting, or of one import; :meth:`Store.session` makes it.

    Raises:
        DataError: a code that is not valid.
    """

    def __init__(self, store: Store, annotator: str, code: str | None, source: str) -> None:
        if code is not None and not _SESSION.fullmatch(code):
            raise DataError(f"session={code!r}; expected 8 to 32 hexadecimal digits in lower case.")
        self._store, self._annotator, self._source = store, annotator, source
        self._code = code or secrets.token_hex(8)

    def answer(self, task: str, label: str | None) -> None:
        """Writes a label, or a skip with None; it is on the disk when this returns. A repeated call changes nothing.

        Raises:
            DataError: a label or a task that the store does not have.
            StorageError: the database could not be written.
        """
        if label is not None:
            check_label(label, self._store.labels)
        with self._store._transaction() as database:
            self._check_task(database, task)
            current = "SELECT label FROM current_answers WHERE task = ? AND annotator = ? ORDER BY number DESC LIMIT 1"
            unchanged = database.execute(current, (task, self._annotator)).fetchone() == (label,)
            if not unchanged or task not in self._answered(database):
                self._insert(database, [(self._annotator, task, label)])

    def answer_all(self, answers: Iterable[tuple[str, str, str | None]]) -> None:
        """Writes annotators' labels of tasks, which the caller has checked: all of them or none.

        Raises:
            StorageError: the database could not be written.
        """
        with self._store._transaction() as database:
            self._insert(database, answers)

    def undo(self, task: str | None = None) -> str:
        """Takes the last answer of this session back, and returns its task.

        Args:
            task: the expected one. If its answer was taken back already, nothing changes.

        Raises:
            DataError: this session has no answer, or its last one was to another task.
            StorageError: the database could not be written.
        """
        with self._store._transaction() as database:
            answered = self._answered(database)
            if task is not None and task not in answered:
                self._check_task(database, task)
                return task
            if not answered:
                raise DataError("there is no answer in this session to take back.")
            last = next(reversed(answered))
            if task not in (None, last):
                raise DataError(f"task={task!r}: not the last answer of this session, which was to {last}.")
            database.execute("UPDATE answers SET undone = 1 WHERE number = ?", (answered[last],))
            return last

    def _check_task(self, database: sqlite3.Connection, task: str) -> None:
        if database.execute("SELECT 1 FROM tasks WHERE task = ?", (task,)).fetchone() is None:
            raise DataError(f"task={task!r}: {self._store.folder} has no such task.")

    def _answered(self, database: sqlite3.Connection) -> dict[str, int]:
        """Tasks that this session answered and did not take back -> number of the last answer, in that order."""
        rows = database.execute(
            "SELECT task, max(number) AS last FROM answers WHERE session = ? AND annotator = ? AND NOT undone GROUP BY task "
            "ORDER BY last", (self._code, self._annotator),
        )  # fmt: skip
        return dict(rows.fetchall())

    def _insert(self, database: sqlite3.Connection, answers: Iterable[tuple[str, str, str | None]]) -> None:
        common = {"time": _now(), "session": self._code, "source": self._source}
        insert_answers(database, ({**common, "annotator": a, "task": task, "label": label} for a, task, label in answers))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
