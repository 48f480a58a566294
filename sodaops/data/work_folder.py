"""The folder in which parts wait while splits are made: beside the splits, theirs alone, and gone when they are done."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from sodaops import storage
from sodaops.data.parts import PartsKeptError
from sodaops.errors import DataError, StorageError


@contextlib.contextmanager
def work_folder(splits_dir: str | Path, fingerprint: str) -> Iterator[Path]:
    """A folder to work in; one that a run of the same fingerprint left behind when it was stopped or killed is given again.

    It is deleted when the block ends, also by a fault that a user must mend, together with those of other fingerprints.
    Another process that makes the same splits waits.

    Raises:
        StorageError: the folder cannot be made.
    """
    target = Path(splits_dir).resolve()
    with storage.writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.parent / f".{target.name}.work.lock")
        lock.acquire()
    try:
        folder = target.parent / f".{target.name}.work.{fingerprint[:16]}"
        for other in target.parent.iterdir():
            if other.name.startswith(f".{target.name}.work.") and other.is_dir() and other != folder:
                shutil.rmtree(other, ignore_errors=True)
        with storage.writing(folder):
            folder.mkdir(exist_ok=True)
        try:
            yield folder
        except PartsKeptError:
            raise
        except (DataError, StorageError):
            shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        with contextlib.suppress(PermissionError):  # Windows keeps a file that is open
            Path(lock.lock_file).unlink(missing_ok=True)  # who waits for it sees that it is gone, and makes a new one
        lock.release()
