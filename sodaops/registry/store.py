"""File operations of a registry, in a local folder or at a remote address.

The registry's history relies on :meth:`create`: if several processes create the same name, exactly one succeeds. On Google
Cloud Storage this is a precondition on the object's generation, in a local folder it is a hard link.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sodaops.errors import StorageError
from sodaops.io import remote, storage


class LocalStore:
    """A local folder, or one on a shared file system with hard links."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._root = Path(root)

    def read(self, name: str) -> bytes | None:
        """The content of a file; None if it does not exist."""
        try:
            return (self._root / name).read_bytes()
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

    def put(self, folder: Path, name: str, last: str) -> None:
        """Copies a folder of files to the store atomically; ``last`` is only used by remote stores."""
        with storage.atomic_folder(self._root / name, {file.name for file in folder.iterdir()}) as target:
            for file in folder.iterdir():
                shutil.copyfile(file, target / file.name)

    def delete(self, name: str) -> None:
        """Deletes a folder."""
        with storage.writing(self._root / name):
            if (self._root / name).is_dir():
                shutil.rmtree(self._root / name)

    @contextlib.contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """A local path of a folder of the store."""
        yield self._root / name


class RemoteStore:
    """A remote folder: ``gs://BUCKET/FOLDER``, or another fsspec address that supports exclusive creation."""

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")

    def read(self, name: str) -> bytes | None:
        """The content of a file; None if it does not exist."""
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

    def put(self, folder: Path, name: str, last: str) -> None:
        """Copies a folder of files to the store; ``last`` is written last, and marks it as complete."""
        remote.upload_folder(folder, self._path(name), last)

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
