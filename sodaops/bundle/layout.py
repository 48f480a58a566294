"""The bundle: one folder with all that it takes to answer a request, and a hash of every file in it.

```
bundle.json          what it is: labels, cleaning, token limit, pooling, where it came from, hashes of the rest
model.safetensors    weights of encoder and head
encoder.json         the encoder's architecture
tokenizer.json
config.yaml          the training run's configuration, resolved
data_manifest.json   what it was trained on
```
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from sodaops import storage
from sodaops.errors import BundleError, some

INFO = "bundle.json"
WEIGHTS = "model.safetensors"
ENCODER = "encoder.json"
TOKENIZER = "tokenizer.json"
CONFIG = "config.yaml"
DATA = "data_manifest.json"
FILES = (WEIGHTS, ENCODER, TOKENIZER, CONFIG, DATA)
FORMAT = 1


@dataclass(frozen=True)
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
    format: int = FORMAT


def bundle_id(files: dict[str, str], **answers: Any) -> str:
    """Twelve hexadecimal digits that change when a file or anything that shapes an answer does."""
    return storage.sha256_of_json({"files": files, **answers})[:12]


def write_info(folder: Path, **fields: Any) -> BundleInfo:
    """Hashes the files of a folder that is being filled, and writes its bundle.json."""
    files = {name: storage.sha256_of(folder / name) for name in FILES}
    info = BundleInfo(files=files, bundle_id=bundle_id(files, **_answers(fields)), **fields)
    (folder / INFO).write_text(json.dumps(asdict(info), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return info


def read_info(path: str | Path) -> BundleInfo:
    """Reads bundle.json and checks every file against its hash.

    Raises:
        BundleError: no bundle, a newer format, missing or changed files.
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
    except TypeError as error:
        raise BundleError(f"{path / INFO}: incomplete ({error}); copy the bundle anew or train again.") from None
    _verify(path, info)
    return info


def _answers(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: fields[key] for key in ("labels", "cleaning", "max_tokens", "pooling", "pad_token_id")}


def _verify(path: Path, info: BundleInfo) -> None:
    faults = []
    if not isinstance(info.files, dict) or not isinstance(info.labels, list) or not isinstance(info.data, dict):
        raise BundleError(f"{path / INFO}: incomplete (files, labels or data); copy the bundle anew or train again.")
    if bundle_id(info.files, **_answers(vars(info))) != info.bundle_id:
        faults.append(f"{INFO} has been changed")
    for name in sorted({*FILES, *info.files}):
        if Path(name).name != name or name not in info.files:
            faults.append(f"{name} is not among the files of {INFO}" if name in FILES else f"{name!r} is not a plain name")
        elif not (path / name).is_file():
            faults.append(f"{name} is missing")
        elif storage.sha256_of(path / name) != info.files[name]:
            faults.append(f"{name} has been changed")
    if faults:
        raise BundleError(f"{path}: damaged bundle: {some(faults)}. Copy it anew or train again.")


def read_config(path: str | Path) -> dict[str, Any]:
    """The configuration that the bundle was trained with, for people; nothing that answers reads it."""
    return yaml.safe_load((Path(path) / CONFIG).read_text(encoding="utf-8"))
