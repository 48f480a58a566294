"""The folder in which parts wait while splits or answers are made: beside these, theirs alone, and gone when they are done."""

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
    """A folder to work in; one that a run of the same fingerprint left behind when it was stopped or killed is given again.

    It is deleted when the block ends, also by a fault that a user must mend, together with those of other fingerprints.

    Args:
        target: the file or folder that is made.
        fingerprint: a hash of all that the parts depend on.
        wait: for another process that makes the same; otherwise this one is refused.
        kept_after: the fault of a user after which it stays.

    Raises:
        StorageError: the folder cannot be made, or another process makes the same.
    """
    target = Path(target).resolve()
    with storage.writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.parent / f".{target.name}.work.lock", timeout=-1 if wait else 0)
        try:
            lock.acquire()
        except Timeout:
            raise StorageError(
                f"{target}: another process is writing it; wait until that one has finished, or name another output."
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
        with contextlib.suppress(OSError):  # there is something in it
            folder.rmdir()
        with contextlib.suppress(PermissionError):  # Windows keeps a file that is open
            Path(lock.lock_file).unlink(missing_ok=True)  # who waits for it sees that it is gone, and makes a new one
        lock.release()
