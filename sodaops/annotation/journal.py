"""Append-only files of JSON lines: written so that the end of the process loses nothing acknowledged, read by what is new."""

import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from sodaops.io import storage

_STEP = timedelta(milliseconds=1)
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


class Line(NamedTuple):
    """A line that was read: in which file, where in it, and what it says."""

    file: str
    number: int
    entry: dict[str, Any]


class Clock:
    """UTC times in milliseconds, each later than all that were given or seen before, whatever the machine's clock does."""

    def __init__(self) -> None:
        self._last = datetime.fromtimestamp(0, UTC)

    def see(self, time: str) -> None:
        """Takes note of a time that somebody else wrote.

        Raises:
            ValueError: it is none, as ``2026-11-25T10:20:30.123Z``.
        """
        if not _TIME.fullmatch(time):
            raise ValueError(time)
        self._last = max(self._last, datetime.fromisoformat(time))

    def now(self) -> str:
        """The time, as ``2026-11-25T10:20:30.123Z``."""
        self._last = max(datetime.now(UTC), self._last + _STEP)
        text = self._last.isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"
        self._last = datetime.fromisoformat(text)
        return text


class Appender:
    """A file of its own in a folder, made at the first line, for its owner alone.

    Args:
        folder: where; it is made too.
        name: goes into the file's name, as far as it may.
        code: the file's name ends in it.
    """

    def __init__(self, folder: Path, name: str, code: str | None = None) -> None:
        self._folder, self._name, self._code = folder, safe(name), code or secrets.token_hex(8)
        self._path: Path | None = None
        self._torn = False

    def append(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Writes lines; when this returns, they are on the disk.

        Raises:
            StorageError: they could not be written. A line that was begun is ended before the next one.
        """
        data = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries).encode()
        with storage.writing(self._path or self._folder):
            descriptor = self._open()
            try:
                rest = b"\n" + data if self._torn else data
                self._torn = True
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
                os.fsync(descriptor)
                self._torn = False
            finally:
                os.close(descriptor)

    def _open(self) -> int:
        if self._path is not None:
            return os.open(self._path, os.O_WRONLY | os.O_APPEND)
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}-{self._name}-{self._code}.jsonl"
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o600)
        self._path = path
        storage.sync(self._folder)
        return descriptor


class Reader:
    """What is new in a folder's files since the last look. What stands after a file's last line break is not read yet."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: dict[str, tuple[int, int]] = {}  # file -> bytes, lines
        self.damaged: list[str] = []

    def new(self) -> Iterator[Line]:
        """The new lines, file by file; a line that is no JSON object is noted as damaged and left out."""
        if not self._folder.is_dir():
            return
        for file in sorted(os.scandir(self._folder), key=lambda file: file.name):
            offset, n_lines = self._seen.get(file.name, (0, 0))
            if not file.name.endswith(".jsonl") or file.stat().st_size <= offset:
                continue
            with open(file.path, "rb") as opened:
                opened.seek(offset)
                data = opened.read()
            whole = data[: data.rfind(b"\n") + 1]
            lines = whole.split(b"\n")[:-1]
            self._seen[file.name] = offset + len(whole), n_lines + len(lines)
            for number, line in enumerate(lines, n_lines + 1):
                entry = _object(line)
                if entry is not None:
                    yield Line(file.name, number, entry)
                elif line.strip():
                    self.note(file.name, number)

    def note(self, file: str, number: int) -> None:
        """Keeps the place of a line that cannot be used."""
        self.damaged.append(f"{self._folder.name}/{file} line {number}")


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def safe(name: str) -> str:
    """A name as a file's name may hold it.

    >>> safe("Zoë / QA team")
    'Zo_QA_team'
    """
    return re.sub(r"[^A-Za-z0-9.]+", "_", name)[:40].strip("_.") or "x"
