"""The bundle: one folder with everything that is needed to answer a request, and a hash of every file in it.

```
bundle.json          labels, cleaning, token limit, pooling, origin, and the hashes of the other files
model.safetensors    weights of encoder and head
model.onnx           the model as an ONNX graph, float32
model.int8.onnx      the same with 8-bit matrix products, if it passed its check
encoder.json         the encoder's architecture
tokenizer.json
drift.npz            the drift reference: numbers about train and val, no text
config.yaml          the training run's resolved configuration
data_manifest.json   the manifest of the splits that it was trained on
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
NAMES = (*FILES, *ONNX.values(), DRIFT, INFO)  # the only files that a bundle may hold
FORMAT = 1


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class BundleInfo:
    """The content of bundle.json."""

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
    bundle_id: str  # hash of these hashes and of the fields that change a prediction
    onnx: dict[str, dict[str, Any]] = Field(default_factory=dict)  # variant -> opset and the measurements of its check
    format: int = FORMAT

    @property
    def default_variant(self) -> str | None:
        """The variant that is used unless another is named: int8 if it passed its check; None before an export."""
        return next((variant for variant in ("int8", "float32") if variant in self.onnx), None)


def compute_bundle_id(files: dict[str, str], **settings: Any) -> str:
    """Twelve hexadecimal digits that change with any file (name -> SHA-256) or setting that changes a prediction."""
    return storage.sha256_of_json({"files": files, **settings})[:12]


def write_info(folder: Path, **fields: Any) -> BundleInfo:
    """Hashes the files of a folder and writes its bundle.json; ``fields`` are :class:`BundleInfo`'s other fields."""
    names = [*FILES, *(ONNX[variant] for variant in fields.get("onnx", {})), *([DRIFT] if (folder / DRIFT).exists() else [])]
    files = {name: storage.sha256_of(folder / name) for name in names}
    info = BundleInfo(files=files, bundle_id=compute_bundle_id(files, **_settings(fields)), **fields)
    (folder / INFO).write_text(json.dumps(asdict(info), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return info


def read_info(path: str | Path) -> BundleInfo:
    """Reads bundle.json; the files that it names are checked by :func:`verify` or :func:`read_file`.

    Raises:
        BundleError: no bundle, another format, or a bundle.json that is incomplete or inconsistent.
    """
    path = Path(path)
    try:
        fields = json.loads((path / INFO).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(f"{path}: no {INFO}; expected a folder that training wrote (RUN/bundle).") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"{path / INFO}: damaged ({error}); copy the bundle again or train again.") from None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        written = fields.get("format") if isinstance(fields, dict) else None
        raise BundleError(f"{path / INFO}: format={written!r}; this version reads {FORMAT}. Install the version that wrote it.")
    try:
        info = BundleInfo(**fields)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors()]
        raise BundleError(f"{path / INFO}: invalid ({some(faults)}); copy the bundle again or train again.") from None
    known = {*NAMES} - {INFO}
    faults = [f"{name!r} is not a bundle's file" for name in sorted(info.files) if name not in known]
    faults += [f"{name} is missing in the files of {INFO}" for name in FILES if name not in info.files]
    faults += [f"onnx.{variant} has no file" for variant in info.onnx if ONNX.get(variant) not in info.files]
    if compute_bundle_id(info.files, **_settings(vars(info))) != info.bundle_id:
        faults.insert(0, f"{INFO} has been changed")
    _refuse(path, faults)
    return info


def verify(path: str | Path, info: BundleInfo, names: Iterable[str] | None = None) -> None:
    """Checks files, by default all of them, against their hashes.

    Raises:
        BundleError: missing or changed files.
    """
    path = Path(path)
    _refuse(path, [fault for name in sorted(names or info.files) for fault in _faults(path / name, info.files[name])])


def read_file(path: str | Path, info: BundleInfo, name: str) -> bytes:
    """The content of one file, which is the content that was hashed.

    Raises:
        BundleError: it is missing or changed.
    """
    file = Path(path) / name
    content = file.read_bytes() if file.is_file() else None
    if content is None or hashlib.sha256(content).hexdigest() != info.files[name]:
        _refuse(Path(path), [f"{name} {'is missing' if content is None else 'has been changed'}"])
    return content


def _settings(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: fields[key] for key in ("labels", "cleaning", "max_tokens", "pooling", "pad_token_id")}


def check_splits(info: BundleInfo, manifest: Mapping[str, Any], splits_dir: Path) -> None:
    """Refuses splits that the bundle cannot be measured on.

    Raises:
        ConfigError: they have other labels or another cleaning.
    """
    for key, of_bundle in (("labels", info.labels), ("cleaning", info.cleaning)):
        if manifest[key] != of_bundle:
            raise ConfigError(
                f"{splits_dir}: {key}={manifest[key]}; the bundle has {of_bundle}. Name matching splits with "
                f"evaluate.splits_dir=FOLDER, or preprocess again with the bundle's {key}."
            )


def _faults(file: Path, expected: str) -> list[str]:
    if not file.is_file():
        return [f"{file.name} is missing"]
    return [] if storage.sha256_of(file) == expected else [f"{file.name} has been changed"]


def _refuse(path: Path, faults: list[str]) -> None:
    if faults:
        raise BundleError(f"{path}: damaged bundle: {some(faults)}. Copy it again or train again.")


def read_config(path: str | Path) -> dict[str, Any]:
    """The configuration that the bundle was trained with, for reports; serving does not read it."""
    import yaml  # only here, since it takes 5 % of the service's start

    return yaml.safe_load((Path(path) / CONFIG).read_text(encoding="utf-8"))
