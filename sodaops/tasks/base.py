"""What a task is: everything in which one label per text, several labels, or a number differ from each other.

Every stage asks the task and none asks which task it is, so that a new one is one class. A task has settings, as in its
section of the configuration, and parameters that :meth:`Task.fitted` derives from the splits, such as thresholds. Both are
in the bundle (:meth:`Task.section`).

Arrays have these names and shapes everywhere:

- ``labels``: the names of the outputs in order; one name, that of the column, where the output is a number;
- ``truth``: the targets as :meth:`Task.truth` reads them from a split, [n_rows, ...];
- ``probs``: the answers as :meth:`Task.probs` computes them, float32 [n_rows, n_labels]; numbers for a regression.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import numpy as np

from sodaops.config.schema import BUILT_IN_METRICS, Config, DataConfig, EvaluateConfig, OptimConfig
from sodaops.errors import ConfigError, DataError, nearest
from sodaops.tasks.metrics import bootstrap_rows
from sodaops.tasks.operation import Operation, Prediction

if TYPE_CHECKING:
    import pyarrow as pa  # a service has no pyarrow in its process

    from sodaops.tasks.plots import Wanted


class Targets(NamedTuple):
    """The distinct targets of a table."""

    labels: list[str]
    ids: np.ndarray  # int32 [n_cells]: the target of each distinct cell, -1 if the cell is not valid
    columns: "dict[str, pa.Array]"  # of the splits: name -> the value for each target; the first is ``label``, in words


@dataclass(frozen=True)
class Metric:
    """A number of :meth:`Task.measure` that reports show.

    Of a task's first one a higher value is better, 1 is best, and 0.005 is a small difference.
    """

    name: str  # as in metrics.json
    title: str
    higher_is_better: bool = True
    note: str = ""  # what it means, in a few words


class Task(Operation):
    """The protocol, and what most tasks share. A task is immutable, and its arguments are JSON values."""

    name: ClassVar[str]
    answers: ClassVar[str] = "labels"  # in sentences: ... of its labels are those of float32
    gap_unit: ClassVar[str] = "a probability"  # of `gap`
    limits: ClassVar[str] = ""  # what a model of this task cannot do, as a sentence
    metrics: ClassVar[tuple[Metric, ...]]  # all numbers of `measure`; the first one decides: gate, warnings, titles
    baselines: ClassVar[Mapping[str, str]]  # name in metrics.json -> title, best last: the gate compares with that one
    worst: ClassVar[str] = "The wrong predictions with the highest confidence."  # of `errors`, as a sentence
    slice_key: ClassVar[str] = "f1"  # of the first metric in the slices of gate.json
    takes_votes: ClassVar[bool] = False
    has_one_label: ClassVar[bool] = False  # whether truth is the id of a label, and probs a distribution over the labels
    takes_lists: bool = False  # whether cells of table_columns may be lists, which `cells` gets as JSON
    problem_type: ClassVar[str | None] = None  # of transformers, whose pipeline then gives the same ``probs`` of logits
    max_cells: ClassVar[int] = 65_536  # distinct cells in the column of targets

    def section(self) -> dict[str, Any]:
        """The section with which :func:`~sodaops.tasks.make.make_task` makes an equal task: ``_target_`` and arguments."""
        return {"_target_": f"{type(self).__module__}.{type(self).__qualname__}"}

    def splits_section(self) -> dict[str, Any]:
        """What of the section the splits depend on."""
        return self.section()

    def check_labels(self, labels: Sequence[str]) -> None:
        """Refuses labels, those of a bundle, which the task's parameters are not for.

        Raises:
            ConfigError: for example, thresholds of other labels.
        """

    def faults(self, config: Config) -> Iterator[str]:
        """Faults of the whole configuration that concern the task, as sentences with their keys."""
        for name in config.task.keys() - {"_target_", *self.section()}:
            yield f"task.{name}: {type(self).__qualname__}.section() lacks it, so that bundles would lose it."
        if config.data.vote_columns is not None and not self.takes_votes:
            yield f"data.vote_columns: task={self.name} has no votes; set data.vote_columns=null."
        built_in = [*self.val_metrics(2), "loss"]
        for name in () if self.has_one_label else config.evaluate.promises:
            yield f"evaluate.{name}: task={self.name} has no single label with a confidence; set evaluate.{name}=null."
        for name in sorted({*BUILT_IN_METRICS, *built_in, *(metric.name for metric in self.metrics)} & config.metrics.keys()):
            yield f"metrics.{name}: a built-in metric has this name; choose another."
        monitors = [f"val/{name}" for name in (*built_in, *config.metrics)]
        if (monitor := config.checkpoint.monitor) not in monitors:
            yield f"checkpoint.monitor={monitor!r}: expected {', '.join(monitors)}{nearest(monitor, monitors)}."

    # Data: from cells of a table to the columns of a split

    def table_columns(self, config: DataConfig) -> dict[str, str]:
        """Columns of the table with the targets -> the key that names them."""
        return {config.label_column: "data.label_column"}

    def cells(self, raw: "pa.RecordBatch", config: DataConfig) -> "pa.Array":
        """One string per row that stands for its target, from string columns."""
        return raw[config.label_column]

    def read_cells(self, place: str, counts: Mapping[str, int], config: DataConfig) -> Targets:
        """The targets of the distinct cells.

        Args:
            place: the tables, for messages.
            counts: cell -> number of rows, in order of appearance.
            config: conf/data.

        Raises:
            DataError: too few targets, or targets of another task.
        """
        raise NotImplementedError

    def bad_cells(
        self, place: str, cells: Sequence[str], rows: Sequence[int], labels: Sequence[str], config: DataConfig
    ) -> DataError:
        """The error for cells that are no target: the distinct ones, and the numbers of all their rows, from 1."""
        raise NotImplementedError

    def label_counts(self, targets: Targets, ids: np.ndarray) -> dict[str, int]:
        """Label -> number of rows, for the manifest, of rows with these targets, int [n_rows]."""
        raise NotImplementedError

    def check_train(self, place: str, targets: Targets, ids: np.ndarray, config: DataConfig) -> None:
        """Refuses train rows, int [n_rows], from which nothing can be learnt.

        Raises:
            DataError: for example, one label only.
        """
        raise NotImplementedError

    def truth(self, table: "pa.Table") -> np.ndarray:
        """The targets of a split, [n_rows, ...], for metrics."""
        raise NotImplementedError

    def any_truth(self, n_rows: int, n_labels: int) -> np.ndarray:
        """Some valid targets, to try a model before its training."""
        raise NotImplementedError

    # Training

    def n_outputs(self, n_labels: int) -> int:
        """Logits of the model."""
        return n_labels

    def targets(self, table: "pa.Table", labels: Sequence[str], optim: OptimConfig) -> np.ndarray:
        """What the loss compares logits with, float32 [n_rows, ...]."""
        raise NotImplementedError

    def soft_targets(self, probs: np.ndarray) -> np.ndarray:
        """The targets of :meth:`targets` that stand for answers of another model, float32 [n_rows, ...]."""
        return probs

    def example_targets(self, n_labels: int) -> np.ndarray:
        """Targets of two texts, float32 [2, ...], to try a loss before the training."""
        raise NotImplementedError

    def balanced_weights(self, truth: np.ndarray, n_labels: int) -> np.ndarray:
        """What ``loss.class_weights=balanced`` stands for: float32 [n_labels], from the truth of train."""
        raise ConfigError(f"loss.class_weights=balanced: task={self.name} has no classes; set loss.class_weights=none.")

    def val_metrics(self, n_labels: int) -> dict[str, dict[str, Any]]:
        """Name -> section of a torchmetrics class, measured on ``probs`` and ``truth`` after every epoch."""
        raise NotImplementedError

    def fitted_on_train(self, truth: np.ndarray) -> Self:
        """This task with parameters from the truth of train, such as mean and deviation."""
        return self

    needs_val: ClassVar[bool] = False  # whether :meth:`fitted` is of use

    def fitted(self, probs: np.ndarray, truth: np.ndarray, labels: Sequence[str]) -> Self:
        """This task with parameters from the answers of the trained model on val, such as thresholds."""
        return self

    # Answers

    def probs(self, logits: np.ndarray) -> np.ndarray:
        """Answers from logits float32 [n, n_outputs], float32 [n, n_labels]."""
        raise NotImplementedError

    def torch_probs(self, logits: Any) -> Any:
        """The same of a tensor, on its device."""
        return logits.new_tensor(self.probs(logits.float().cpu().numpy()))

    def torch_answers(self, probs: Any) -> Any:
        """What the metrics of :meth:`val_metrics` compare with the truth, from a tensor of probs."""
        return probs

    def prediction(self, row: Sequence[float], labels: Sequence[str]) -> Any:
        """The prediction from one row of ``probs``, a list of floats; see :attr:`prediction_class`."""
        raise NotImplementedError

    def columns(self, probs: np.ndarray, labels: Sequence[str]) -> "dict[str, pa.Array]":
        """The columns that predicted tables get, for rows of ``probs`` without NaN."""
        raise NotImplementedError

    def is_valid(self, probs: np.ndarray) -> bool:
        """Whether an output could be this task's; a service tries a new bundle with it."""
        return bool(np.isfinite(probs).all())

    # Comparing two models, or two variants of one

    def as_of_own(self, probs: np.ndarray, other: Self) -> np.ndarray:
        """Answers of another model of this task, which has other parameters, such as this one's would give its predictions."""
        return probs

    def gap(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Differences of answers, in the unit of a probability."""
        return np.abs(after - before)

    def agreement(self, before: np.ndarray, after: np.ndarray) -> float:
        """The share of rows with the same answer."""
        raise NotImplementedError

    def score(self, probs: np.ndarray, truth: np.ndarray) -> float:
        """The first metric."""
        return self.summary(probs, truth)[self.metrics[0].name]

    # Evaluation and the gate. Functions that several tasks need are in sodaops.tasks.metrics.

    def purpose(self, names: str) -> str:
        """What a model does, for cards and reports, of the names of its labels: "classifies a text as one of `a`, `b`"."""
        raise NotImplementedError

    def measure(self, probs: np.ndarray, truth: np.ndarray, labels: Sequence[str], settings: EvaluateConfig) -> dict[str, Any]:
        """The metrics of a split, as in metrics.json: ``n_rows``, and plain numbers for ``metrics``.

        ``interval_95`` has the intervals, metric -> low and high, at least of the first metric. ``labels``, label -> f1,
        precision, recall, n_rows and perhaps roc_auc and threshold, is a table in reports; without it there is none.
        """
        raise NotImplementedError

    def summary(self, probs: np.ndarray, truth: np.ndarray) -> dict[str, float]:
        """The first few metrics, at least two, quick to compute: of slices, of baselines, of both models in the gate."""
        raise NotImplementedError

    def slice_summary(self, probs: np.ndarray, truth: np.ndarray) -> dict[str, float]:
        """What reports show of a slice: the summary, and perhaps the mean ``confidence``."""
        return self.summary(probs, truth)

    def label_scores(self, probs: np.ndarray, truth: np.ndarray, labels: Sequence[str]) -> dict[str, tuple[float, int]]:
        """Label -> its score and number of rows; the gate checks them like slices."""
        return {}

    def baseline_probs(self, train: "pa.Table", texts: Sequence[str], labels: Sequence[str]) -> dict[str, np.ndarray]:
        """Baseline -> its ``probs`` of texts, in the order of ``baselines``."""
        raise NotImplementedError

    def support(self, probs: np.ndarray, truth: np.ndarray) -> np.ndarray | None:
        """Rows and predictions of each label, int [2, n_labels], for warnings about rare labels; None: no labels."""
        return None

    def warnings(self, measured: Mapping[str, Any], split: str) -> list[str]:
        """Sentences about the quality that only this task has, such as on the coverage of its intervals."""
        return []

    def plots(self, probs: np.ndarray, table: "pa.Table", labels: Sequence[str], n_bins: int) -> list["Wanted"]:
        """The plots of a split, which :func:`sodaops.tasks.plots.draw_plots` draws."""
        raise NotImplementedError

    def charts(self, probs: np.ndarray, truth: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
        """For W&B: ``confusion``, int [n_labels, n_labels]; ``curves``, label -> fpr, tpr, precision, recall; or neither."""
        return {}

    def errors(self, table: "pa.Table", probs: np.ndarray, labels: Sequence[str], n_worst: int) -> list[dict[str, Any]]:
        """The worst answers, worst first: text, label, predicted and row; perhaps confidence, and votes, a list."""
        raise NotImplementedError

    def gains(self, truth: np.ndarray, challenger: np.ndarray, champion: np.ndarray, n_samples: int) -> np.ndarray:
        """Differences of :meth:`score` between two models' ``probs`` on bootstrap samples of the rows, float [n_samples]."""

        def gain(rows: np.ndarray) -> float:
            return self.score(challenger[rows], truth[rows]) - self.score(champion[rows], truth[rows])

        return bootstrap_rows(gain, len(truth), n_samples)

    def calibration_error(self, probs: np.ndarray, truth: np.ndarray) -> float | None:
        """What the gate limits by ``max_ece``; None: not defined for the task."""
        return None

    def meets(self, prediction: Prediction, expected: str) -> bool:
        """Whether a prediction is as a behavioural test expects: a label or "not LABEL"."""
        return (expected.removeprefix("not ") in self.counted(prediction)[0]) != expected.startswith("not ")
