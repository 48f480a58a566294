"""The bundle: one folder with everything that is needed to answer a request, and a hash of every file in it.

```
bundle.json            labels, cleaning, token limit, pooling, origin, and the hashes of the other files
config.json            the encoder's architecture, and the class of the head
model.safetensors      the encoder's weights
head.safetensors       the head's weights
model.onnx             the model as an ONNX graph, float32
model.int8.onnx        the same with 8-bit matrix products, if it passed its check
tokenizer.json
tokenizer_config.json
drift.npz              the drift reference: numbers about train and val, no text
config.yaml            the training run's resolved configuration
data_manifest.json     the manifest of the splits that it was trained on
```

transformers' AutoModel and AutoTokenizer read the encoder and the tokenizer from it. Format 1 had encoder.json in place of
config.json, all weights in model.safetensors, and no tokenizer_config.json.

No file is read that bundle.json does not hash. What is parsed is what was hashed: a file is read once.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass
from typing_extensions import TypedDict

from sodaops.bundle.files import FIX, open_regular, parse_json, parsing, printable
from sodaops.config.sections import Cleaning, TextColumn
from sodaops.errors import BundleError, ConfigError, some
from sodaops.io import storage
from sodaops.tasks.abstention import Abstention
from sodaops.tasks.base import Task
from sodaops.tasks.make import GROUP, VARIABLE, is_allowed, make_task
from sodaops.text.columns import names_of
from sodaops.text.limit import Limit

INFO = "bundle.json"
WEIGHTS = "model.safetensors"
HEAD = "head.safetensors"
ENCODER = "config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_SETTINGS = "tokenizer_config.json"
CONFIG = "config.yaml"
DATA = "data_manifest.json"
OLDER_ENCODER = "encoder.json"
FORMAT = 2
FILES_OF = {  # format -> the files that every bundle has besides bundle.json
    1: (WEIGHTS, OLDER_ENCODER, TOKENIZER, CONFIG, DATA),
    2: (WEIGHTS, HEAD, ENCODER, TOKENIZER, TOKENIZER_SETTINGS, CONFIG, DATA),
}
ONNX = {"float32": "model.onnx", "int8": "model.int8.onnx"}
DRIFT = "drift.npz"
NAMES = (*FILES_OF[FORMAT], OLDER_ENCODER, *ONNX.values(), DRIFT, INFO)  # the only files that a bundle may hold
CARD = "card.md"  # for people; a registry writes it beside a bundle's files
_LATER_FIELDS = ("task", "stride", "max_windows", "abstention")  # without a value not written, as earlier versions expect
_MIB = 2**20
_MAX_BYTES = {  # a graph in one file has at most 2 GiB
    WEIGHTS: 2**36, **dict.fromkeys((HEAD, *ONNX.values()), 2**31), TOKENIZER: 256 * _MIB, DRIFT: 256 * _MIB,
    DATA: 64 * _MIB, **dict.fromkeys((INFO, ENCODER, OLDER_ENCODER), 16 * _MIB), TOKENIZER_SETTINGS: _MIB, CONFIG: _MIB,
}  # fmt: skip


def _distinct(labels: list[str]) -> list[str]:
    if repeated := [label for label, n in Counter(labels).items() if n > 1]:
        raise ValueError(f"repeated: {some(repeated)}")
    return labels


_Number = Annotated[float, Field(allow_inf_nan=False)]
_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Label = Annotated[str, Field(min_length=1)]


class _Data(TypedDict):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    fingerprint: str
    text_column: NotRequired[TextColumn]
    slice_columns: NotRequired[list[str]]


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class BundleInfo:
    """The content of bundle.json."""

    labels: Annotated[list[_Label], Field(min_length=1), AfterValidator(_distinct)]
    cleaning: Cleaning
    max_tokens: Annotated[int, Field(ge=3, le=2**20)]
    pooling: Literal["mean", "cls"]
    pad_token_id: Annotated[int, Field(ge=0, lt=2**31)]
    metrics: dict[str, dict[str, _Number]]  # split -> metric -> value
    data: _Data  # of the splits
    created: str  # UTC, ISO 8601
    git_commit: str | None
    versions: dict[str, str]  # of packages; for a user's cleaning the hash of its code
    files: dict[str, _Hash]  # name -> SHA-256
    bundle_id: str  # hash of these hashes and of the fields that change a prediction
    onnx: dict[str, dict[str, int | _Number]] = Field(default_factory=dict)  # variant -> opset, and measured by its check
    task: dict[str, Any] = Field(default_factory=dict)  # its section and parameters; none: one label per text
    format: int = FORMAT
    stride: Annotated[int, Field(ge=0, lt=2**20)] = 0  # as in Limit; older bundles lack it and the next
    max_windows: Annotated[int, Field(ge=1, le=2**20)] | None = None
    abstention: Abstention | None = None  # thresholds and cutoffs, if evaluate.target_accuracy or the like were set

    @property
    def limit(self) -> Limit:
        """How much of a text is read."""
        return Limit(self.max_tokens, self.stride, self.max_windows)

    @property
    def text_columns(self) -> list[str]:
        """The columns with the parts of a text; mostly one. Older bundles do not name it."""
        return names_of(self.data.get("text_column", "text"))

    @property
    def slice_columns(self) -> list[str]:
        """The columns of ``data.slice_columns``, which requests may give values for. Older bundles have none."""
        return self.data.get("slice_columns", [])

    @property
    def default_variant(self) -> str | None:
        """The variant that is used unless another is named: int8 if it passed its check; None before an export."""
        return next((variant for variant in ("int8", "float32") if variant in self.onnx), None)


def compute_bundle_id(files: dict[str, str], **settings: Any) -> str:
    """Twelve hexadecimal digits that change with any file (name -> SHA-256) or setting that changes a prediction."""
    return storage.sha256_of_json({"files": files, **settings})[:12]


def write_info(folder: Path, **fields: Any) -> BundleInfo:
    """Hashes the files of a folder and writes its bundle.json; ``fields`` are :class:`BundleInfo`'s other fields."""
    names = [*FILES_OF[fields.get("format", FORMAT)]]
    names += [*(ONNX[variant] for variant in fields.get("onnx", {})), *([DRIFT] if (folder / DRIFT).exists() else [])]
    files = {name: storage.sha256_of(folder / name) for name in names}
    info = BundleInfo(files=files, bundle_id=compute_bundle_id(files, **_settings(fields)), **fields)
    written = {name: value for name, value in asdict(info).items() if value or name not in _LATER_FIELDS}
    (folder / INFO).write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return info


def read_info(path: str | Path) -> BundleInfo:
    """Reads bundle.json; the files that it names are checked by :func:`verify` or :func:`read_file`.

    Raises:
        BundleError: no bundle, another format, a bundle.json that is incomplete or inconsistent, or other files beside it.
    """
    path = Path(path)
    try:
        with _open(path / INFO) as file, parsing(path / INFO):
            fields = parse_json(file.read(_MAX_BYTES[INFO]))
    except FileNotFoundError:
        raise BundleError(f"{path}: no {INFO}; expected a folder that training wrote (RUN/bundle).") from None
    if fields.get("format") not in [*FILES_OF]:
        written = printable(repr(fields.get("format")))
        raise BundleError(
            f"{path / INFO}: format={written}; this version reads {some([*FILES_OF])}. Install the version that wrote it."
        )
    try:
        info = BundleInfo(**fields)
    except ValidationError as error:
        faults = [printable(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}") for fault in error.errors()]
        raise BundleError(f"{path / INFO}: invalid ({some(faults)}); {FIX}") from None
    _refuse(path, [*_inconsistencies(info), *_foreign_files(path, info)])
    return info


def _inconsistencies(info: BundleInfo) -> list[str]:
    known = {*NAMES} - {INFO}
    faults = [f"{printable(repr(name))} is not a bundle's file" for name in sorted(info.files) if name not in known]
    faults += [f"{name} is missing in the files of {INFO}" for name in FILES_OF[info.format] if name not in info.files]
    faults += [f"onnx.{printable(variant)} has no file" for variant in info.onnx if ONNX.get(variant) not in info.files]
    if info.abstention is not None:
        variants = info.abstention["variants"]
        labels = [[*of] for levels in variants.values() for of in (levels["thresholds"], levels["cutoffs"]) if of]
        models = {variant: info.files.get(ONNX.get(variant, "")) for variant in info.onnx}
        if models != {variant: levels["model"] for variant, levels in variants.items()} or any(
            of != info.labels for of in labels
        ):
            faults.append("abstention was chosen for the answers of another bundle; `sodaops export` chooses it again")
    if compute_bundle_id(info.files, **_settings(vars(info))) != info.bundle_id:
        faults.insert(0, f"{INFO} has been changed")
    return faults


def _foreign_files(path: Path, info: BundleInfo) -> list[str]:
    """The faults of a folder that holds anything but regular files that bundle.json names."""
    faults = []
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name not in {*info.files, INFO, CARD}:
                faults.append(f"{printable(repr(entry.name))} is not in the files of {INFO}")
            elif not entry.is_file(follow_symlinks=False):
                faults.append(f"{entry.name} is not a regular file")
    return sorted(faults)


def task_of(path: str | Path, info: BundleInfo) -> Task:
    """The task of a bundle.

    Raises:
        BundleError: it is a class that bundles may not name here, it cannot be made, or it is for other labels.
    """
    target = str(info.task.get("_target_", ""))
    if info.task and not is_allowed(target):
        raise BundleError(
            f"{path}: its task is {printable(target)}, which bundles may not name here. If you trust it, set "
            f"{VARIABLE}={printable(target)}, or install a package with this entry point in the group {GROUP}."
        )
    try:
        task = make_task(info.task)
        task.check_labels(info.labels)
        return task
    except ConfigError as error:
        raise BundleError(f"{path}: {printable(str(error))}") from error


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
    try:
        with _open(Path(path) / name) as file:
            content = file.read(os.fstat(file.fileno()).st_size)
    except FileNotFoundError:
        _refuse(Path(path), [f"{name} is missing"])
    if hashlib.sha256(content).hexdigest() != info.files[name]:
        _refuse(Path(path), [f"{name} has been changed"])
    return content


def read_json(path: str | Path, info: BundleInfo, name: str) -> dict[str, Any]:
    """The object in one of the JSON files.

    Raises:
        BundleError: the file is missing, changed, or not such an object.
    """
    with parsing(Path(path) / name):
        return parse_json(read_file(path, info, name))


def read_config(path: str | Path, info: BundleInfo) -> dict[str, Any]:
    """The configuration that the bundle was trained with, for reports; serving does not read it.

    Raises:
        BundleError: the file is missing, changed, or not a mapping.
    """
    import yaml  # only here, since it takes 5 % of the service's start

    with parsing(Path(path) / CONFIG):
        config = yaml.safe_load(read_file(path, info, CONFIG).decode())
        if not isinstance(config, dict):
            raise ValueError("expected a mapping")
        return config


def _settings(fields: dict[str, Any]) -> dict[str, Any]:
    settings = {key: fields[key] for key in ("labels", "cleaning", "max_tokens", "pooling", "pad_token_id")}
    if fields.get("max_windows") is not None:
        settings |= {"stride": fields.get("stride", 0), "max_windows": fields["max_windows"]}
    settings |= {name: fields[name] for name in ("task", "abstention") if fields.get(name)}
    columns = fields["data"].get("text_column")
    return settings | ({"text_column": columns} if isinstance(columns, list) else {})  # then texts are tokenised in parts


def check_splits(info: BundleInfo, manifest: Mapping[str, Any], splits_dir: Path) -> None:
    """Refuses splits that the bundle cannot be measured on.

    Raises:
        ConfigError: they have another task, other labels, another cleaning, or texts of more or fewer columns.
    """
    n_columns = len(manifest.get("text_columns", ["text"]))
    tasks = (section.get("_target_", "one label per text") for section in (manifest.get("task", {}), info.task))
    for key, of_splits, of_bundle in (
        ("task", *tasks),
        ("labels", manifest["labels"], info.labels),
        ("cleaning", manifest["cleaning"], info.cleaning),
        ("number of text columns", n_columns, len(info.text_columns)),
    ):
        if of_splits != of_bundle:
            raise ConfigError(
                f"{splits_dir}: {key}={of_splits}; the bundle has {of_bundle}. Name matching splits with "
                f"evaluate.splits_dir=FOLDER, or preprocess again with the bundle's {key}."
            )


def _open(file: Path) -> BufferedReader:
    return open_regular(file, _MAX_BYTES[file.name])


def _faults(file: Path, expected: str) -> list[str]:
    try:
        with _open(file) as content:
            actual = hashlib.file_digest(content, "sha256").hexdigest()
    except FileNotFoundError:
        return [f"{file.name} is missing"]
    return [] if actual == expected else [f"{file.name} has been changed"]


def _refuse(path: Path, faults: list[str]) -> None:
    if faults:
        raise BundleError(f"{path}: damaged bundle: {some(faults)}. Copy it again or train again.")
