"""File operations of a registry, in a local folder or at a remote address.

The registry's history relies on :meth:`create`: if several processes create the same name, exactly one succeeds. On Google
Cloud Storage this is a precondition on the object's generation, in a local folder it is a hard link.
"""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from sodaops.errors import StorageError
from sodaops.io import remote, storage


class LocalStore:
    """A local folder, or one on a shared file system with hard links."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._root = Path(root)

    def read(self, name: str) -> bytes | None:
        """The content of a file; None if there is no such file."""
        try:
            return (self._root / name).read_bytes() if (self._root / name).is_file() else None  # not a FIFO, for example
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StorageError(f"{self._root / name}: could not be read ({error.strerror}); check the access.") from error

    def names(self, folder: str) -> list[str]:
        """The names in a folder; empty if it does not exist."""
        path = self._root / folder
        return sorted(entry.name for entry in path.iterdir() if not entry.name.startswith(".")) if path.is_dir() else []

    def create(self, name: str, content: bytes) -> bool:
        """Creates a file atomically; False if it exists already."""
        path = self._root / name
        with storage.writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with storage.temporary(path) as temporary:
                temporary.write_bytes(content)
                storage.sync(temporary)
                try:
                    os.link(temporary, path)
                except FileExistsError:
                    return False
            storage.sync(path.parent)
        return True

    def times(self, folder: str) -> dict[str, float]:
        """When each entry of a folder was changed, in seconds since 1970, hidden entries included."""
        path, times = self._root / folder, {}
        for entry in path.iterdir() if path.is_dir() else ():
            with contextlib.suppress(FileNotFoundError):  # renamed since
                times[entry.name] = entry.lstat().st_mtime
        return times

    def put(self, name: str, names: Collection[str], last: str) -> AbstractContextManager[Path]:
        """A local folder to fill with files of these names; it is stored as a whole when the block ends.

        ``last`` is only used by remote stores.
        """
        return storage.atomic_folder(self._root / name, names)

    def delete(self, name: str) -> None:
        """Deletes a folder or file."""
        path = self._root / name
        with storage.writing(path), contextlib.suppress(FileNotFoundError):  # deleted by another process
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    @contextlib.contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """A local path of a folder of the store."""
        yield self._root / name


class RemoteStore:
    """A remote folder: ``gs://BUCKET/FOLDER``, or another fsspec address that supports exclusive creation."""

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")

    def read(self, name: str) -> bytes | None:
        """The content of a file; None if there is no such file."""
        with remote.filesystem(self._path(name), "read") as files:
            try:
                return files.cat_file(self._path(name))
            except FileNotFoundError:
                return None

    def names(self, folder: str) -> list[str]:
        """The names in a folder; empty if it does not exist."""
        with remote.filesystem(self._path(folder), "listed") as files:
            try:
                paths = files.ls(self._path(folder), detail=False, refresh=True)
            except FileNotFoundError:
                remote.check_bucket(files, self.root)
                return []
        return sorted(path.rstrip("/").rpartition("/")[2] for path in paths)

    def create(self, name: str, content: bytes) -> bool:
        """Creates a file atomically; False if it exists already."""
        try:
            with remote.filesystem(self._path(name), "written") as files:
                files.pipe_file(self._path(name), content, mode="create")
            return True
        except StorageError as error:
            cause = error.__cause__
            if not isinstance(cause, FileExistsError) and getattr(cause, "code", None) != 412:  # 412: precondition failed
                raise
        # If the response to a successful request was lost, the client's retry finds our own file.
        return self.read(name) == content

    def times(self, folder: str) -> dict[str, float]:
        """When each entry of a folder was changed, in seconds since 1970; for one without a time, the current time."""
        times: dict[str, float] = {}
        with remote.filesystem(self._path(folder), "listed") as files, contextlib.suppress(FileNotFoundError):
            prefix = files._strip_protocol(self._path(folder))
            for path, info in files.find(self._path(folder), detail=True, refresh=True).items():
                changed = info.get("mtime") or info.get("created")
                name = path.removeprefix(prefix).strip("/").partition("/")[0]
                times[name] = max(times.get(name, 0.0), changed.timestamp() if changed else time.time())
        return times

    @contextlib.contextmanager
    def put(self, name: str, names: Collection[str], last: str) -> Iterator[Path]:
        """A local folder to fill; it is uploaded when the block ends. ``last`` comes last, and marks it as complete."""
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
            remote.upload_folder(Path(folder), self._path(name), last)

    def delete(self, name: str) -> None:
        """Deletes a folder."""
        with remote.filesystem(self._path(name), "deleted") as files, contextlib.suppress(FileNotFoundError):
            files.rm(self._path(name), recursive=True)

    @contextlib.contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """A temporary local copy of a folder of the store."""
        with tempfile.TemporaryDirectory() as folder:
            for file in self.names(name):
                remote.download(self._path(f"{name}/{file}"), Path(folder) / file)
            yield Path(folder)

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"


def open_store(root: str) -> LocalStore | RemoteStore:
    """The store at a folder's path or address."""
    return RemoteStore(root) if "://" in root else LocalStore(root)
