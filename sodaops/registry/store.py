"""What a registry needs of the place that it lies in: a local folder, or one afar through fsspec.

The one operation with a promise is :meth:`create`: of any number of processes that create the same name, one succeeds.
A registry's history stands on that alone. On Google Cloud Storage it is a precondition on the object's generation, in a
folder it is a hard link.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sodaops.errors import StorageError
from sodaops.io import remote, storage


class LocalStore:
    """A folder of this machine, or of a shared file system with hard links."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._root = Path(root)

    def read(self, name: str) -> bytes | None:
        """A file's content; None where there is none."""
        try:
            return (self._root / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StorageError(f"{self._root / name}: could not be read ({error.strerror}); check the access.") from error

    def names(self, folder: str) -> list[str]:
        """The names in a folder; none where it is not there."""
        path = self._root / folder
        return sorted(entry.name for entry in path.iterdir() if not entry.name.startswith(".")) if path.is_dir() else []

    def create(self, name: str, content: bytes) -> bool:
        """Writes a new file, whole; False where one of this name is there already."""
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
        """Copies a folder of files here, whole or not at all; ``last`` is one of them."""
        with storage.atomic_folder(self._root / name, {file.name for file in folder.iterdir()}) as there:
            for file in folder.iterdir():
                shutil.copyfile(file, there / file.name)

    def delete(self, name: str) -> None:
        """Deletes a folder."""
        with storage.writing(self._root / name):
            if (self._root / name).is_dir():
                shutil.rmtree(self._root / name)

    @contextlib.contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """A folder of this store as a local one."""
        yield self._root / name


class RemoteStore:
    """A folder afar: ``gs://BUCKET/FOLDER``, or another address that fsspec knows and that creates exclusively."""

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")

    def read(self, name: str) -> bytes | None:
        """A file's content; None where there is none."""
        with self._asking(name, "read") as files:
            try:
                return files.cat_file(self._path(name))
            except FileNotFoundError:
                return None

    def names(self, folder: str) -> list[str]:
        """The names in a folder; none where it is not there."""
        with self._asking(folder, "listed") as files:
            try:
                found = files.ls(self._path(folder), detail=False, refresh=True)
            except FileNotFoundError:
                remote.check_bucket(files, self.root)
                return []
        return sorted(path.rstrip("/").rpartition("/")[2] for path in found)

    def create(self, name: str, content: bytes) -> bool:
        """Writes a new file, whole; False where one of this name is there already."""
        try:
            with self._asking(name, "written") as files:
                files.pipe_file(self._path(name), content, mode="create")
            return True
        except StorageError as error:
            why = error.__cause__
            if not isinstance(why, FileExistsError) and getattr(why, "code", None) != 412:  # the precondition
                raise
        return self.read(name) == content  # an answer that was lost made the client ask twice: it is ours after all

    def put(self, folder: Path, name: str, last: str) -> None:
        """Copies a folder of files here; it is whole when its file ``last`` is there."""
        remote.upload_folder(folder, self._path(name), last)

    def delete(self, name: str) -> None:
        """Deletes a folder."""
        with self._asking(name, "deleted") as files, contextlib.suppress(FileNotFoundError):
            files.rm(self._path(name), recursive=True)

    @contextlib.contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """A copy of a folder of this store, for as long as the block runs."""
        with tempfile.TemporaryDirectory() as folder:
            for file in self.names(name):
                remote.download(self._path(f"{name}/{file}"), Path(folder) / file)
            yield Path(folder)

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    @contextlib.contextmanager
    def _asking(self, name: str, verb: str) -> Iterator[Any]:
        with remote.filesystem(self._path(name), verb) as files:
            yield files


def open_store(root: str) -> LocalStore | RemoteStore:
    """The store at a folder's path or address."""
    return RemoteStore(root) if "://" in root else LocalStore(root)
