"""Files and folders afar: ``gs://BUCKET/NAME``, or another address that fsspec knows. What goes or comes is held against its
hash, and a folder is whole when the one file is there that is written last."""

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

_CONNECT_S, _READ_S = 10, 30  # gcsfs asks six times in all, some 31 s of waiting between them
_READER, _WRITER = "roles/storage.objectViewer", "roles/storage.objectUser"


def is_address(path: str | Path | None) -> TypeGuard[str]:
    """Whether this names something afar.

    >>> is_address("gs://bucket/a.csv"), is_address("data/a.csv"), is_address(None)
    (True, False, False)
    """
    return isinstance(path, str) and "://" in path


def below(place: str, name: str) -> str:
    """What is called ``name`` in a folder here or afar.

    >>> below("gs://bucket/run/", "run.json")
    'gs://bucket/run/run.json'
    """
    return f"{place.rstrip('/')}/{name}"


@contextlib.contextmanager
def open_anywhere(path: str, mode: Literal["rb", "wb"]) -> Iterator[BinaryIO]:
    """Opens an address; what is written appears whole, on closing.

    Raises:
        StorageError: no package for the address, no such file, no rights, no connection.
    """
    verb = "read" if mode == "rb" else "written"
    with afar(path, verb) as files, files.open(path, mode) as file:
        yield file


def read_if_there(path: str) -> bytes | None:
    """The content of a file here or afar; None where there is none.

    Raises:
        StorageError: no rights, no connection, no bucket.
    """
    if not is_address(path):
        try:
            return Path(path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
    with afar(path, "read") as files:
        try:
            return files.cat_file(path)
        except FileNotFoundError:
            need_bucket(files, path)
            return None


def local_copy(path: str | Path) -> Path:
    """A file to read: ``path`` itself, or this machine's copy of one afar, which is loaded once for each of its states.

    Copies lie in ~/.cache/sodaops, or below XDG_CACHE_HOME, for their owner alone.

    Raises:
        StorageError: as :func:`fetch_file`.
    """
    if not is_address(path):
        return Path(path)
    with afar(path, "read") as files:
        about = _about(files, path)
    state = [path, *(str(about.get(key)) for key in ("size", "generation", "md5Hash", "etag", "mtime"))]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sodaops"
    copy = cache / storage.sha256_of_json(state)[:32] / path.rstrip("/").rpartition("/")[2]
    if not copy.is_file():
        with storage.writing(cache):
            cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        fetch_file(path, copy)
    return copy


def fetch_file(path: str, to: Path) -> None:
    """Copies a file from afar, whole or not at all.

    Raises:
        StorageError: no such file, no rights, no connection; what came is not what is stored there; the disk is full.
    """
    with storage.atomic_path(to, 0o600) as temporary, afar(path, "read") as files:
        about = _about(files, path)
        files.get_file(path, str(temporary), callback=_progress(path))
        if not _is_copy(temporary, about):
            raise StorageError(f"{path}: what came is not what is stored there; it may have changed meanwhile. Run it again.")


def publish(folder: Path, address: str, last: str, stale: Collection[str] = ()) -> None:
    """Copies all files of a folder, and those of its folders, to an address.

    Args:
        folder: on this machine.
        address: where to.
        last: the file that says that all are there. An earlier one is deleted first, and it is written when the rest is there.
        stale: names that are deleted there where the folder has none.

    Raises:
        StorageError: no rights, no connection, no bucket, or something else arrived than was sent.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names.sort(key=lambda name: name == last)
    with afar(address, "written") as files:
        for name in {last, *(name for name in stale if not (folder / name).exists())}:
            if files.exists(below(address, name)):
                files.rm(below(address, name), recursive=True)
        for name in names:
            _send(files, folder / name, below(address, name))


def send_file(path: Path, address: str) -> None:
    """Copies a file to an address.

    Raises:
        StorageError: as :func:`publish`.
    """
    with afar(address, "written") as files:
        _send(files, path, address)


@contextlib.contextmanager
def folder_to_fill(path: str, names: Collection[str], last: str, private: bool = False) -> Iterator[Path]:
    """A temporary folder to fill; it takes the place of ``path``, here or afar, when the block ends well.

    Args:
        path: a folder, or an address.
        names: what it may hold, as in :func:`~sodaops.io.storage.atomic_folder`.
        last: of these, the file that says afar that all are there.
        private: for its owner alone, since it holds users' texts; afar the bucket's rights decide.

    Raises:
        StorageError: as :func:`~sodaops.io.storage.atomic_folder` or :func:`publish`.
    """
    if not is_address(path):
        with storage.atomic_folder(path, names, private) as folder:
            yield folder
        return
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)
        publish(Path(name), path, last, names)


@contextlib.contextmanager
def afar(path: str, verb: str) -> Iterator[Any]:
    """The file system of an address, as fsspec has it; what goes wrong with it is told as ours.

    Args:
        path: the address.
        verb: what is being done to it, in the past tense: read, listed, written, deleted.

    Raises:
        StorageError: no package for the address, no such file, no rights, no connection.
    """
    files = None
    try:
        files = _file_system(path)
        yield files
    except ImportError as error:
        raise StorageError(
            f"{path}: {error.name or error} is not installed; get it with `pip install 'sodaops[gs]'`."
        ) from error
    except StorageError:
        raise
    except FileNotFoundError as error:
        need_bucket(files, path)
        raise StorageError(f"{path}: could not be {verb}; there is no such object. Check the name.") from error
    except Exception as error:  # every kind of storage has errors of its own
        said = "no answer in time" if isinstance(error, TimeoutError) else " ".join(str(error).split()) or type(error).__name__
        raise StorageError(f"{path}: could not be {verb} ({said}); {_mend(path, verb, error)}") from error


def need_bucket(files: Any, path: str) -> None:
    """Tells a bucket that is missing from an object that is.

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
            f"{path}: there is no bucket {bucket}. Check the name, or make it: `gcloud storage buckets create gs://{bucket}`."
        ) from None
    except Exception:  # who may not list it cannot know, and what went wrong is told anyway
        return


def _bucket(path: str) -> str | None:
    scheme, _, rest = path.partition("://")
    return rest.partition("/")[0] if scheme in ("gs", "gcs") else None


def _file_system(path: str) -> Any:
    import fsspec  # afar only

    options: dict[str, Any] = {"use_listings_cache": False}
    if _bucket(path) is not None:
        # gcsfs's interface for zonal buckets needs gRPC and more rights; in front of an emulator it would wait a minute.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        import aiohttp

        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints tracebacks of what is told here
        options["requests_timeout"] = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_READ_S)
        options["session_kwargs"] = {"trust_env": True}
        if os.environ.get("STORAGE_EMULATOR_HOST"):  # which has no accounts
            options["token"] = "anon"
    return fsspec.core.url_to_fs(path, **options)[0]


def _mend(path: str, verb: str, error: Exception) -> str:
    said, code = str(error), getattr(error, "code", None)
    bucket = _bucket(path)
    if bucket is None or not (code in (401, 403) or said.startswith("Forbidden")):
        return "check the address, the access and the connection."
    role = _READER if verb in ("read", "listed") else _WRITER
    if code == 401:
        return (
            f"no account is signed in that may do so. Sign in with `gcloud auth application-default login`, or name a key in "
            f"GOOGLE_APPLICATION_CREDENTIALS; the account needs {role} on gs://{bucket}."
        )
    return (
        f"the account that is signed in lacks {role} there. Is it the right account? If so: `gcloud storage buckets "
        f"add-iam-policy-binding gs://{bucket} --member=serviceAccount:NAME --role={role}`."
    )


def _about(files: Any, path: str) -> dict[str, Any]:
    about = files.info(path)
    if about["type"] != "file":
        raise StorageError(f"{path}: is a folder there; expected the address of a file.")
    return about


def _is_copy(file: Path, about: dict[str, Any]) -> bool:
    """Whether a file has the size and, where that is known, the MD5 of an object."""
    if file.stat().st_size != about["size"]:
        return False
    if not about.get("md5Hash"):
        return True
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, lambda: hashlib.md5(usedforsecurity=False)).digest()
    return base64.b64encode(digest).decode() == about["md5Hash"]


def _send(files: Any, path: Path, address: str) -> None:
    files.put_file(str(path), address, callback=_progress(address))
    if not _is_copy(path, files.info(address)):
        raise StorageError(f"{address}: something else arrived than was sent; run it again.")


def _progress(path: str) -> Any:
    from fsspec.callbacks import TqdmCallback

    shown = {"desc": path, "unit": "B", "unit_scale": True, "delay": 2, "leave": False, "disable": None}
    return TqdmCallback(tqdm_kwargs=shown)
