"""A run that lands afar: it is filled in a folder of this machine, and what is new in it goes to its address as it comes."""

import contextlib
import json
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Collection, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from sodaops.config.schema import Config
from sodaops.errors import ConfigError, StorageError, TrainingError
from sodaops.io import remote, runs, storage

ACCOUNT = "landed.json"  # written first, to see that one may, and last, with the hash of every file, when all are there
_EVERY_S = 5.0
CHECKPOINTS = "checkpoints"
LAST = f"{CHECKPOINTS}/last.ckpt"
_ENDS = (LAST, "bundle/bundle.json", runs.RECORD)  # each says that what belongs to it is there


@contextlib.contextmanager
def landing(config: Config, sends: bool = True) -> Iterator[Config]:
    """The configuration of a run with a folder of this machine in place of its address: outputs/gs/BUCKET/FOLDER.

    While the block runs, checkpoints and run.json go to the address whenever they change; at its end everything does, the
    bundle's bundle.json after its other files, and landed.json last. With ``ckpt_path=last`` the checkpoints that are there
    come here first.

    Args:
        config: with an address in ``run_dir``.
        sends: of several processes or machines that train together, one sends.

    Raises:
        ConfigError: an address without a folder.
        StorageError: no rights, no connection or no bucket, told before the training; or not everything arrived.
    """
    address, folder = config.run_dir.rstrip("/"), _folder_of("run_dir", config.run_dir)
    ship = _Ship(folder, address)
    if sends:
        ship.tell(whole=False)
    if config.ckpt_path == "last":
        ship.note(_bring(f"{address}/{LAST}", folder))
    config = config.model_copy(update={"run_dir": str(folder)})
    if not sends:
        yield config
        return
    try:
        with ship.sailing():
            yield config
    except BaseException as end:
        try:
            ship.send_all()
        except StorageError as error:  # what ended the run is what is to be told
            print(f"warning: {error} What there is lies in {folder}.", file=sys.stderr)
            raise end from None
        if isinstance(end, KeyboardInterrupt | TrainingError):  # where to go on, also for another machine
            raise type(end)(str(end).replace(f"run_dir={folder}", f"run_dir={address}")) from None
        raise
    try:
        ship.tell(whole=True, files=ship.send_all())
    except StorageError as error:
        raise StorageError(f"{error} The run is whole in {folder}; copy it from there.") from error


def brought(config: Config) -> Config:
    """The configuration with a copy in place of a checkpoint that ``ckpt_path`` names afar; those beside it come along.

    Raises:
        ConfigError: no such checkpoint.
        StorageError: no rights, no connection or no bucket.
    """
    if not remote.is_address(config.ckpt_path):
        return config
    copy = _folder_of("ckpt_path", config.ckpt_path)
    if not _bring(config.ckpt_path, copy.parent.parent):
        raise ConfigError(f"ckpt_path={config.ckpt_path}: no such file; give RUN/checkpoints/last.ckpt of an earlier run.")
    return config.model_copy(update={"ckpt_path": str(copy)})


def _folder_of(key: str, address: str) -> Path:
    scheme, _, rest = address.partition("://")
    names = [name for name in rest.split("/") if name]
    if len(names) < 2 or {".", ".."} & set(names):
        raise ConfigError(f"{key}={address}: expected a folder in a bucket, as gs://BUCKET/FOLDER.")
    return Path("outputs", scheme, *names)


def _bring(checkpoint: str, folder: Path) -> list[str]:
    """Copies a checkpoint, the others beside it and the run's record to a run folder; returns their names there, none where
    it is not there."""
    there, _, name = checkpoint.rpartition("/")
    run = there.rpartition("/")[0]
    with remote.afar(there, "listed") as files:
        try:
            found = {path.rpartition("/")[2] for path in files.ls(there, detail=False, refresh=True)}
        except FileNotFoundError:
            remote.need_bucket(files, there)
            found = set()
    if name not in found:
        return []
    names = [f"{CHECKPOINTS}/{other}" for other in sorted(found) if other.endswith(".ckpt")]
    for other in names:
        remote.fetch_file(f"{there}/{Path(other).name}", folder / other)
    record = remote.read_if_there(f"{run}/{runs.RECORD}")
    if record is not None:
        storage.write_text(folder / runs.RECORD, record.decode())
    return names


class _Held(NamedTuple):
    """A file of the run folder that is to be sent."""

    name: str
    copy: Path
    written_ns: int


class _Ship:
    """Brings the files of a run folder to an address, each when it has changed."""

    def __init__(self, folder: Path, address: str) -> None:
        self._folder, self._address = folder, address
        self._sent: dict[str, int] = {}  # name -> when what was sent had been written, in ns
        self._begun = datetime.now(UTC).isoformat(timespec="seconds")
        self._ends = threading.Event()

    def note(self, names: Collection[str]) -> None:
        """These files are at the address as they are here."""
        self._sent |= {name: (self._folder / name).stat().st_mtime_ns for name in names}

    def tell(self, whole: bool, files: dict[str, str] | None = None) -> None:
        """Writes landed.json."""
        told: dict[str, Any] = {"whole": whole, "host": socket.gethostname(), "begun": self._begun, "files": files or {}}
        address = remote.below(self._address, ACCOUNT)
        with remote.afar(address, "written") as there:
            there.pipe_file(address, json.dumps(told, indent=1).encode())

    @contextlib.contextmanager
    def sailing(self) -> Iterator[None]:
        """Sends checkpoints and the record from a thread of its own while the block runs."""
        thread = threading.Thread(target=self._sail, name="landing", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ends.set()
            thread.join()

    def _sail(self) -> None:
        said = ""
        while not self._ends.wait(_EVERY_S):
            try:
                self._send_checkpoints()
                said = ""
            except (StorageError, OSError) as error:  # it is tried again, and at the end everything must arrive
                if str(error) != said:
                    print(f"warning: {error} It is tried again.", file=sys.stderr, flush=True)
                said = str(error)

    def _send_checkpoints(self) -> None:
        """The last one is held before the others are sent, so that none of these is older than it; afar it comes after them."""
        if not self._folder.is_dir():  # nothing was written yet
            return
        with tempfile.TemporaryDirectory(prefix=".landing.", dir=self._folder) as kept:
            held = self._held(LAST, Path(kept))
            if held is not None:
                for path in sorted((self._folder / CHECKPOINTS).glob("*.ckpt")):
                    self._send(self._held(f"{CHECKPOINTS}/{path.name}", Path(kept)) if path.name != held.copy.name else None)
                self._send(held)
            self._send(self._held(runs.RECORD, Path(kept)))

    def _held(self, name: str, kept: Path) -> _Held | None:
        """A copy of a file that may be replaced meanwhile; None where it has not changed since it was sent."""
        if not self._changed(name):
            return None
        written_ns = (self._folder / name).stat().st_mtime_ns
        return _Held(name, shutil.copyfile(self._folder / name, kept / Path(name).name), written_ns)

    def _send(self, held: _Held | None) -> None:
        if held is not None:
            remote.send_file(held.copy, remote.below(self._address, held.name))
            self._sent[held.name] = held.written_ns

    def send_all(self) -> dict[str, str]:
        """Sends what has changed since, the bundle's account of itself after the bundle.

        Returns:
            Name -> SHA-256 of all files.
        """
        paths = [path for path in self._folder.rglob("*") if path.is_file()]
        names = [path.relative_to(self._folder).as_posix() for path in paths]
        names = sorted(name for name in names if not any(part.startswith(".") for part in name.split("/")))
        names.sort(key=lambda name: _ENDS.index(name) if name in _ENDS else -1)
        for name in names:
            if self._changed(name):
                self._send(_Held(name, self._folder / name, (self._folder / name).stat().st_mtime_ns))
        return {name: storage.sha256_of(self._folder / name) for name in names}

    def _changed(self, name: str) -> bool:
        path = self._folder / name
        return path.is_file() and path.stat().st_mtime_ns != self._sent.get(name)
