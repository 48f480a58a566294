"""The typed, frozen configuration.

Hydra composes conf/ into plain data, and :mod:`sodaops.config.validation` turns that into these classes without converting
types. ``conf/trainer`` is free-form: its keys are the arguments of lightning.Trainer, which training checks against
Lightning's signature.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from sodaops.config.alerts import AlertsConfig
from sodaops.config.extensions import Extension
from sodaops.config.model import DistillConfig, LabelsConfig, ModelConfig, PromiseConfig
from sodaops.config.search import SearchConfig
from sodaops.config.sections import (
    Cleaning,
    Count,
    Delimiter,
    Encoding,
    Fraction,
    FromJson,
    LocalPath,
    Name,
    Port,
    Positive,
    Section,
    ServerSection,
    TextColumn,
)
from sodaops.text.columns import names_of
from sodaops.text.redaction import KINDS

FORMATS = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
BUILT_IN_METRICS = {  # and the other names beside them in metrics.json and run.json
    "macro_f1", "accuracy", "weighted_f1", "loss", "log_loss", "ece", "n_rows", "interval_95", "labels", "cut_share", "slices",
    "baselines", "epoch", "teacher", "abstention",
}  # fmt: skip
Label = str | int
Kind = Literal[*KINDS]  # type: ignore[valid-type]
Days = Annotated[int, Field(ge=1, le=36_500)]


class FilesConfig(Section):
    """Given splits: one table each, or none at all."""

    train: str | None
    val: str | None
    test: str | None


class DataConfig(Section):
    """The labelled texts, and how they are split (conf/data)."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    path: str | None = Field(None, description="one table, local or at gs://: .csv, .tsv, .jsonl or .parquet")
    files: FilesConfig = Field(description="given train, val and test tables, in place of path")
    source: Extension | None = Field(None, description="a function that gives Arrow record batches, in place of path")
    watch: str | None = Field(description="file or folder that DVC watches for changes")
    added: LocalPath | None = Field(None, description="folder with more tables, whose rows never go to test; it may be missing")
    delimiter: Delimiter | None = Field(None, description="between the columns of CSV and TSV, or tab; null: detected")
    encoding: Encoding | None = Field(None, description="of CSV, TSV and JSON lines, such as windows-1252; null: UTF-8")
    text_column: TextColumn = Field(description="column with the texts, or several: [title, body]")
    label_column: Name = Field(description="column with the labels")
    labels: Annotated[list[Label] | None, FromJson] = None
    label_map: Annotated[dict[Label, Name] | None, FromJson] = Field(None, description="value in the table -> label")
    vote_columns: Annotated[dict[Name, Name] | None, FromJson] = None
    slice_columns: Annotated[list[Name], FromJson] = Field([], description="columns to report metrics by")
    cleaning: Cleaning
    fractions: list[Fraction] = Field(description="shares of train, val, test", min_length=3, max_length=3)
    conflicts: Literal["error", "drop"] = Field(description="the same text with two labels")
    max_chars: Count = Field(description="longest text accepted, in characters")
    unlabelled: str | None = Field(None, description="table, or local folder of tables, with more texts for teacher to label")
    max_rows: Count | None = Field(description="use a sample of so many rows of each table, by their hashes; null: all")
    ray: str | None = Field(None, description="Ray cluster to clean the table on: local, auto or HOST:PORT; null: none")

    @property
    def text_columns(self) -> list[str]:
        """The columns of ``text_column``."""
        return names_of(self.text_column)

    @property
    def sources(self) -> dict[str, str]:
        """Split -> table for given splits, or ``all`` -> the table or the name of the source to split."""
        if self.source is not None:
            return {"all": f"data.source={self.source['_target_']}"}
        return {"all": self.path} if self.path is not None else self.files.model_dump()


class OptimConfig(Section):
    """The optimizer, its learning rate scheduler, the batches and their targets (conf/optim)."""

    optimizer: Extension = Field(description="a class of torch.optim, or one like it, and its arguments")
    scheduler: Extension | None = Field(
        description="a class of torch.optim.lr_scheduler, or one like it, and its arguments; null: constant learning rates"
    )
    lr: Positive
    head_lr: Positive = Field(description="of the head")
    weight_decay: Annotated[float, Field(ge=0)]
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(description="lr factor per layer below the top")
    frozen_layers: Annotated[int, Field(ge=0)] | None
    batch_tokens: Count = Field(description="token budget of a batch, padding included")
    batch_texts: Count | None = Field(
        None, description="texts per optimizer step, about, by accumulating batches of all processes; null: one batch"
    )
    vote_weight: Fraction = Field(description="target = vote_weight * vote shares + (1 - vote_weight) * label")


class CheckpointConfig(Section):
    """Which epoch is kept (conf/config.yaml)."""

    monitor: str
    mode: Literal["min", "max"] | None = Field(description="whether the lowest or highest monitor is best; null: as it says")
    every_n_train_steps: Count | None
    restarts: int = Field(ge=0)


class EarlyStoppingConfig(Section):
    """When training stops before max_epochs."""

    patience: Count | None


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
    bundle: bool


class LoggerConfig(Section):
    """Where metrics go; several at once are allowed, also Lightning loggers of your own (conf/logger)."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Extension] = Field(init=False)
    csv: CsvConfig | None = None
    tensorboard: TensorboardConfig | None = None
    wandb: WandbConfig | None = None


class ExportConfig(Section):
    """Which ONNX models go into the bundle."""

    variants: list[Literal["float32", "int8"]] = Field(description="[]: none; int8 only where it passes its gate")


class EvaluateConfig(PromiseConfig):
    """Evaluation of a bundle on a split (conf/evaluate)."""

    bundle: str | None
    variant: Literal["float32", "int8"]
    split: Literal["train", "val", "test", "none"]
    splits_dir: LocalPath | None = Field(description="null: data/processed/NAME, NAME being data.name or the bundle's")
    output_dir: str | None = Field(description="folder or gs://; null: evaluation/ beside the bundle")
    n_bootstrap: Annotated[int, Field(ge=100)] = Field(description="bootstrap draws for the intervals")
    n_bins: Annotated[int, Field(ge=2)] = Field(description="of the reliability diagram and the calibration error")
    n_worst: Annotated[int, Field(ge=0)] = Field(description="errors in the report, the most confident first")
    baselines: bool


class ServeConfig(ServerSection):
    """The service (conf/serve, or environment variables)."""

    port: Port = 8000
    variant: Literal["float32", "int8"] | None = Field(None, description="null: the bundle's choice")
    model_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="in the routes /v2/…")] = "sodaops"
    n_workers: Count | None = None
    max_batch_tokens: Count = Field(256, description="tokens per batch; a longer text is a batch of its own")
    max_queue: Count = 256
    max_texts: Count = Field(128, description="texts per request")
    max_chars: Count = Field(20_000, description="characters per text")
    max_body_bytes: Count = Field(1_048_576, description="bytes of a request; beyond it the answer is 413")
    deadline_s: Positive = Field(10.0, description="seconds until the answer is 504")
    reload_s: Positive | None = Field(10.0, description="seconds between checks for a new bundle; null: only on request")
    request_log: str | None = None
    journal_dir: LocalPath | None = None
    log_texts: bool = False
    redact: list[Kind] = Field(["email", "phone"], description="removed from texts before they are logged")
    keep_days: Days | None = Field(None, description="parts of the request log older than this are deleted; null: never")
    feedback_store: LocalPath | None = None
    part_s: Annotated[float, Field(gt=0, le=86_400)] = 300.0
    part_bytes: Count = Field(16_777_216, description="size of the journal at which a part is written earlier")
    max_journal_bytes: Count = 1_073_741_824
    shadow: str | None = Field(None, description="challenger that also answers, unseen: a folder, gs:// or REGISTRY@challenger")
    shadow_share: Fraction = Field(1.0, description="share of the requests that the challenger also answers, unseen")
    canary: Fraction = Field(0.0, description="share of the requests whose answer to the client is the challenger's")
    cors_origins: list[str] = Field([], description="origins that may call the service from a browser")
    abstain: bool = Field(False, description="whether answers say if the bundle abstains from them; a request may differ")


class SharesConfig(Section):
    """How the texts to annotate are chosen; the shares sum to 1."""

    uncertain: Fraction = Field(0.3, description="texts with the least confident predictions")
    drifted: Fraction = Field(0.3, description="texts most unlike the reference")
    diverse: Fraction = Field(0.2, description="texts most unlike each other")
    random: Fraction = Field(0.2, description="texts chosen at random, for an unbiased estimate")


class AnnotateConfig(ServerSection):
    """Choosing and annotating texts (conf/annotate)."""

    store: LocalPath = "data/annotation"
    port: Port = 8001
    n: Count = Field(100, description="texts that one `sodaops annotate pick` adds")
    shares: SharesConfig = SharesConfig()
    min_annotators: Count = 1
    near_test: Fraction = Field(0.7, description="similarity to a test text at which a text is refused")
    text_key: str | None = Field(None, description="column or Label Studio key with the text; null: text, or the only one")
    label_key: str | None = Field(None, description="column or Label Studio control with the label; null: the only one")


class DriftConfig(ServerSection):
    """Which requests are compared with the reference, and when they have drifted (conf/drift, or environment variables)."""

    request_log: str | None = Field(None, description="folder or gs:// of the request log's parts; null: serve.request_log")
    last: Count = Field(1000, description="the newest requests, unless since or until is given")
    since: str | None = Field(None, description="start, ISO 8601, by default in UTC")
    until: str | None = Field(None, description="end; null: now")
    max_rows: Annotated[int, Field(ge=1000)] = Field(100_000, description="requests sampled from a longer window")
    min_rows: Annotated[int, Field(ge=20)] = Field(50, description="fewer requests give no verdict")
    alpha: Annotated[float, Field(gt=0, le=0.2)] = 0.01
    min_effect: Fraction = Field(0.1, description="distance of distributions below which a change is not drift")
    max_empty: Fraction = 0.05
    max_repeated: Fraction = 0.1
    n_permutations: Annotated[int, Field(ge=1000)] = Field(2000, description="permutations for the p-value of the embeddings")
    output_dir: str = Field("outputs/drift", description="folder or gs:// of the report")
    port: Port = 8002
    every_s: Positive = Field(300.0, description="seconds between checks of the drift service")


class BehaviourConfig(Section):
    """Behavioural tests, by ability, and the pass rates that they must reach."""

    suite: str = Field(description="a table: ability, text, expect, changed")
    floors: dict[str, Fraction] = Field(description="ability -> lowest pass rate; other abilities have none")
    max_drop: Fraction


class GateConfig(Section):
    """What a version must pass to become champion; null disables a rule."""

    min_gain: float | None = Field(description="the first metric exceeds the champion's by more, with the given confidence")
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = Field(description="confidence of min_gain")
    n_bootstrap: Annotated[int, Field(ge=1000)] = Field(description="bootstrap draws for min_gain")
    slice_floor: Fraction | None
    slice_rows: Count = Field(description="slices with fewer rows are not checked")
    max_ece: Fraction | None = Field(description="largest expected calibration error")
    max_latency: Positive | None = Field(description="largest ratio of the time for one text to the champion's")
    max_gap: Fraction | None
    min_agreement: Fraction | None = Field(description="lowest share of answers on which the serving variant and float32 agree")
    behaviour: BehaviourConfig | None
    min_disagreements: Count | None = Field(None, description="labelled live disagreements with the champion (McNemar's test)")


class RegistryConfig(Section):
    """The model registry and its gate (conf/registry)."""

    path: str
    wandb: bool = Field(description="also log versions as artifacts with the same aliases, in logger.wandb's project")
    report_dir: str = Field(description="folder or gs:// of the gate's reports, each in a folder named after the version")
    gate: GateConfig


class Config(Section):
    """The whole configuration."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(description="seed of all random numbers")
    run_dir: str | None = Field(description="a folder, or gs://BUCKET/FOLDER; null: the folder that Hydra makes for the run")
    ckpt_path: str | None = Field(description="checkpoint to resume from; last: that of run_dir")
    task: Extension = Field({"_target_": "sodaops.tasks.single_label.SingleLabel"}, description="What is predicted for a text.")
    data: DataConfig
    model: ModelConfig
    head: Extension = Field(description="The class of the head, and its arguments.")
    loss: Extension = Field(description="The class of the loss, and its arguments.")
    optim: OptimConfig
    trainer: dict[str, Any] = Field(description="Arguments of lightning.Trainer, checked when training starts.")
    checkpoint: CheckpointConfig
    early_stopping: EarlyStoppingConfig
    teacher: str | list[str] | None = Field(
        None, description="bundle, or several, whose answers are learnt: a folder, gs://BUCKET/FOLDER, or REGISTRY@champion"
    )
    distill: DistillConfig = DistillConfig()
    callbacks: dict[str, Extension]
    metrics: dict[Annotated[str, Field(pattern="^[A-Za-z][A-Za-z0-9_]*$")], Extension]
    logger: LoggerConfig
    export: ExportConfig
    evaluate: EvaluateConfig
    registry: RegistryConfig
    serve: ServeConfig
    annotate: AnnotateConfig
    drift: DriftConfig
    labels: LabelsConfig = LabelsConfig()
    alerts: AlertsConfig
    search: SearchConfig | None = None

    @property
    def teachers(self) -> list[str]:
        """The bundles of ``teacher``."""
        return [self.teacher] if isinstance(self.teacher, str) else self.teacher or []

    @property
    def splits_dir(self) -> Path:
        """The folder of this data set's splits."""
        return self.splits_of(self.data.name)

    def splits_of(self, name: str) -> Path:
        """The folder of a data set's splits: ``evaluate.splits_dir``, or one by name."""
        return Path(self.evaluate.splits_dir or Path("data/processed") / name)


def table_format(path: str) -> str | None:
    """The format of a table, by its extension, or None.

    >>> table_format("reviews.TSV.gz")
    'tsv'
    """
    name = path.lower().removesuffix(".gz")
    return next((kind for ending, kind in FORMATS.items() if name.endswith(ending)), None)
