"""The configuration tree: typed, frozen, and refused as a whole with every fault named at once.

Hydra composes conf/ into plain data; :func:`build` turns that into these classes. Nothing is coerced: a string where
a number belongs is a fault. ``conf/trainer`` is the exception in form: its keys are lightning.Trainer's own
arguments, checked against Lightning's signature where training starts.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sodaops.errors import ConfigError, nearest, some
from sodaops.text import POLICIES

FORMATS = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Label = str | int


class Section(BaseModel):
    """A part of the tree: frozen, strict in types, without unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", defer_build=True)


class FilesConfig(Section):
    """Given splits: one table each, or none."""

    train: str | None
    val: str | None
    test: str | None


class DataConfig(Section):
    """Where the labelled texts are, and how they become splits (conf/data)."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="folder under data/processed")]
    path: str | None = Field(None, description="one table: .csv, .tsv, .jsonl or .parquet")
    files: FilesConfig = Field(description="given train, val and test tables, in place of path")
    watch: str | None = Field(description="file or folder that DVC watches for changes")
    text_column: str
    label_column: str
    labels: list[Label] | None = Field(None, description="the labels in order; null: those in the data, sorted")
    label_map: dict[Label, str] | None = Field(None, description="value in the table -> label")
    vote_columns: dict[str, str] | None = Field(None, description="label -> column with its number of raters' votes")
    slice_columns: list[str] = Field([], description="columns to report metrics by")
    cleaning: Literal[*POLICIES]
    fractions: list[Fraction] = Field(description="shares of train, val, test", min_length=3, max_length=3)
    conflicts: Literal["error", "drop"] = Field(description="the same text with two labels")
    max_chars: Count = Field(description="longest text accepted, in characters")
    max_rows: Count | None = Field(description="use only the first rows of the table (for trying out); null: all")

    @property
    def sources(self) -> dict[str, str]:
        """Split -> table for given splits; ``all`` -> table where one is to be split."""
        return {"all": self.path} if self.path is not None else self.files.model_dump()


class ModelConfig(Section):
    """The pretrained encoder and its head (conf/model)."""

    name_or_path: str = Field(description="a folder, a hub name, or package:NAME for weights inside a Python package")
    revision: str | None = Field(description="commit or tag of a hub model")
    random_weights: bool = Field(description="architecture and tokenizer only, weights drawn at random (for tests)")
    overrides: dict[str, Any] | None = Field(description="changes to the encoder's own configuration")
    pooling: Literal["mean", "cls"]
    dropout: Annotated[float, Field(ge=0, lt=1)]
    max_tokens: Annotated[int, Field(ge=3)]


class OptimConfig(Section):
    """AdamW, its schedule, the batches and the loss (conf/optim)."""

    lr: Positive
    head_lr: Positive
    weight_decay: Annotated[float, Field(ge=0)]
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(description="lr factor per layer below the top")
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(description="share of the steps with rising lr")
    schedule: Literal["linear", "cosine", "constant"]
    batch_tokens: Count = Field(description="token budget of a batch, padding included")
    vote_weight: Fraction = Field(description="target = vote_weight * vote shares + (1 - vote_weight) * label")
    label_smoothing: Fraction
    class_weights: Literal["none", "balanced"]


class CheckpointConfig(Section):
    """Which epoch is kept: the one with the highest monitor, or the lowest loss."""

    monitor: Literal["val/macro_f1", "val/accuracy", "val/loss"]
    every_n_train_steps: Count | None

    @property
    def mode(self) -> str:
        """``min`` for a loss, ``max`` for the rest."""
        return "min" if self.monitor == "val/loss" else "max"


class EarlyStoppingConfig(Section):
    """When training ends before max_epochs."""

    patience: Count | None = Field(description="validations without a better monitor; null: never")


class CsvConfig(Section):
    """Metrics in a CSV file of the run folder."""


class TensorboardConfig(Section):
    """TensorBoard's event files in the run folder."""


class WandbConfig(Section):
    """Weights & Biases; offline unless WANDB_API_KEY or WANDB_MODE says otherwise."""

    project: str
    entity: str | None
    group: str | None
    name: str | None
    tags: list[str]
    mode: Literal["online", "offline"] | None
    bundle: bool = Field(description="the bundle as an artifact of the run")


class LoggerConfig(Section):
    """Where metrics go; several at once are allowed (conf/logger)."""

    csv: CsvConfig | None = None
    tensorboard: TensorboardConfig | None = None
    wandb: WandbConfig | None = None


class ExportConfig(Section):
    """Which ONNX models go into the bundle."""

    variants: list[Literal["float32", "int8"]] = Field(description="[]: none; int8 only where it passes its gate")


class EvaluateConfig(Section):
    """What is measured, on what (conf/evaluate)."""

    bundle: str | None = Field(description="bundle to evaluate; null: the one just trained")
    variant: Literal["float32", "int8"]
    split: Literal["train", "val", "test", "none"]
    splits_dir: str | None = Field(description="null: data/processed/NAME, NAME being data.name or the bundle's")
    output_dir: str | None = Field(description="null: evaluation/ beside the bundle")
    n_bootstrap: Annotated[int, Field(ge=100)]
    n_bins: Annotated[int, Field(ge=2)]
    n_worst: Annotated[int, Field(ge=0)]
    baselines: bool


class ServeConfig(Section):
    """The service (conf/serve, or environment variables)."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    variant: Literal["float32", "int8"] | None = Field(None, description="null: the bundle's own choice")
    n_workers: Count | None = Field(None, description="threads that compute; null: one a core")
    max_batch_tokens: Count = Field(256, description="tokens of one computed batch; a longer text goes alone")
    max_queue: Count = Field(256, description="texts that may wait; past it the answer is 429")
    max_texts: Count = Field(128, description="texts of one request")
    max_chars: Count = Field(20_000, description="characters of one text")
    max_body_bytes: Count = 1_048_576
    deadline_s: Positive = Field(10.0, description="past it the answer is 504")
    reload_s: Positive | None = Field(10.0, description="how often to look for a new bundle; null: only when told to")
    request_log: str | None = Field(None, description="folder or gs:// for the Parquet parts of the request log; null: none")
    journal_dir: str | None = Field(None, description="local folder for what is not in a part yet; null: request_log/journal")
    log_texts: bool = Field(False, description="true: the texts in the request log; false: their SHA-256")
    part_s: Positive = Field(300.0, description="a part is written this often")
    part_bytes: Count = Field(16_777_216, description="or when its journal has grown to this")
    max_journal_bytes: Count = Field(1_073_741_824, description="bound of the journal while parts cannot be written")
    cors_origins: list[str] = []


class SearchConfig(Section):
    """A sweep: what is tried, how it is chosen, and where it is kept (conf/search)."""

    study: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="the same name goes on with it")]
    storage: str | None = Field(description="SQLAlchemy's URL of a database; null: study.db in the sweep's folder")
    n_trials: Count = Field(description="in all, those of earlier and other processes included")
    n_seeds: Count = Field(description="runs of a trial, from seed on; its value is their mean")
    n_jobs: Count | None = Field(description="trials at once; null: as many as the launcher runs")
    grace_s: Annotated[int, Field(ge=4)] = Field(description="a trial unheard of for so long is run again")
    keep_checkpoints: bool
    sampler: dict[str, Any] = Field(description="an Optuna sampler, by _target_")
    pruner: dict[str, Any] | None = Field(description="an Optuna pruner, by _target_; null: every trial runs to its end")
    space: dict[str, Any] = Field(description="the tree's keys, each with type, low, high, log, step, or with values")


class Config(Section):
    """The whole tree."""

    seed: Annotated[int, Field(ge=0, lt=2**32)]
    run_dir: str | None = Field(description="null: the folder that Hydra makes for the run")
    ckpt_path: str | None = Field(description="checkpoint to resume from")
    data: DataConfig
    model: ModelConfig
    optim: OptimConfig
    trainer: dict[str, Any]
    checkpoint: CheckpointConfig
    early_stopping: EarlyStoppingConfig
    callbacks: dict[str, Any] = Field(description="more Lightning callbacks, each with its _target_")
    logger: LoggerConfig
    export: ExportConfig
    evaluate: EvaluateConfig
    serve: ServeConfig
    search: SearchConfig | None = None

    @property
    def splits_dir(self) -> Path:
        """Where the splits of this data set are, or will be."""
        return Path(self.evaluate.splits_dir or Path("data/processed") / self.data.name)


def build(tree: Mapping[str, Any]) -> Config:
    """Checks a composed tree and returns it typed.

    Args:
        tree: plain dictionaries, lists and scalars, as ``OmegaConf.to_container`` gives them.

    Raises:
        ConfigError: unknown keys, wrong types and values, and contradictions between keys, all at once.
    """
    try:
        config = Config.model_validate(dict(tree))
    except ValidationError as error:
        raise _refuse([_fault(detail) for detail in error.errors()]) from None
    faults = list(_contradictions(config))
    if faults:
        raise _refuse(faults)
    return config


def _refuse(faults: Sequence[str]) -> ConfigError:
    lead = "" if len(faults) == 1 else f"{len(faults)} faults in the configuration:\n- "
    return ConfigError(lead + "\n- ".join(faults))


def _fault(detail: Mapping[str, Any]) -> str:
    loc = [part for part in detail["loc"] if not (isinstance(part, str) and part in ("str", "int"))]
    key, value = ".".join(map(str, loc)), detail["input"]
    if detail["type"] == "extra_forbidden":
        section = field_names(loc[:-1])
        return f"{key} is not a key{nearest(loc[-1], section)}; {'.'.join(loc[:-1]) or 'the top level'} has: " + (
            some(section, shown=40) + "."
        )
    if detail["type"] == "missing":
        return f"{key} is missing; give it as {key}=VALUE."
    message = detail["msg"].replace("Input should be ", "expected ")
    hint = nearest(value, re.findall(r"'([^']+)'", message))
    return f"{key}={value!r}: {message[0].lower()}{message[1:]}{hint}."


def field_names(loc: Sequence[str | int]) -> list[str]:
    """The keys that a section of the tree has, given the way to it; empty for a free-form section.

    >>> field_names(["data", "files"])
    ['train', 'val', 'test']
    """
    section: Any = Config
    for part in loc:
        if part not in section.model_fields:
            return []
        annotation = section.model_fields[part].annotation
        kinds = [annotation, *get_args(annotation)]
        section = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        if section is None:
            return []
    return list(section.model_fields)


def _contradictions(config: Config):
    data = config.data
    files = data.files.model_dump()
    given = [path is not None for path in files.values()]
    if (data.path is None and not all(given)) or (data.path is not None and any(given)):
        yield "data.path and data.files: give one of them (data.path=FILE, or data.files.train=, .val= and .test=)."
    for key, path in {"data.path": data.path, **{f"data.files.{split}": path for split, path in files.items()}}.items():
        if path is not None and table_format(path) is None:
            yield f"{key}={path!r}: expected a name that ends in {', '.join(FORMATS)} (or .gz after it)."
    if abs(sum(data.fractions) - 1) > 1e-9:
        yield f"data.fractions={data.fractions}: they sum to {sum(data.fractions):g}; expected 1."
    if data.labels is not None:
        names = [str(label) for label in data.labels]
        if len(set(names)) < max(2, len(names)):
            yield f"data.labels={data.labels}: expected at least two labels, each once."
        for value, label in (data.label_map or {}).items():
            if label not in names:
                yield f"data.label_map.{value}={label!r}: expected one of {', '.join(names)}{nearest(label, names)}."
        if data.vote_columns is not None and sorted(data.vote_columns) != sorted(names):
            yield f"data.vote_columns has {', '.join(data.vote_columns)}; expected a column for each of {', '.join(names)}."
    elif data.vote_columns is not None:
        yield "data.vote_columns needs data.labels."
    if "int8" in config.export.variants and "float32" not in config.export.variants:
        yield f"export.variants={config.export.variants}: int8 is measured against float32; name both."
    if not config.export.variants and config.evaluate.split != "none" and config.evaluate.bundle is None:
        yield "export.variants=[]: evaluation answers with the ONNX model; set evaluate.split=none too."
    if config.optim.batch_tokens < config.model.max_tokens:
        yield (
            f"optim.batch_tokens={config.optim.batch_tokens} is under model.max_tokens={config.model.max_tokens}; "
            "a batch must hold the longest text."
        )
    for name, callback in config.callbacks.items():
        if not isinstance(callback, Mapping) or "_target_" not in callback:
            yield f"callbacks.{name} has no _target_; expected the class to make, as callbacks.{name}._target_=PACKAGE.CLASS."


def table_format(path: str) -> str | None:
    """The format that a table's name tells, or None.

    >>> table_format("reviews.TSV.gz")
    'tsv'
    """
    name = path.lower().removesuffix(".gz")
    return next((kind for ending, kind in FORMATS.items() if name.endswith(ending)), None)
