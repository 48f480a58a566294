"""The annotation store: texts to annotate and their answers. Several processes on one machine may use it at once."""

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
    read_store_info,
    select_tasks,
    write_store_info,
)  # fmt: skip
from sodaops.annotation.state import AnnotationState
from sodaops.annotation.tasks import Task, check_annotator, task_of
from sodaops.errors import DataError, StorageError, some
from sodaops.io import storage
from sodaops.tasks import SINGLE_LABEL, make_task
from sodaops.tasks.base import Task as MLTask

DATABASE, LOCK = "annotations.sqlite", ".lock"
_EXPORTED = ("task", "why", "label", "annotator")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_SESSION = re.compile("[0-9a-f]{8,32}")


class Store:
    """An existing annotation store; :meth:`create` makes a new one. Opening a store of format 1 converts it.

    Args:
        folder: the folder that holds store.json.
        labels: the labels that the store must have, in this order; None accepts any.
        ml_task: the task whose question the store must have; None accepts any.

    Raises:
        DataError: there is no store, store.json is damaged, or the labels or the task differ.
        ConfigError: the store's task cannot be made.
        StorageError: the database could not be opened.
    """

    def __init__(self, folder: str | Path, labels: Sequence[str] | None = None, ml_task: MLTask | None = None) -> None:
        self.folder = Path(folder)
        self._path = self.folder / DATABASE
        version, self.labels, section, self.text_columns = read_store_info(self.folder)
        self.ml_task = make_task(section)
        if ml_task is not None and type(ml_task) is not type(self.ml_task):
            raise DataError(
                f"{self.folder}: the store is for task={self.ml_task.name}; expected task={ml_task.name}. "
                "Choose another folder with annotate.store."
            )
        if labels is not None and list(labels) != self.labels:
            raise DataError(
                f"{self.folder}: the store has the labels {some(self.labels, 20)}; expected {some(labels, 20)}. "
                "Choose another folder with annotate.store, or use the store's labels in the same order."
            )
        if version < FORMAT:
            self._convert()
        # All threads of the process share one connection; each transaction holds the lock.
        self._lock, self._database = threading.RLock(), connect(self._path)
        weakref.finalize(self, self._database.close)
        self._tasks: list[Task] = []
        self._tasks_version: tuple[int, int | None] = (0, None)

    @classmethod
    def create(
        cls, folder: str | Path, labels: Sequence[str], ml_task: MLTask = SINGLE_LABEL, text_columns: Sequence[str] = ("text",)
    ) -> "Store":
        """Creates a store, or opens the existing one. The name of a single text column does not matter.

        Raises:
            DataError: there are fewer than two labels or a repeated one, the existing store has other labels, another task or
                other text columns, a column has the name of another one of an export, or the folder holds other files.
            StorageError: the store could not be written.
        """
        folder, labels = Path(folder), list(labels)
        least = 1 if ml_task.question["kind"] == "number" else 2  # the name of the number
        if len(set(labels)) < max(least, len(labels)) or not all(isinstance(label, str) and label.strip() for label in labels):
            raise DataError(f"labels={labels}; expected at least two labels, all different and none empty.")
        columns = list(text_columns) if len(text_columns) > 1 else ["text"]
        if taken := [name for name in columns if name in _EXPORTED]:
            raise DataError(f"text column {some(taken)}: exports have another column of this name; rename it in the data.")
        with storage.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with storage.writing(folder), FileLock(folder / LOCK):
            if not (folder / INFO).exists():
                foreign = sorted(file.name for file in folder.iterdir() if file.name != LOCK)
                if foreign:
                    raise DataError(f"{folder}: holds other files ({some(foreign)}); choose a new or empty folder.")
                with storage.atomic_path(folder / DATABASE, 0o600) as temporary, database_errors(folder / DATABASE):
                    create_database(temporary)
                write_store_info(folder, labels, ml_task.section(), columns)
        store = cls(folder, labels, ml_task)
        if store.text_columns != columns:
            raise DataError(
                f"{folder}: the store has texts of {some(store.text_columns)}; expected {some(columns)}. Choose another folder "
                "with annotate.store."
            )
        return store

    def _convert(self) -> None:
        with storage.writing(self.folder), FileLock(self.folder / LOCK):
            if read_store_info(self.folder)[0] < FORMAT:  # another process may have converted it
                with database_errors(self._path):
                    convert_files(self.folder, self._path, self.labels)
                write_store_info(self.folder, self.labels, {}, self.text_columns)

    def add_tasks(self, batch: str, tasks: Iterable[Mapping[str, Any]]) -> int:
        """Adds texts to annotate, except those that are already in the store.

        Args:
            batch: name of the batch. Annotators see batches in the order of their names. Tasks may be added to a batch later.
            tasks: for each task, the fields of :class:`~sodaops.annotation.tasks.Task`.

        Returns:
            The number of new tasks.

        Raises:
            DataError: the batch name or a task is not valid; nothing is added.
            StorageError: the database could not be written.
        """
        if not _NAME.fullmatch(batch):
            raise DataError(f"batch={batch!r}; expected letters, digits, '.', '_' and '-', at most 100.")
        checked = [self._check_task(f"task {number} of {batch}", entry) for number, entry in enumerate(tasks, 1)]
        with self._transaction() as database:
            return insert_tasks(database, batch, checked)

    def _check_task(self, position: str, entry: Mapping[str, Any]) -> Task:
        try:
            return task_of(entry, self.labels, self.ml_task)
        except DataError as error:
            raise DataError(f"{position}: {error}") from None

    def forget(self, request_ids: Collection[str], text_hashes: Collection[str]) -> int:
        """Deletes the texts of these requests and the texts with these SHA-256 from all files of the store.

        Answers are kept, since they hold no text. The files of a converted store, which hold texts, are all deleted.

        Returns:
            The number of deleted texts.

        Raises:
            StorageError: the database could not be written, or another process that reads it prevented the deletion.
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
            raise StorageError(f"{self._path}-wal: may still hold deleted texts, as another process is reading; try again.")
        return n_deleted

    def session(self, annotator: str, code: str | None = None, source: str = "page") -> "Session":
        """Starts or continues a session: the answers of one annotator in one sitting.

        Args:
            annotator: the annotator's name.
            code: 8 to 32 hexadecimal digits that identify the session; None generates them.
            source: where the answers come from, for example ``page``.

        Raises:
            DataError: the name or the code is not valid.
        """
        return Session(self, check_annotator(annotator), code, source)

    def append_feedback(self, request_id: str, place: int, answer: object, annotator: str = "feedback") -> None:
        """Stores the correct answer for a text that the service answered; it is on disk when this returns.

        Raises:
            DataError: it is no answer to the store's question, or the name is not valid.
            StorageError: the database could not be written.
        """
        label = self.ml_task.check_answer(answer, self.labels)
        key = {"request_id": request_id, "place": place, "annotator": check_annotator(annotator)}
        with self._transaction() as database:
            insert_answers(database, [{**key, "time": _now(), "label": label, "source": "feedback"}])

    def feedback_without_task(self) -> set[tuple[str, int]]:
        """The (request id, place) pairs with feedback whose texts are not tasks."""
        with self._transaction("DEFERRED") as database:
            keys = "SELECT request_id, place FROM {} WHERE request_id IS NOT NULL"
            return set(database.execute(f"{keys.format('answers')} EXCEPT {keys.format('tasks')}"))

    def state(self) -> AnnotationState:
        """The current contents, including what other processes wrote.

        Raises:
            StorageError: the database could not be read.
        """
        with self._transaction("DEFERRED") as database:
            answers: dict[str, dict[str, str | None]] = defaultdict(dict)
            for task, annotator, label in database.execute(
                "SELECT task, annotator, label FROM current_answers ORDER BY number"  # an annotator's last answer counts
            ):
                answers[task][annotator] = label
            ((n_strays,),) = database.execute(
                "SELECT count(*) FROM answers WHERE NOT undone AND task NOTNULL AND task NOT IN (SELECT task FROM tasks)"
            )
            # Tasks never change and numbers are not reused, so an equal count and last number mean that the tasks are equal.
            version = database.execute("SELECT count(*), max(number) FROM tasks").fetchone()
            if version != self._tasks_version:
                self._tasks, self._tasks_version = select_tasks(database), version
            return AnnotationState(self.labels, self._tasks, dict(answers), n_strays, self.ml_task, self.text_columns)

    @contextlib.contextmanager
    def _transaction(self, kind: str = "IMMEDIATE") -> Iterator[sqlite3.Connection]:
        """A transaction: IMMEDIATE waits for other writers, DEFERRED reads a consistent snapshot."""
        with self._lock, database_errors(self._path), self._database:
            self._database.execute(f"BEGIN {kind}")
            yield self._database


class Session:
    """The answers of one annotator in one sitting or one import; created by :meth:`Store.session`.

    Raises:
        DataError: the code is not valid.
    """

    def __init__(self, store: Store, annotator: str, code: str | None, source: str) -> None:
        if code is not None and not _SESSION.fullmatch(code):
            raise DataError(f"session={code!r}; expected 8 to 32 hexadecimal digits in lower case.")
        self._store, self._annotator, self._source = store, annotator, source
        self._code = code or secrets.token_hex(8)

    def answer(self, task: str, answer: object) -> None:
        """Stores an answer, or None for a skip; it is on disk when this returns. Repeating the call has no effect.

        Raises:
            DataError: it is no answer to the store's question, or there is no such task.
            StorageError: the database could not be written.
        """
        label = None if answer is None else self._store.ml_task.check_answer(answer, self._store.labels)
        with self._store._transaction() as database:
            self._check_task(database, task)
            current = "SELECT label FROM current_answers WHERE task = ? AND annotator = ? ORDER BY number DESC LIMIT 1"
            unchanged = database.execute(current, (task, self._annotator)).fetchone() == (label,)
            if not unchanged or task not in self._answered(database):
                self._insert(database, [(self._annotator, task, label)])

    def answer_all(self, answers: Iterable[tuple[str, str, str | None]]) -> None:
        """Stores (annotator, task, label) triples, all or none of them. The caller has validated them.

        Raises:
            StorageError: the database could not be written.
        """
        with self._store._transaction() as database:
            self._insert(database, answers)

    def undo(self, task: str | None = None) -> str:
        """Undoes the last answer of this session, and returns its task.

        Args:
            task: the expected task, or None for any. If its answer is already undone, nothing changes.

        Raises:
            DataError: this session has no answer, or its last answer was to another task.
            StorageError: the database could not be written.
        """
        with self._store._transaction() as database:
            answered = self._answered(database)
            if task is not None and task not in answered:
                self._check_task(database, task)
                return task
            if not answered:
                raise DataError("this session has no answer to undo.")
            last = next(reversed(answered))
            if task not in (None, last):
                raise DataError(f"task={task!r}: only the last answer can be undone; it was to task {last}.")
            database.execute("UPDATE answers SET undone = 1 WHERE number = ?", (answered[last],))
            return last

    def _check_task(self, database: sqlite3.Connection, task: str) -> None:
        if database.execute("SELECT 1 FROM tasks WHERE task = ?", (task,)).fetchone() is None:
            raise DataError(f"task={task!r}: no such task in {self._store.folder}.")

    def _answered(self, database: sqlite3.Connection) -> dict[str, int]:
        """Answered task -> number of its last answer, without undone answers, oldest first."""
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
