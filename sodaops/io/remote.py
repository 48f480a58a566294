"""Files and folders in remote storage: ``gs://BUCKET/NAME``, or another address that fsspec knows.

Every file is checked against its hash after a transfer. One file of a folder is written last, and tells that the folder is
complete. fsspec is imported for addresses only, so that a service with local paths does not load it.
"""

import base64
import contextlib
import hashlib
import logging
import os
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeGuard

from sodaops.errors import StorageError
from sodaops.io import storage
from sodaops.io.progress import progress

_PROBE = ".sodaops-check"  # an object that check_writable writes
_CONNECT_S, _READ_S = 10, 30  # gcsfs tries six times in all, with some 31 s of waiting in between
_READER, _WRITER = "roles/storage.objectViewer", "roles/storage.objectUser"


def is_address(path: str | Path | None) -> TypeGuard[str]:
    """Whether a path is an address in remote storage.

    >>> is_address("gs://bucket/a.csv"), is_address("data/a.csv"), is_address(None)
    (True, False, False)
    """
    return isinstance(path, str) and "://" in path


def join(folder: str, name: str) -> str:
    """The path of ``name`` in a local or remote folder.

    >>> join("gs://bucket/run/", "run.json")
    'gs://bucket/run/run.json'
    """
    return f"{folder.rstrip('/')}/{name}"


@contextlib.contextmanager
def open_remote(path: str, mode: Literal["rb", "wb"]) -> Iterator[BinaryIO]:
    """Opens an address; a written file appears as a whole when it is closed.

    Raises:
        StorageError: as :func:`filesystem`.
    """
    with filesystem(path, "read" if mode == "rb" else "written") as files, files.open(path, mode) as file:
        yield file


def read_if_exists(path: str) -> bytes | None:
    """The content of a local or remote file, or None where there is none.

    Raises:
        StorageError: no access, no connection, no bucket.
    """
    if not is_address(path):
        try:
            return Path(path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
    with filesystem(path, "read") as files:
        try:
            return files.cat_file(path)
        except FileNotFoundError:
            check_bucket(files, path)
            return None


def local_copy(path: str | Path) -> Path:
    """A local file to read: ``path`` itself, or a copy of a remote file, which is downloaded once for each of its versions.

    Copies lie in ~/.cache/sodaops, or in XDG_CACHE_HOME, readable by their owner only.

    Raises:
        StorageError: as :func:`download`.
    """
    if not is_address(path):
        return Path(path)
    with filesystem(path, "read") as files:
        info = _file_info(files, path)
    version = [path, *(str(info.get(key)) for key in ("size", "generation", "md5Hash", "etag", "mtime"))]
    cache = storage.cache_dir()
    copy = cache / storage.sha256_of_json(version)[:32] / path.rstrip("/").rpartition("/")[2]
    if not copy.is_file():
        with storage.writing(cache):
            cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        download(path, copy)
    return copy


def download(path: str, to: Path) -> None:
    """Downloads a file, whole or not at all.

    Raises:
        StorageError: no such file, no access, no connection; the copy differs from the original; the disk is full.
    """
    with storage.atomic_path(to, 0o600) as temporary, filesystem(path, "read") as files:
        info = _file_info(files, path)
        files.get_file(path, str(temporary), callback=_progress(path))
        if not _is_copy(temporary, info):
            raise StorageError(f"{path}: the download differs from the stored file, which may have changed; run it again.")


def upload(path: Path, address: str) -> None:
    """Uploads a file.

    Raises:
        StorageError: no access, no connection, no bucket; the stored file differs from the original.
    """
    with filesystem(address, "written") as files:
        _put(files, path, address)


def upload_folder(folder: Path, address: str, last: str, stale: Collection[str] = ()) -> None:
    """Uploads all files of a local folder, subfolders included.

    Args:
        folder: the local folder.
        address: the remote one.
        last: the file that tells that the folder is complete. An earlier one is deleted first; the new one is written last.
        stale: names that are deleted in the remote folder where the local one has none.

    Raises:
        StorageError: as :func:`upload`.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names.sort(key=lambda name: name == last)
    with filesystem(address, "written") as files:
        for name in {last, *(name for name in stale if not (folder / name).exists())}:
            if files.exists(join(address, name)):
                files.rm(join(address, name), recursive=True)
        for name in names:
            _put(files, folder / name, join(address, name))


def check_writable(folder: str) -> None:
    """Writes an empty object to a remote folder, and deletes it.

    Raises:
        StorageError: as :func:`upload`.
    """
    with filesystem(folder, "written") as files:
        files.pipe_file(join(folder, _PROBE), b"")
        files.rm_file(join(folder, _PROBE))


@contextlib.contextmanager
def output_folder(path: str, names: Collection[str], last: str, private: bool = False) -> Iterator[Path]:
    """A temporary folder to fill; it replaces ``path``, local or remote, when the block ends without an error.

    Args:
        path: a folder, or an address.
        names: the files that ``path`` may hold, as in :func:`~sodaops.io.storage.atomic_folder`.
        last: the file of these that tells that a remote folder is complete.
        private: readable by its owner only, since it holds users' texts; in remote storage the bucket's access rules apply.

    Raises:
        StorageError: as :func:`~sodaops.io.storage.atomic_folder` or :func:`upload_folder`.
    """
    if not is_address(path):
        with storage.atomic_folder(path, names, private) as folder:
            yield folder
        return
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)
        upload_folder(Path(name), path, last, names)


@contextlib.contextmanager
def filesystem(path: str, action: str) -> Iterator[Any]:
    """The fsspec file system of an address; every error within the block becomes a StorageError.

    Args:
        path: the address.
        action: what is done with it, for messages: read, listed, written or deleted.

    Raises:
        StorageError: no package for the address, no such file, no access, no connection.
    """
    files = None
    try:
        files = _file_system(path)
        yield files
    except ImportError as error:
        raise StorageError(f"{path}: {error.name or error} is not installed; run `pip install 'sodaops[gs]'`.") from error
    except StorageError:
        raise
    except FileNotFoundError as error:
        check_bucket(files, path)
        raise StorageError(f"{path}: could not be {action}; there is no such object. Check the name.") from error
    except Exception as error:  # each kind of storage has exceptions of its own
        reason = (
            "no answer in time" if isinstance(error, TimeoutError) else " ".join(str(error).split()) or type(error).__name__
        )
        raise StorageError(f"{path}: could not be {action} ({reason}); {_how_to_fix(path, action, error)}") from error


def check_bucket(files: Any, path: str) -> None:
    """Distinguishes a missing bucket from a missing object.

    Raises:
        StorageError: no such bucket.
    """
    bucket = _bucket(path)
    if bucket is None:
        return
    try:
        files.call("GET", "b/{}/o", bucket, maxResults=1)
    except FileNotFoundError:
        raise StorageError(
            f"{path}: there is no bucket {bucket}. Check the name, or create it: `gcloud storage buckets create gs://{bucket}`."
        ) from None
    except Exception:  # listing is not allowed either; the caller reports the first error
        return


def _bucket(path: str) -> str | None:
    scheme, _, rest = path.partition("://")
    return rest.partition("/")[0] if scheme in ("gs", "gcs") else None


def _file_system(path: str) -> Any:
    import fsspec

    options: dict[str, Any] = {"use_listings_cache": False}
    if _bucket(path) is not None:
        # gcsfs's interface for zonal buckets needs gRPC and more rights; with an emulator it would wait for a minute.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        import aiohttp

        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs tracebacks of errors that are raised here as well
        options["requests_timeout"] = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_READ_S)
        options["session_kwargs"] = {"trust_env": True}
        if os.environ.get("STORAGE_EMULATOR_HOST"):  # an emulator has no accounts
            options["token"] = "anon"
    return fsspec.core.url_to_fs(path, **options)[0]


def _how_to_fix(path: str, action: str, error: Exception) -> str:
    code, bucket = getattr(error, "code", None), _bucket(path)
    if bucket is None or not (code in (401, 403) or str(error).startswith("Forbidden")):
        return "check the address, the access and the connection."
    role = _READER if action in ("read", "listed") else _WRITER
    if code == 401:
        return (
            "sign in with `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS to a key file; the "
            f"account needs {role} on gs://{bucket}."
        )
    return (
        f"the account lacks {role}. Use another account, or run `gcloud storage buckets add-iam-policy-binding gs://{bucket} "
        f"--member=serviceAccount:NAME --role={role}`."
    )


def _file_info(files: Any, path: str) -> dict[str, Any]:
    info = files.info(path)
    if info["type"] != "file":
        raise StorageError(f"{path}: is a folder; expected the address of a file.")
    return info


def _is_copy(file: Path, info: dict[str, Any]) -> bool:
    """Whether a file has the size and, if it is known, the MD5 of a remote object."""
    if file.stat().st_size != info["size"]:
        return False
    if not info.get("md5Hash"):
        return True
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, lambda: hashlib.md5(usedforsecurity=False)).digest()
    return base64.b64encode(digest).decode() == info["md5Hash"]


def _put(files: Any, path: Path, address: str) -> None:
    files.put_file(str(path), address, callback=_progress(address))
    if not _is_copy(path, files.info(address)):
        raise StorageError(f"{address}: the stored file differs from the uploaded one; run it again.")


def _progress(path: str) -> Any:
    from fsspec.callbacks import TqdmCallback

    return TqdmCallback({"desc": path, "unit": "B", "unit_scale": True}, tqdm_cls=progress)
