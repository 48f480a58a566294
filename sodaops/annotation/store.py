"""A folder with texts to annotate and what people said of them; several processes may use it at once.

store.json names the labels. tasks/NAME.jsonl is written whole. answers/SESSION.jsonl is append-only: each process has files
of its own there, and reads those of the others.
"""

import json
import re
import secrets
import threading
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from sodaops.annotation.info import FORMAT, INFO, read_labels
from sodaops.annotation.journal import Appender, Clock, Line, Reader
from sodaops.annotation.state import State
from sodaops.annotation.tasks import Task, check_annotator, check_label, forget_tasks, task_of
from sodaops.errors import DataError, StorageError, some
from sodaops.io import storage

LOCK = ".lock"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_CODE = re.compile("[0-9a-f]{8,32}")
Key = str | tuple[str, int]  # a task, or the request and the place that feedback speaks of


class _Event(NamedTuple):
    """An answer, a skip or an undo. Events sort by time, and those of one time by file and line."""

    time: str
    file: str
    line: int
    annotator: str
    label: str | None
    undo: bool


class Store:
    """An annotation store that is there; :meth:`create` makes one.

    Args:
        folder: with store.json.
        labels: what it is expected to hold; None: whatever it holds.

    Raises:
        DataError: no store, a damaged one, or one with other labels.
    """

    def __init__(self, folder: str | Path, labels: Sequence[str] | None = None) -> None:
        self.folder = Path(folder)
        self.labels = read_labels(self.folder)
        if labels is not None and list(labels) != self.labels:
            raise DataError(
                f"{self.folder}: has the labels {some(self.labels, 20)}; asked for were {some(labels, 20)}. "
                "Name another folder with annotate.store, or the store's labels in its order."
            )
        self._lock, self._clock = threading.RLock(), Clock()
        self._reader = Reader(self.folder / "answers")
        self._events: dict[Key, list[_Event]] = defaultdict(list)
        self._of_session: dict[tuple[str, str], list[tuple[_Event, Key]]] = defaultdict(list)
        self._tasks: dict[str, Task] = {}
        self._task_files: object = None
        self._task_damage: list[str] = []
        self._by_request: dict[Key, str] = {}
        self._answers: dict[str, dict[str, str | None]] = {}
        self._feedback: Appender | None = None

    @classmethod
    def create(cls, folder: str | Path, labels: Sequence[str]) -> "Store":
        """Makes a store, or opens the one that is there.

        Raises:
            DataError: fewer than two labels, or one twice; a store with other labels; a folder with other things.
            StorageError: it could not be written.
        """
        folder, labels = Path(folder), list(labels)
        if len(set(labels)) < max(2, len(labels)) or not all(isinstance(label, str) and label.strip() for label in labels):
            raise DataError(f"labels={labels}; expected at least two, each once and none empty.")
        with storage.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with storage.writing(folder), FileLock(folder / LOCK):
            if not (folder / INFO).exists():
                foreign = sorted(file.name for file in folder.iterdir() if file.name != LOCK)
                if foreign:
                    raise DataError(f"{folder}: holds other things ({some(foreign)}); name a new folder.")
                storage.write_json(folder / INFO, {"format": FORMAT, "labels": labels})
        return cls(folder, labels)

    def add_tasks(self, name: str, tasks: Iterable[Mapping[str, Any]]) -> int:
        """Adds texts to annotate to tasks/NAME.jsonl, those that are not tasks already.

        Args:
            name: of the file; tasks come in the order of the files' names. A file that is there grows.
            tasks: the fields of :class:`~sodaops.annotation.tasks.Task`.

        Returns:
            How many were new.

        Raises:
            DataError: a name that is none, or a task that cannot be one; then nothing is added.
            StorageError: the file could not be written.
        """
        if not _NAME.fullmatch(name):
            raise DataError(f"{name!r}: no name for a file of tasks; expected letters, digits, '.', '_' and '-', at most 100.")
        given = [self._checked(f"task {number} of {name}", entry) for number, entry in enumerate(tasks, 1)]
        with self._lock, storage.writing(self.folder), FileLock(self.folder / LOCK):
            self._refresh()
            present = {task.text_sha256 for task in self._tasks.values()}
            new = {task.text_sha256: task for task in given if task.text_sha256 not in present}
            path = self.folder / "tasks" / f"{name}.jsonl"
            if new:
                lines = [json.dumps(asdict(task), ensure_ascii=False) for task in new.values()]
                before = path.read_text(encoding="utf-8") if path.exists() else ""
                storage.write_text(path, before + "".join(line + "\n" for line in lines), 0o600)
            return len(new)

    def forget(self, request_ids: Collection[str], text_hashes: Collection[str]) -> dict[str, int]:
        """Deletes the texts of these requests, and those with these SHA-256; each file is written anew, whole.

        Answers hold no text, and stay: they are answers to texts that are not here.

        Returns:
            File -> texts deleted.

        Raises:
            StorageError: a file could not be read or written.
        """
        with self._lock, storage.writing(self.folder), FileLock(self.folder / LOCK):
            return forget_tasks(self.folder / "tasks", request_ids, text_hashes)

    def _checked(self, place: str, entry: Mapping[str, Any]) -> Task:
        try:
            return task_of(entry, self.labels)
        except DataError as error:
            raise DataError(f"{place}: {error}") from None

    def session(self, annotator: str, code: str | None = None, source: str = "page") -> "Session":
        """Where an annotator's answers of one sitting go.

        Args:
            annotator: a name.
            code: hexadecimal digits that tell the sitting from others; None draws some.
            source: how the answers came.

        Raises:
            DataError: a name that is none.
        """
        return Session(self, check_annotator(annotator), code, source)

    def append_feedback(self, request_id: str, place: int, label: str, annotator: str = "feedback") -> None:
        """Writes what somebody said of an answer of the service; when this returns, it is on the disk.

        Raises:
            DataError: a label that the store does not have, or a name that is none.
            StorageError: it could not be written.
        """
        check_label(label, self.labels)
        entry = {"request_id": request_id, "place": place, "label": label, "annotator": check_annotator(annotator)}
        with self._lock:
            self._feedback = self._feedback or Appender(self.folder / "answers", "feedback")
            self._feedback.append([{"time": self._clock.now(), **entry, "source": "feedback"}])

    def feedback_without_task(self) -> set[tuple[str, int]]:
        """Request ids and places that feedback was given on, and that no task stands for."""
        with self._lock:
            self._refresh()
            return {key for key in self._events if not isinstance(key, str) and key not in self._by_request}

    def state(self) -> State:
        """What the store holds now, with what other processes wrote meanwhile.

        Raises:
            StorageError: a file that cannot be read.
        """
        with self._lock:
            self._refresh()
            answers = {task: dict(found) for task in self._tasks if (found := self._answers.get(task))}
            strays = [key for key in self._events if isinstance(key, str) and key not in self._tasks]
            n_strays = sum(len(self._events[key]) for key in strays)
            damaged = [*self._task_damage, *self._reader.damaged]
            return State(self.labels, list(self._tasks.values()), answers, damaged, n_strays)

    def _refresh(self) -> None:
        try:
            changed = self._read_tasks()
            for line in self._reader.new():
                key = self._take(line)
                if key is None:
                    self._reader.note(line.file, line.number)
                else:
                    changed.add(key if isinstance(key, str) else self._by_request.get(key, ""))
        except OSError as error:
            raise StorageError(f"{self.folder}: could not be read ({error}); check the folder and its access.") from error
        for task in changed & self._tasks.keys():
            self._answers[task] = self._replayed(self._tasks[task])

    def _read_tasks(self) -> set[str]:
        """Reads the tasks again if any file changed, and returns the tasks whose answers must be looked at then."""
        folder = self.folder / "tasks"
        files = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
        stats = [(file.name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for file in files for stat in (file.stat(),)]
        if stats == self._task_files:
            return set()
        reader, tasks, known = Reader(folder), {}, set()
        for line in reader.new():
            try:
                task = task_of(line.entry, self.labels)
            except DataError:
                reader.note(line.file, line.number)
                continue
            if task.text_sha256 not in known:
                known.add(task.text_sha256)
                tasks[task.task] = task
        self._tasks, self._task_files, self._task_damage = tasks, stats, reader.damaged
        asked = [task for task in tasks.values() if task.request_id is not None and task.place is not None]
        self._by_request = {(task.request_id, task.place): task.task for task in asked}
        return set(tasks)

    def _take(self, line: Line) -> Key | None:
        """Keeps what a line of answers says; None if it says nothing that can be used."""
        entry = line.entry
        label, undo = entry.get("label"), entry.get("undo") is True
        feedback = entry.get("source") == "feedback"
        key = (entry.get("request_id"), entry.get("place")) if feedback else entry.get("task")
        kinds = (str, int) if feedback else (str,)
        if not all(isinstance(part, kind) for part, kind in zip(key if feedback else (key,), kinds, strict=True)):
            return None
        if not undo and label not in self.labels and not (label is None and entry.get("skip") is True):
            return None
        try:
            annotator = check_annotator(entry.get("annotator"))
            self._clock.see(entry.get("time", ""))
        except (DataError, ValueError, TypeError):
            return None
        event = _Event(entry["time"], line.file, line.number, annotator, label, undo)
        self._events[key].append(event)
        self._of_session[annotator, _code(line.file)].append((event, key))
        return key

    def _replayed(self, task: Task) -> dict[str, str | None]:
        """Each annotator's answer that stands: the last, less what was taken back."""
        keys: list[Any] = [task.task, (task.request_id, task.place)]
        events = sorted(event for key in keys for event in self._events.get(key, ()))
        stacks: dict[str, list[str | None]] = defaultdict(list)
        for event in events:
            stack = stacks[event.annotator]
            if not event.undo:
                stack.append(event.label)
            elif stack:
                stack.pop()
        return {name: stack[-1] for name, stack in stacks.items() if stack}

    def _standing(self, annotator: str, code: str) -> list[str]:
        """The tasks that a session answered and did not take back, in the order of the answers."""
        tasks: list[str] = []
        for event, key in sorted(self._of_session.get((annotator, code), ())):
            if not event.undo:
                tasks.append(key)  # type: ignore[arg-type]  # feedback has no session
            elif key in tasks:
                del tasks[len(tasks) - 1 - tasks[::-1].index(key)]
        return tasks


class Session:
    """The answers of one annotator in one sitting, or of one import; :meth:`Store.session` makes it.

    Raises:
        DataError: a code that is none.
    """

    def __init__(self, store: Store, annotator: str, code: str | None, source: str) -> None:
        if code is not None and not _CODE.fullmatch(code):
            raise DataError(f"session={code!r}; expected 8 to 32 hexadecimal digits in lower case.")
        self._store, self._annotator, self._source = store, annotator, source
        self._code = code or secrets.token_hex(8)
        self._appender = Appender(store.folder / "answers", annotator, self._code)

    def answer(self, task: str, label: str | None) -> None:
        """Writes a label, or with None a skip; when this returns, it is on the disk. Said twice, it is written once.

        Raises:
            DataError: a label or a task that the store does not have.
            StorageError: it could not be written.
        """
        store = self._store
        with store._lock:
            store._refresh()
            if task not in store._tasks:
                raise DataError(f"task={task!r}: {store.folder} has no such task; take one that it gives.")
            if label is not None:
                check_label(label, store.labels)
            standing = store._standing(self._annotator, self._code)
            if task not in standing or store._answers[task].get(self._annotator, "") != label:
                self.answer_all([(self._annotator, task, label)])

    def answer_all(self, answers: Iterable[tuple[str, str, str | None]]) -> None:
        """Writes annotators' labels of tasks, which the caller has checked; when this returns, they are on the disk.

        Raises:
            StorageError: they could not be written; some may have been.
        """
        entries = [
            {"annotator": name, "task": task, "label": label, **({"skip": True} if label is None else {})}
            for name, task, label in answers
        ]
        self._write(entries)

    def undo(self, task: str | None = None) -> str:
        """Takes the last answer of this session back, and returns its task.

        Args:
            task: the one that is expected; taken back already, it is returned all the same.

        Raises:
            DataError: there is nothing to take back, or the last answer was to another task.
            StorageError: it could not be written.
        """
        store = self._store
        with store._lock:
            store._refresh()
            standing = store._standing(self._annotator, self._code)
            if task is not None and task in store._tasks and task not in standing:
                return task
            if not standing:
                raise DataError("there is no answer in this session to take back.")
            if task not in (None, standing[-1]):
                raise DataError(f"task={task!r}: not the last answer of this session, which was to {standing[-1]}.")
            self._write([{"annotator": self._annotator, "task": standing[-1], "label": None, "undo": True}])
            return standing[-1]

    def _write(self, entries: Sequence[Mapping[str, Any]]) -> None:
        store = self._store
        with store._lock:
            time = store._clock.now()
            self._appender.append([{"time": time, **entry, "source": self._source} for entry in entries])


def _code(file: str) -> str:
    """The code of the session that a file of answers belongs to."""
    return file.removesuffix(".jsonl").rpartition("-")[2]
