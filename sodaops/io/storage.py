"""Files written whole or not at all, and their hashes."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from sodaops.errors import StorageError, some

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def writing(target: str | Path) -> Iterator[None]:
    """Turns what the operating system says of a write into an error that a user can act on."""
    try:
        yield
    except (ConnectionError, TimeoutError):
        raise
    except OSError as error:
        mend = "make room there" if error.errno in _FULL else "check that the folder exists and may be written to"
        raise StorageError(f"{target}: could not be written ({error.strerror or error}); {mend}, then run it again.") from error


@contextlib.contextmanager
def atomic_path(path: str | Path, mode: int = 0o644) -> Iterator[Path]:
    """A temporary name to write to; it becomes ``path`` when the block ends well, and vanishes when it does not.

    Raises:
        StorageError: the disk is full, or the folder cannot be written to.
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
    """A new file beside ``path``, readable by all unless ``mode`` says otherwise, that is gone when the block ends."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        os.chmod(name, mode)
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path, names: Collection[str], private: bool = False) -> Iterator[Path]:
    """A temporary folder to fill; it takes the place of ``path`` when the block ends well.

    Args:
        path: the folder to make or replace.
        names: what may stand in a folder that is replaced; anything else there is somebody's, and is not deleted.
        private: for its owner alone, since it holds users' texts.

    What stood at ``path`` stays whole until then. Two renames make the exchange; a crash between them leaves the
    old folder beside the new one under a hidden name.

    Raises:
        StorageError: the disk is full, the folder cannot be written to, or holds other things.
    """
    path = Path(path).resolve()
    foreign = sorted({file.name for file in path.iterdir()} - set(names)) if path.is_dir() else []
    if foreign:
        raise StorageError(f"{path}: holds other things ({some(foreign)}), which would be lost; name a new folder.")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            os.chmod(temporary, 0o700 if private else 0o755)
            yield temporary
            for file in temporary.rglob("*"):
                file.chmod(0o755 if file.is_dir() else 0o644)  # some writers make files for their owner alone
                sync(file)
            _exchange(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _exchange(new: Path, path: Path) -> None:
    if not path.exists():
        os.rename(new, path)
        sync(path.parent)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
    os.rename(path, old / path.name)  # into the folder, not onto it: that Windows refuses
    try:
        os.rename(new, path)
    except OSError:
        os.rename(old / path.name, path)
        raise
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Waits until a file, or a folder's names, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows flushes what may be written alone
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
