"""The configuration tree: typed and frozen.

Hydra composes conf/ into plain data; :mod:`sodaops.config.validation` turns that into these classes. Nothing is coerced:
a string where a number belongs is a fault. ``conf/trainer`` is the exception in form: its keys are lightning.Trainer's own
arguments, checked against Lightning's signature where training starts.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from sodaops.config.alerts import AlertsConfig
from sodaops.config.sections import Count, Fraction, LocalPath, Positive, Section
from sodaops.text.cleaning import POLICIES
from sodaops.text.redaction import KINDS

FORMATS = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
Label = str | int
Kind = Literal[*KINDS]  # type: ignore[valid-type]
Days = Annotated[int, Field(ge=1, le=36_500)]


class FilesConfig(Section):
    """Given splits: one table each, or none."""

    train: str | None
    val: str | None
    test: str | None


class DataConfig(Section):
    """Where the labelled texts are, and how they become splits (conf/data)."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="folder under data/processed")]
    path: str | None = Field(None, description="one table, here or at gs://: .csv, .tsv, .jsonl or .parquet")
    files: FilesConfig = Field(description="given train, val and test tables, in place of path")
    watch: str | None = Field(description="file or folder that DVC watches for changes")
    added: LocalPath | None = Field(
        None, description="folder with more tables, whose rows never go to test; it need not be there"
    )
    text_column: str = Field(description="column with the texts")
    label_column: str = Field(description="column with the labels")
    labels: list[Label] | None = Field(None, description="the labels in order; null: those in the data, sorted")
    label_map: dict[Label, str] | None = Field(None, description="value in the table -> label")
    vote_columns: dict[str, str] | None = Field(None, description="label -> column with its number of raters' votes")
    slice_columns: list[str] = Field([], description="columns to report metrics by")
    cleaning: Literal[*POLICIES]  # type: ignore[valid-type]  # one list of names, not two
    fractions: list[Fraction] = Field(description="shares of train, val, test", min_length=3, max_length=3)
    conflicts: Literal["error", "drop"] = Field(description="the same text with two labels")
    max_chars: Count = Field(description="longest text accepted, in characters")
    max_rows: Count | None = Field(description="use only the first rows of the table (for trying out); null: all")
    ray: str | None = Field(None, description="Ray cluster that cleans the table: local, auto or HOST:PORT; null: none")

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
    max_tokens: Annotated[int, Field(ge=3)] = Field(description="longer texts are cut")


class OptimConfig(Section):
    """AdamW, its schedule, the batches and the loss (conf/optim)."""

    lr: Positive
    head_lr: Positive = Field(description="of the classification head")
    weight_decay: Annotated[float, Field(ge=0)]
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(description="lr factor per layer below the top")
    frozen_layers: Annotated[int, Field(ge=0)] | None = Field(
        description="layers from below that are not trained, the embeddings with them; null: all are trained"
    )
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(description="share of the steps with rising lr")
    schedule: Literal["linear", "cosine", "constant"]
    batch_tokens: Count = Field(description="token budget of a batch, padding included")
    vote_weight: Fraction = Field(description="target = vote_weight * vote shares + (1 - vote_weight) * label")
    label_smoothing: Fraction = Field(description="share of the target that is spread over all labels")
    class_weights: Literal["none", "balanced"] = Field(description="balanced: a rare label's rows count more")


class CheckpointConfig(Section):
    """Which epoch is kept: the one with the highest monitor, or the lowest loss."""

    monitor: Literal["val/macro_f1", "val/accuracy", "val/loss"]
    every_n_train_steps: Count | None
    restarts: int = Field(ge=0)

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

    bundle: str | None = Field(description="folder, gs:// or REGISTRY@ALIAS; null: the one just trained")
    variant: Literal["float32", "int8"]
    split: Literal["train", "val", "test", "none"]
    splits_dir: LocalPath | None = Field(description="null: data/processed/NAME, NAME being data.name or the bundle's")
    output_dir: str | None = Field(description="folder or gs://; null: evaluation/ beside the bundle")
    n_bootstrap: Annotated[int, Field(ge=100)] = Field(description="draws behind the intervals")
    n_bins: Annotated[int, Field(ge=2)] = Field(description="of the reliability diagram and the calibration error")
    n_worst: Annotated[int, Field(ge=0)] = Field(description="errors that the report shows, the surest first")
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
    max_body_bytes: Count = Field(1_048_576, description="of a request; past it the answer is 413")
    deadline_s: Positive = Field(10.0, description="past it the answer is 504")
    reload_s: Positive | None = Field(10.0, description="how often to look for a new bundle; null: only when told to")
    request_log: str | None = Field(None, description="folder or gs:// for the Parquet parts of the request log; null: none")
    journal_dir: LocalPath | None = Field(
        None, description="local folder for what is not in a part yet; null: request_log/journal"
    )
    log_texts: bool = Field(False, description="true: the texts in the request log; false: their SHA-256")
    redact: list[Kind] = Field(["email", "phone"], description="taken out of texts before they are logged")
    keep_days: Days | None = Field(None, description="parts of the request log older than this are deleted; null: never")
    feedback_store: LocalPath | None = Field(
        None, description="annotation store that POST /feedback writes to; null: no feedback"
    )
    part_s: Annotated[float, Field(gt=0, le=86_400)] = Field(300.0, description="a part is written this often")
    part_bytes: Count = Field(16_777_216, description="or when its journal has grown to this")
    max_journal_bytes: Count = Field(1_073_741_824, description="bound of the journal while parts cannot be written")
    cors_origins: list[str] = Field([], description="pages elsewhere that may call this one from a browser")


class SharesConfig(Section):
    """Parts of what is picked; they sum to 1."""

    uncertain: Fraction = Field(0.3, description="the model was least sure")
    drifted: Fraction = Field(0.3, description="most unlike the reference")
    diverse: Fraction = Field(0.2, description="most unlike each other")
    random: Fraction = Field(0.2, description="by chance, for an honest estimate")


class AnnotateConfig(Section):
    """Texts to annotate, and the page on which people label them (conf/annotate)."""

    store: LocalPath = Field("data/annotation", description="folder with the tasks and the answers")
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8001
    n: Count = Field(100, description="texts that one pick adds")
    shares: SharesConfig = SharesConfig()
    min_annotators: Count = Field(1, description="answers that a text needs before it is merged")
    near_test: Fraction = Field(0.7, description="similarity to a test text from which on a text is refused")


class DriftConfig(Section):
    """What requests are held against the reference, and when that is drift (conf/drift, or environment variables)."""

    request_log: str | None = Field(None, description="folder or gs:// of the request log's parts; null: serve.request_log")
    last: Count = Field(1000, description="the newest requests, unless since or until is given")
    since: str | None = Field(None, description="ISO 8601, UTC unless it says otherwise")
    until: str | None = Field(None, description="null: now")
    max_rows: Annotated[int, Field(ge=1000)] = Field(100_000, description="of a longer span, this many at random")
    min_rows: Annotated[int, Field(ge=20)] = Field(50, description="with fewer there is no verdict")
    alpha: Annotated[float, Field(gt=0, le=0.2)] = Field(0.01, description="false alarms for each window, all features")
    min_effect: Fraction = Field(0.1, description="distance of distributions under which a shift is no drift")
    max_empty: Fraction = Field(0.05, description="share of empty texts")
    max_repeated: Fraction = Field(0.1, description="share of one text")
    n_permutations: Annotated[int, Field(ge=1000)] = Field(2000, description="behind the p-value of the embeddings")
    output_dir: str = Field("outputs/drift", description="folder or gs:// of the report")
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8002
    every_s: Positive = Field(300.0, description="how often the drift service looks")


class SearchConfig(Section):
    """A sweep: what is tried, how it is chosen, and where it is kept (conf/search)."""

    study: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="the same name goes on with it")]
    storage: str | None = Field(description="SQLAlchemy's URL of a database; null: study.db in the sweep's folder")
    n_trials: Count = Field(description="in all, those of earlier and other processes included")
    n_seeds: Count = Field(description="runs of a trial, from seed on; its value is their mean")
    n_jobs: Count | None = Field(description="trials at once; null: joblib's n_jobs, else 1")
    grace_s: Annotated[int, Field(ge=4)] = Field(description="a trial unheard of for so long is run again")
    keep_checkpoints: bool
    sampler: str = Field(description="tpe, random, or a class as optuna.samplers.GPSampler")
    sampler_options: dict[str, Any] | None = Field(description="its arguments, over those that its name stands for")
    pruner: str = Field(description="median, hyperband, none, or a class as optuna.pruners.WilcoxonPruner")
    pruner_options: dict[str, Any] | None = Field(description="its arguments, over those that its name stands for")
    space: dict[str, Any] = Field(description="the tree's keys, each with type, low, high, log, step, or with values")


class BehaviourConfig(Section):
    """Small tests of single abilities, and how many of each must pass."""

    suite: str = Field(description="a table: ability, text, expect, changed")
    floors: dict[str, Fraction] = Field(description="ability -> pass rate; the others have no floor of their own")
    max_drop: Fraction = Field(description="how far below the champion's a pass rate may fall")


class GateConfig(Section):
    """What a version must show before it becomes champion; each rule can be put out of force with null."""

    min_gain: float | None = Field(description="the gain in macro-F1 over the champion is above this with this confidence")
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = Field(description="of min_gain")
    n_bootstrap: Annotated[int, Field(ge=1000)] = Field(description="draws behind min_gain")
    slice_floor: Fraction | None = Field(description="macro-F1 of each slice, F1 of each label")
    slice_rows: Count = Field(description="a slice with fewer rows is not judged")
    max_ece: Fraction | None = Field(description="expected calibration error")
    max_latency: Positive | None = Field(description="time for one text, as a ratio to the champion's")
    max_gap: Fraction | None = Field(description="of a probability, ONNX float32 against torch")
    min_agreement: Fraction | None = Field(description="share of labels that the serving variant and float32 have in common")
    behaviour: BehaviourConfig | None


class RegistryConfig(Section):
    """Where versions are kept, and the gate before production (conf/registry)."""

    path: str = Field(description="a folder, or gs://BUCKET/FOLDER")
    wandb: bool = Field(description="also as artifacts with the same aliases, in logger.wandb's project")
    report_dir: str = Field(description="folder or gs:// of the gate's reports, each in a folder named after the version")
    gate: GateConfig


class Config(Section):
    """The whole tree."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(description="of all that is drawn at random")
    run_dir: str | None = Field(description="a folder, or gs://BUCKET/FOLDER; null: the folder that Hydra makes for the run")
    ckpt_path: str | None = Field(description="checkpoint to resume from; last: that of run_dir")
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
    registry: RegistryConfig
    serve: ServeConfig
    annotate: AnnotateConfig
    drift: DriftConfig
    alerts: AlertsConfig
    search: SearchConfig | None = None

    @property
    def splits_dir(self) -> Path:
        """Where the splits of this data set are, or will be."""
        return self.splits_of(self.data.name)

    def splits_of(self, name: str) -> Path:
        """Where the splits of the data set of this name are, unless ``evaluate.splits_dir`` says otherwise."""
        return Path(self.evaluate.splits_dir or Path("data/processed") / name)


def table_format(path: str) -> str | None:
    """The format that a table's name tells, or None.

    >>> table_format("reviews.TSV.gz")
    'tsv'
    """
    name = path.lower().removesuffix(".gz")
    return next((kind for ending, kind in FORMATS.items() if name.endswith(ending)), None)
