"""The bundle: one folder with all that it takes to answer a request, and a hash of every file in it.

```
bundle.json          what it is: labels, cleaning, token limit, pooling, where it came from, hashes of the rest
model.safetensors    weights of encoder and head
model.onnx           the same as an ONNX graph, float32; what answers
model.int8.onnx      the same with 8-bit matrix products, where it passed its gate
encoder.json         the encoder's architecture
tokenizer.json
drift.npz            what requests are held against: numbers about train and val, no text
config.yaml          the training run's configuration, resolved
data_manifest.json   what it was trained on
```
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from sodaops.errors import BundleError, ConfigError, some
from sodaops.io import storage

INFO = "bundle.json"
WEIGHTS = "model.safetensors"
ENCODER = "encoder.json"
TOKENIZER = "tokenizer.json"
CONFIG = "config.yaml"
DATA = "data_manifest.json"
FILES = (WEIGHTS, ENCODER, TOKENIZER, CONFIG, DATA)
ONNX = {"float32": "model.onnx", "int8": "model.int8.onnx"}
DRIFT = "drift.npz"
NAMES = (*FILES, *ONNX.values(), DRIFT, INFO)  # all that a bundle's folder may hold
FORMAT = 1


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class BundleInfo:
    """What bundle.json holds."""

    labels: list[str]
    cleaning: str
    max_tokens: int
    pooling: str
    pad_token_id: int
    metrics: dict[str, dict[str, float]]  # split -> metric -> value
    data: dict[str, Any]  # name and fingerprint of the splits
    created: str  # UTC, ISO 8601
    git_commit: str | None
    versions: dict[str, str]
    files: dict[str, str]  # name -> SHA-256
    bundle_id: str  # hash of the hashes and of what shapes an answer
    onnx: dict[str, dict[str, Any]] = Field(default_factory=dict)  # variant -> opset and what its gate measured
    format: int = FORMAT

    @property
    def default_variant(self) -> str | None:
        """The variant that answers unless another is asked for: int8 where it passed its gate; None before an export."""
        return next((variant for variant in ("int8", "float32") if variant in self.onnx), None)


def compute_bundle_id(files: dict[str, str], **answers: Any) -> str:
    """Twelve hexadecimal digits that change when a file or anything that shapes an answer does."""
    return storage.sha256_of_json({"files": files, **answers})[:12]


def write_info(folder: Path, **fields: Any) -> BundleInfo:
    """Hashes the files of a folder that is being filled, and writes its bundle.json."""
    names = [*FILES, *(ONNX[variant] for variant in fields.get("onnx", {})), *([DRIFT] if (folder / DRIFT).exists() else [])]
    files = {name: storage.sha256_of(folder / name) for name in names}
    info = BundleInfo(files=files, bundle_id=compute_bundle_id(files, **_answers(fields)), **fields)
    (folder / INFO).write_text(json.dumps(asdict(info), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return info


def read_info(path: str | Path) -> BundleInfo:
    """Reads bundle.json; what it names is checked by :func:`verify` or :func:`read_file`.

    Raises:
        BundleError: no bundle, a newer format, or a bundle.json that does not agree with itself.
    """
    path = Path(path)
    try:
        fields = json.loads((path / INFO).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(f"{path}: no {INFO} here; expected a folder that training wrote (RUN/bundle).") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"{path / INFO}: damaged ({error}); copy the bundle anew or train again.") from None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        found = fields.get("format") if isinstance(fields, dict) else None
        raise BundleError(f"{path / INFO}: format={found!r}; this version reads {FORMAT}. Install the version that wrote it.")
    try:
        info = BundleInfo(**fields)
    except ValidationError as error:
        found = some([f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors()])
        raise BundleError(f"{path / INFO}: incomplete ({found}); copy the bundle anew or train again.") from None
    known = {*NAMES} - {INFO}
    faults = [f"{name!r} is no file of a bundle" for name in sorted(info.files) if name not in known]
    faults += [f"{name} is not among the files of {INFO}" for name in FILES if name not in info.files]
    faults += [f"onnx.{variant} has no file" for variant in info.onnx if ONNX.get(variant) not in info.files]
    if compute_bundle_id(info.files, **_answers(vars(info))) != info.bundle_id:
        faults.insert(0, f"{INFO} has been changed")
    _refuse(path, faults)
    return info


def verify(path: str | Path, info: BundleInfo, names: Iterable[str] | None = None) -> None:
    """Checks files against their hashes; None: all of them.

    Raises:
        BundleError: missing or changed files.
    """
    _refuse(
        Path(path), [fault for name in sorted(names or info.files) for fault in _faults(Path(path) / name, info.files[name])]
    )


def read_file(path: str | Path, info: BundleInfo, name: str) -> bytes:
    """The content of one file, checked: what is returned is what was hashed.

    Raises:
        BundleError: it is missing or changed.
    """
    try:
        content = (Path(path) / name).read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        content = None
    if content is None or hashlib.sha256(content).hexdigest() != info.files[name]:
        _refuse(Path(path), [f"{name} {'is missing' if content is None else 'has been changed'}"])
    return content


def _answers(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: fields[key] for key in ("labels", "cleaning", "max_tokens", "pooling", "pad_token_id")}


def check_splits(info: BundleInfo, manifest: Mapping[str, Any], splits_dir: Path) -> None:
    """Refuses splits that the bundle cannot be measured on.

    Raises:
        ConfigError: they have other labels or another cleaning.
    """
    for key, mine in (("labels", info.labels), ("cleaning", info.cleaning)):
        if manifest[key] != mine:
            raise ConfigError(
                f"{splits_dir}: {key}={manifest[key]}; the bundle has {mine}. Choose the splits that fit with "
                "evaluate.splits_dir=FOLDER, or preprocess with the bundle's."
            )


def _faults(file: Path, expected: str) -> list[str]:
    if not file.is_file():
        return [f"{file.name} is missing"]
    return [] if storage.sha256_of(file) == expected else [f"{file.name} has been changed"]


def _refuse(path: Path, faults: list[str]) -> None:
    if faults:
        raise BundleError(f"{path}: damaged bundle: {some(faults)}. Copy it anew or train again.")


def read_config(path: str | Path) -> dict[str, Any]:
    """The configuration that the bundle was trained with, for people; nothing that answers reads it."""
    import yaml  # a twentieth of the service's start, which has no use for it

    return yaml.safe_load((Path(path) / CONFIG).read_text(encoding="utf-8"))
