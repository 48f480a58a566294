"""A temporary folder for the parts of splits or predictions, beside the result."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from sodaops.data.parts import PartsKeptError
from sodaops.errors import DataError, StorageError
from sodaops.io import storage


@contextlib.contextmanager
def work_folder(
    target: str | Path, fingerprint: str, wait: bool = True, kept_after: type[Exception] = PartsKeptError
) -> Iterator[Path]:
    """A folder for parts. One that a killed run with the same fingerprint left behind is used again.

    The folder, and those of other fingerprints, are deleted when the block ends, also after an error that the user must fix.

    Args:
        target: the file or folder that is made from the parts.
        fingerprint: a hash of everything that the parts depend on.
        wait: wait for another process with the same target, instead of raising an error.
        kept_after: the error after which the folder is kept for the next run.

    Raises:
        StorageError: the folder cannot be created, or another process has the same target.
    """
    target = Path(target).resolve()
    with storage.writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.parent / f".{target.name}.work.lock", timeout=-1 if wait else 0)
        try:
            lock.acquire()
        except Timeout:
            raise StorageError(
                f"{target}: another process is writing it; wait until it has finished, or choose another output."
            ) from None
    folder = target.parent / f".{target.name}.work.{fingerprint[:16]}"
    try:
        for other in target.parent.iterdir():
            if other.name.startswith(f".{target.name}.work.") and other.is_dir() and other != folder:
                shutil.rmtree(other, ignore_errors=True)
        with storage.writing(folder):
            folder.mkdir(mode=0o700, exist_ok=True)  # it holds users' texts
        try:
            yield folder
        except kept_after:
            raise
        except (DataError, StorageError):
            shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        with contextlib.suppress(OSError):  # not empty
            folder.rmdir()
        with contextlib.suppress(PermissionError):  # Windows does not delete open files
            Path(lock.lock_file).unlink(missing_ok=True)  # a waiting process creates a new one
        lock.release()
