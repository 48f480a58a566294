"""Uploads a run to remote storage during training, and downloads the checkpoint from which a run resumes."""

import contextlib
import json
import logging
import shutil
import socket
import tempfile
import threading
from collections.abc import Collection, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from sodaops.config.schema import Config
from sodaops.errors import ConfigError, StorageError, TrainingError
from sodaops.io import remote, storage
from sodaops.io.run_record import RECORD

log = logging.getLogger(__name__)
UPLOAD_RECORD = "landed.json"  # written before training, to check access, and after it, with the hash of every file
_INTERVAL_S = 5.0
CHECKPOINTS = "checkpoints"
LAST = f"{CHECKPOINTS}/last.ckpt"
_UPLOADED_LAST = (LAST, "bundle/bundle.json", RECORD)  # each is uploaded after the files that it describes


@contextlib.contextmanager
def uploading(config: Config, is_uploader: bool = True) -> Iterator[Config]:
    """Replaces a remote ``run_dir`` by a local folder, outputs/gs/BUCKET/FOLDER, and uploads that folder.

    While the block runs, changed checkpoints and run.json are uploaded every few seconds. After the block, all other files are
    uploaded, and landed.json last. With ``ckpt_path=last``, the remote checkpoints are downloaded before the block.

    Args:
        config: with a remote ``run_dir``.
        is_uploader: whether this process uploads; true for one of the processes or machines that train together.

    Yields:
        The configuration with the local folder as ``run_dir``.

    Raises:
        ConfigError: ``run_dir`` is not a folder in a bucket.
        StorageError: no rights, no connection or no bucket, raised before the training; or an upload failed.
    """
    address, folder = config.run_dir.rstrip("/"), _local_folder("run_dir", config.run_dir)
    uploader = _Uploader(folder, address)
    if is_uploader:
        uploader.write_record(complete=False)
    if config.ckpt_path == "last":
        uploader.mark_uploaded(_download(f"{address}/{LAST}", folder))
    config = config.model_copy(update={"run_dir": str(folder)})
    if not is_uploader:
        yield config
        return
    try:
        with uploader.in_background():
            yield config
    except BaseException as error:
        try:
            uploader.upload_all()
        except StorageError as failure:  # the error that ended the run is the one to raise
            log.warning("%s The files are in %s.", failure, folder)
            raise error from None
        if isinstance(error, KeyboardInterrupt | TrainingError):  # the hint to resume should work on every machine
            raise type(error)(str(error).replace(f"run_dir={folder}", f"run_dir={address}")) from None
        raise
    try:
        uploader.write_record(complete=True, files=uploader.upload_all())
    except StorageError as error:
        raise StorageError(f"{error} The run is complete in {folder}; copy it from there.") from error


def check_address(address: str) -> None:
    """Checks that a run can be uploaded to an address.

    Raises:
        ConfigError, StorageError: as :func:`uploading`, before the training.
    """
    _Uploader(_local_folder("run_dir", address), address.rstrip("/")).write_record(complete=False)


def download_checkpoint(config: Config) -> Config:
    """Replaces a remote ``ckpt_path`` by a local copy; also downloads the run's other checkpoints.

    Raises:
        ConfigError: the checkpoint does not exist.
        StorageError: no rights, no connection or no bucket.
    """
    if not remote.is_address(config.ckpt_path):
        return config
    copy = _local_folder("ckpt_path", config.ckpt_path)
    if not _download(config.ckpt_path, copy.parent.parent):
        raise ConfigError(f"ckpt_path={config.ckpt_path}: no such file; give RUN/checkpoints/last.ckpt of an earlier run.")
    return config.model_copy(update={"ckpt_path": str(copy)})


def _local_folder(key: str, address: str) -> Path:
    """outputs/gs/BUCKET/FOLDER for gs://BUCKET/FOLDER."""
    scheme, _, rest = address.partition("://")
    names = [name for name in rest.split("/") if name]
    if len(names) < 2 or {".", ".."} & set(names):
        raise ConfigError(f"{key}={address}: expected a folder in a bucket, as gs://BUCKET/FOLDER.")
    return Path("outputs", scheme, *names)


def _download(checkpoint: str, folder: Path) -> list[str]:
    """Downloads a checkpoint, the other checkpoints of its run, and run.json into a run folder.

    Returns:
        The paths of the checkpoints relative to the run folder; empty if the checkpoint does not exist.
    """
    remote_folder, _, name = checkpoint.rpartition("/")
    with remote.filesystem(remote_folder, "listed") as files:
        try:
            remote_names = {path.rpartition("/")[2] for path in files.ls(remote_folder, detail=False, refresh=True)}
        except FileNotFoundError:
            remote.check_bucket(files, remote_folder)
            remote_names = set()
    if name not in remote_names:
        return []
    checkpoints = sorted(other for other in remote_names if other.endswith(".ckpt"))
    for other in checkpoints:
        remote.download(f"{remote_folder}/{other}", folder / CHECKPOINTS / other)
    record = remote.read_if_exists(f"{remote_folder.rpartition('/')[0]}/{RECORD}")
    if record is not None:
        storage.write_text(folder / RECORD, record.decode())
    return [f"{CHECKPOINTS}/{other}" for other in checkpoints]


class _Snapshot(NamedTuple):
    """A file to upload."""

    name: str  # path relative to the run folder
    path: Path  # the file itself, or a copy that training does not replace
    modified_ns: int


class _Uploader:
    """Uploads the changed files of a run folder."""

    def __init__(self, folder: Path, address: str) -> None:
        self._folder, self._address = folder, address
        self._uploaded: dict[str, int] = {}  # name -> modification time of the uploaded version, ns
        self._started = datetime.now(UTC).isoformat(timespec="seconds")
        self._stop = threading.Event()

    def mark_uploaded(self, names: Collection[str]) -> None:
        """Records that these files are the same in the remote folder."""
        self._uploaded |= {name: (self._folder / name).stat().st_mtime_ns for name in names}

    def write_record(self, complete: bool, files: dict[str, str] | None = None) -> None:
        """Writes landed.json."""
        record: dict[str, Any] = {"whole": complete, "host": socket.gethostname(), "begun": self._started, "files": files or {}}
        address = remote.join(self._address, UPLOAD_RECORD)
        with remote.filesystem(address, "written") as filesystem:
            filesystem.pipe_file(address, json.dumps(record, indent=1).encode())

    @contextlib.contextmanager
    def in_background(self) -> Iterator[None]:
        """Uploads checkpoints and run.json from a thread while the block runs."""
        thread = threading.Thread(target=self._upload_repeatedly, name="upload", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def _upload_repeatedly(self) -> None:
        logged = ""
        while not self._stop.wait(_INTERVAL_S):
            try:
                self._upload_checkpoints()
                logged = ""
            except (StorageError, OSError) as error:  # not fatal: upload_all runs after training
                if str(error) != logged:
                    log.warning("%s It will be tried again.", error)
                logged = str(error)

    def _upload_checkpoints(self) -> None:
        """Uploads changed checkpoints, then run.json.

        last.ckpt is copied first and uploaded last, so that the other remote checkpoints are at least as new.
        """
        if not self._folder.is_dir():  # nothing has been written yet
            return
        with tempfile.TemporaryDirectory(prefix=".upload.", dir=self._folder) as copies:
            last = self._snapshot(LAST, Path(copies))
            if last is not None:
                for path in sorted((self._folder / CHECKPOINTS).glob("*.ckpt")):
                    if path.name != last.path.name:
                        self._upload(self._snapshot(f"{CHECKPOINTS}/{path.name}", Path(copies)))
                self._upload(last)
            self._upload(self._snapshot(RECORD, Path(copies)))

    def _snapshot(self, name: str, copies: Path) -> _Snapshot | None:
        """A copy of a file, which training may replace; None if the file has not changed since its upload."""
        if not self._has_changed(name):
            return None
        modified_ns = (self._folder / name).stat().st_mtime_ns
        return _Snapshot(name, shutil.copyfile(self._folder / name, copies / Path(name).name), modified_ns)

    def _upload(self, snapshot: _Snapshot | None) -> None:
        if snapshot is not None:
            remote.upload(snapshot.path, remote.join(self._address, snapshot.name))
            self._uploaded[snapshot.name] = snapshot.modified_ns

    def upload_all(self) -> dict[str, str]:
        """Uploads every changed file; files that describe others come last.

        Returns:
            Relative path -> SHA-256 of all files, in the order of upload.
        """
        paths = [path for path in self._folder.rglob("*") if path.is_file()]
        names = [path.relative_to(self._folder).as_posix() for path in paths]
        names = sorted(name for name in names if not any(part.startswith(".") for part in name.split("/")))
        names.sort(key=lambda name: _UPLOADED_LAST.index(name) if name in _UPLOADED_LAST else -1)
        for name in names:
            if self._has_changed(name):
                self._upload(_Snapshot(name, self._folder / name, (self._folder / name).stat().st_mtime_ns))
        return {name: storage.sha256_of(self._folder / name) for name in names}

    def _has_changed(self, name: str) -> bool:
        path = self._folder / name
        return path.is_file() and path.stat().st_mtime_ns != self._uploaded.get(name)
