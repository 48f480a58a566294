"""Files written whole or not at all, and their hashes."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from sodaops.errors import StorageError, some

if os.name != "nt":
    import fcntl

_TEMPORARY, _OLD = ".tmp", ".old"  # endings of temporary files and folders: .NAME.abcd1234.tmp
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def writing(target: str | Path) -> Iterator[None]:
    """Turns an error of the operating system while ``target`` is written into a StorageError."""
    try:
        yield
    except (ConnectionError, TimeoutError):
        raise
    except OSError as error:
        fix = "free some space" if error.errno in _FULL else "check that the folder exists and is writable"
        raise StorageError(f"{target}: could not be written ({error.strerror or error}); {fix}, then run it again.") from error


def cache_dir() -> Path:
    """The user's folder for what can be made again: ~/.cache/sodaops, or in XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sodaops"


@contextlib.contextmanager
def atomic_path(path: str | Path, mode: int = 0o644) -> Iterator[Path]:
    """A temporary file to write to; it becomes ``path`` when the block ends without an error, and is deleted otherwise.

    Raises:
        StorageError: the disk is full, or the folder is not writable.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary(path, mode) as file:
            yield file
            sync(file)
            os.replace(file, path)
            sync(path.parent)


@contextlib.contextmanager
def temporary(path: Path, mode: int = 0o644) -> Iterator[Path]:
    """A new file beside ``path``, which is deleted when the block ends.

    It is locked until then. Files that killed processes left, which nobody holds locked any more, are deleted first.
    """
    _delete_leftovers(path)
    with _locked(lambda: _new_file(path)) as name:
        try:
            os.chmod(name, mode)
            yield name
        finally:
            name.unlink(missing_ok=True)


def _new_file(path: Path) -> Path:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_TEMPORARY, dir=path.parent)
    os.close(handle)
    return Path(name)


def _new_folder(path: Path, suffix: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=suffix, dir=path.parent))


@contextlib.contextmanager
def _locked(create: Callable[[], Path]) -> Iterator[Path]:
    """A new file or folder, locked during the block; it is created again if another process took it for a leftover."""
    if os.name == "nt":  # Windows does not rename what is open
        yield create()
        return
    descriptor = None
    while descriptor is None:
        path = create()
        descriptor = _lock(path)
    try:
        yield path
    finally:
        os.close(descriptor)


def _lock(path: Path, required: bool = False) -> int | None:
    """Locks a file or folder until the returned descriptor is closed.

    Args:
        path: of the file or folder.
        required: not locked on a file system without locks, such as some network ones; otherwise only opened there.

    Returns:
        None: another process holds it locked, or has moved it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = True
    except OSError as error:
        free = not required and not isinstance(error, BlockingIOError)
    if free and path.exists():
        return descriptor
    os.close(descriptor)
    return None


def _delete_leftovers(path: Path) -> None:
    """Deletes what killed processes left beside ``path``; a folder that one had moved away and not yet replaced comes back."""
    if os.name == "nt" or not path.parent.is_dir():
        return
    leftover = re.compile(rf"\.{re.escape(path.name)}\.\w{{8}}({re.escape(_TEMPORARY)}|{re.escape(_OLD)})")
    with os.scandir(path.parent) as entries:
        found = [Path(entry.path) for entry in entries if leftover.fullmatch(entry.name)]
    for file in found:
        descriptor = _lock(file, required=True)
        if descriptor is None:
            continue
        try:
            if file.suffix == _OLD and not path.exists() and (file / path.name).exists():
                os.rename(file / path.name, path)
            shutil.rmtree(file, ignore_errors=True) if file.is_dir() else file.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def atomic_folder(path: str | Path, names: Collection[str], private: bool = False) -> Iterator[Path]:
    """A temporary folder to fill; it replaces ``path`` when the block ends without an error.

    Args:
        path: the folder to make or replace.
        names: the files that a replaced folder may hold; a folder with other files is refused, so that none is lost.
        private: readable by its owner only, since it holds users' texts.

    Two renames exchange the folders. After a crash between them the old folder has a hidden name; the next call restores it.

    Raises:
        StorageError: the disk is full, the folder is not writable, or holds other files.
    """
    path = Path(path).resolve()
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _delete_leftovers(path)
    foreign = sorted({file.name for file in path.iterdir()} - set(names)) if path.is_dir() else []
    if foreign:
        raise StorageError(f"{path}: holds other files ({some(foreign)}), which would be lost; choose a new folder.")
    with writing(path), _locked(lambda: _new_folder(path, _TEMPORARY)) as temporary:
        try:
            os.chmod(temporary, 0o700 if private else 0o755)
            yield temporary
            for file in temporary.rglob("*"):
                file.chmod(0o755 if file.is_dir() else 0o644)  # some writers make files that only their owner can read
                sync(file)
            _exchange(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _exchange(new: Path, path: Path) -> None:
    if not path.exists():
        os.rename(new, path)
        sync(path.parent)
        return
    with _locked(lambda: _new_folder(path, _OLD)) as old:
        os.rename(path, old / path.name)  # into the folder; onto it, Windows would refuse
        try:
            os.rename(new, path)
        except OSError:
            os.rename(old / path.name, path)
            raise
        sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Waits until a file, or the list of a folder's files, is on the disk."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows flushes writable files only
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str, mode: int = 0o644) -> None:
    """Writes a UTF-8 text file, whole or not at all."""
    with atomic_path(path, mode) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Writes a JSON file, whole or not at all; not-a-number is refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(value: Any) -> str:
    """SHA-256 of a JSON value in one canonical spelling.

    >>> sha256_of_json({"b": 1, "a": 2}) == sha256_of_json({"a": 2, "b": 1})
    True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
