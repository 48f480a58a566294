"""A bundle in a local folder, wherever it is stored: locally, at gs://, or behind an alias of a registry."""

import contextlib
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from sodaops.bundle import layout
from sodaops.errors import BundleError, StorageError
from sodaops.io import remote
from sodaops.io.run_record import RECORD
from sodaops.registry.registry import Registry, address_of

FileChoice = Callable[[layout.BundleInfo], Collection[str]]


def all_files(info: layout.BundleInfo) -> Collection[str]:
    """All files of a bundle."""
    return info.files


def predictor_files(variant: str | None) -> FileChoice:
    """The files that a predictor reads, besides bundle.json.

    Args:
        variant: of the ONNX models; None is the bundle's default.
    """

    def choose(info: layout.BundleInfo) -> Collection[str]:
        names = (layout.TOKENIZER, layout.ONNX.get(variant or info.default_variant), layout.DRIFT)
        return [name for name in names if name in info.files]

    return choose


def local_bundle(path: str | Path) -> Path:
    """The folder of a local bundle; a run's folder stands for the bundle in it."""
    path = Path(path)
    return path / "bundle" if not (path / layout.INFO).exists() and (path / "bundle" / layout.INFO).exists() else path


@contextlib.contextmanager
def bundle_at(source: str | Path, choose: FileChoice = all_files) -> Iterator[Path]:
    """A bundle's local folder. A remote bundle is downloaded, checked against its hashes, and deleted after the block.

    Errors about a downloaded copy, also those raised in the block, name the address instead of the temporary folder.

    Args:
        source: a folder, also a run's, gs://BUCKET/FOLDER, or an alias or version in a registry: REGISTRY@champion.
        choose: which files to download, besides bundle.json.

    Raises:
        BundleError: missing, incomplete or damaged.
        RegistryError: no such alias.
        StorageError: no rights, no connection.
    """
    address = address_of(str(source))
    if not remote.is_address(address):
        yield local_bundle(address)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "bundle"
        folder.mkdir()
        try:
            (folder / layout.INFO).write_bytes(_read_info_file(address))
            info = layout.read_info(folder)
            names = choose(info)
            for name in names:
                _fetch(remote.join(address, name), folder / name)
            if names:
                layout.verify(folder, info, names)
            yield folder
        except BundleError as error:
            raise BundleError(str(error).replace(str(folder), address)) from error


def register_bundle(registry: Registry, source: str, why: str = "", metrics: Mapping[str, Any] | None = None) -> str:
    """Adds a bundle to a registry, wherever it is stored; see :meth:`sodaops.registry.registry.Registry.register`."""
    with bundle_at(source) as folder:
        record = remote.join(source.rstrip("/").rpartition("/")[0], RECORD) if remote.is_address(source) else None
        if record is not None and (content := remote.read_if_exists(record)) is not None:
            (folder.parent / RECORD).write_bytes(content)  # beside the copy of the bundle, for its metrics
        return registry.register(folder, why, metrics)


def _read_info_file(address: str) -> bytes:
    content = remote.read_if_exists(remote.join(address, layout.INFO))
    if content is None:
        raise BundleError(f"{address}: no {layout.INFO}; expected a bundle whose upload is complete (this file comes last).")
    return content


def _fetch(address: str, path: Path) -> None:
    """Downloads a file. A missing one is not an error here: layout.verify() reports it as a fault of the bundle."""
    try:
        remote.download(address, path)
    except StorageError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
