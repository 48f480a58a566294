"""A bundle on this machine, wherever it is: in a folder, at gs://, or behind an alias of a registry."""

import contextlib
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from sodaops.bundle import layout
from sodaops.errors import BundleError, StorageError
from sodaops.io import remote
from sodaops.registry.registry import address_of

Needs = Callable[[layout.BundleInfo], Collection[str]]


def everything(info: layout.BundleInfo) -> Collection[str]:
    """All files of a bundle."""
    return info.files


def answering(variant: str | None) -> Needs:
    """What a predictor reads of a bundle, beside bundle.json.

    Args:
        variant: of the ONNX models; None is the bundle's choice.
    """

    def needs(info: layout.BundleInfo) -> Collection[str]:
        wanted = (layout.TOKENIZER, layout.ONNX.get(variant or info.default_variant), layout.DRIFT)
        return [name for name in wanted if name in info.files]

    return needs


@contextlib.contextmanager
def bundle_at(source: str | Path, needs: Needs = everything) -> Iterator[Path]:
    """A bundle's folder: its own, or for as long as the block runs a copy of one afar, whose files agree with their hashes.

    What is wrong with a copy, in the block as well, is told of where it came from.

    Args:
        source: a folder, gs://BUCKET/FOLDER, or an alias or version in a registry: REGISTRY@champion.
        needs: which files are copied from afar beside bundle.json.

    Raises:
        BundleError: none there, half of one, or a damaged one.
        RegistryError: no such alias.
        StorageError: no rights, no connection.
    """
    address = address_of(str(source))
    if not remote.is_address(address):
        yield Path(address)
        return
    with tempfile.TemporaryDirectory() as there:
        folder = Path(there) / "bundle"
        folder.mkdir()
        try:
            (folder / layout.INFO).write_bytes(_account(address))
            info = layout.read_info(folder)
            names = needs(info)
            for name in names:
                _fetch(remote.join(address, name), folder / name)
            if names:
                layout.verify(folder, info, names)
            yield folder
        except BundleError as error:
            raise BundleError(str(error).replace(str(folder), address)) from error


def _account(address: str) -> bytes:
    content = remote.read_if_exists(remote.join(address, layout.INFO))
    if content is None:
        raise BundleError(
            f"{address}: no {layout.INFO} there, which comes last; expected the address of a bundle whose upload has ended."
        )
    return content


def _fetch(address: str, to: Path) -> None:
    try:
        remote.download(address, to)
    except StorageError as error:
        if not isinstance(error.__cause__, FileNotFoundError):  # else it is told as a fault of the bundle
            raise
