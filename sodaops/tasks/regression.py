"""A number for each text."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

import numpy as np
from pydantic import Field

from sodaops.config.schema import Config, DataConfig, EvaluateConfig, OptimConfig
from sodaops.errors import ConfigError, DataError, some
from sodaops.tasks import metrics, number_metrics
from sodaops.tasks.agreement import Pair
from sodaops.tasks.base import Metric, Targets, Task

if TYPE_CHECKING:
    import pyarrow as pa

    from sodaops.tasks.plots import Wanted

_SAME = 0.1  # deviations of the target; smaller differences of two models' answers count as none
_Number = Annotated[float, Field(examples=[3.2])]


@dataclass(frozen=True)
class Estimate:
    """The prediction for one text: a number, and the interval that contains the truth in a share ``coverage`` of new texts."""

    value: _Number
    low: _Number
    high: _Number


@dataclass(frozen=True)
class Regression(Task):
    """A numeric column. It is standardised in training, and answers are in its own unit.

    Args:
        coverage: share of new texts whose truth shall be within the interval (split conformal prediction, Vovk et al. 2005,
            https://arxiv.org/abs/1604.04173), if they are like val.
        minimum: the lowest possible value; answers are not below it. None: there is none.
        maximum: the highest possible value.
        mean: of the column in train; derived, like the next two.
        deviation: the standard deviation of the column in train.
        radius: half the width of an interval.
    """

    coverage: float = 0.9
    minimum: float | None = None
    maximum: float | None = None
    mean: float = 0.0
    deviation: float = 1.0
    radius: float = 0.0

    name: ClassVar[str] = "regression"
    answers: ClassVar[str] = "values"
    gap_unit: ClassVar[str] = "a standard deviation"
    limits: ClassVar[str] = "An interval is as wide for every text, and holds its coverage only for texts like those of val."
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("r2", "R²", note="share of the variance that is explained"),
        Metric("mae", "mean absolute error", higher_is_better=False),
        Metric("rmse", "root mean squared error", higher_is_better=False),
        Metric("spearman", "Spearman's ρ", note="correlation of the ranks"),
        Metric("coverage", "coverage", note="share of rows within their interval"),
    )
    baselines: ClassVar[Mapping[str, str]] = {"mean": "the mean of train", "tfidf": "TF-IDF + ridge regression"}
    worst: ClassVar[str] = "The predictions that differ most from the table."
    slice_key: ClassVar[str] = "r2"
    max_cells: ClassVar[int] = 2**31 - 1
    needs_val: ClassVar[bool] = True
    prediction_class: ClassVar[type] = Estimate
    keeps_answers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.coverage < 1:
            raise ConfigError(f"task.coverage={self.coverage}: expected a share between 0 and 1.")
        if self.minimum is not None and self.maximum is not None and not self.minimum < self.maximum:
            raise ConfigError(f"task.minimum={self.minimum}: expected less than task.maximum={self.maximum}.")

    def section(self) -> dict[str, Any]:
        return {"_target_": "sodaops.tasks.regression.Regression", **vars(self)}

    def faults(self, config: Config) -> Iterator[str]:
        yield from super().faults(config)
        if config.loss["_target_"].startswith("sodaops.modeling.losses."):
            yield f"loss._target_={config.loss['_target_']}: it is for labels; set loss=mse or loss=huber."
        if config.data.labels is not None or config.data.label_map is not None:
            yield "data.labels and data.label_map: a number has no labels; set both to null."

    # Data

    def read_cells(self, place: str, counts: Mapping[str, int], config: DataConfig) -> Targets:
        import pyarrow as pa

        numbers = np.array([_number(cell) for cell in counts])
        values, ids = np.unique(numbers, return_inverse=True)  # NaN, which is no number, is the last one
        ids = np.where(self._allowed(numbers), ids, -1)
        if (ids >= 0).all() and len(values) < 2:
            raise DataError(f"{place}: all rows of {config.label_column} are {values[0]:g}; expected different values.")
        columns = {"label": pa.array([f"{value:.15g}" for value in values.tolist()]), "value": pa.array(values)}
        return Targets([config.label_column], ids.astype(np.int32), columns)

    def bad_cells(
        self, place: str, cells: Sequence[str], rows: Sequence[int], labels: Sequence[str], config: DataConfig
    ) -> DataError:
        return DataError(
            f"{place}: {some([repr(cell) for cell in cells])} at row {some(rows)}; expected {self._expected}. "
            f"Remove or correct these {len(rows):,} rows."
        )

    @property
    def _limits(self) -> tuple[float, float]:
        return -math.inf if self.minimum is None else self.minimum, math.inf if self.maximum is None else self.maximum

    @property
    def _expected(self) -> str:
        low, high = self._limits
        return "a finite number" if (low, high) == (-math.inf, math.inf) else f"a finite number from {low:g} to {high:g}"

    def _allowed(self, numbers: np.ndarray) -> np.ndarray:
        low, high = self._limits
        return np.isfinite(numbers) & (numbers >= low) & (numbers <= high)

    def label_counts(self, targets: Targets, ids: np.ndarray) -> dict[str, int]:
        return {targets.labels[0]: len(ids)}

    def check_train(self, place: str, targets: Targets, ids: np.ndarray, config: DataConfig) -> None:
        if len(np.unique(ids)) < 2:
            raise DataError(f"{place}: train has one value of {config.label_column} only, so nothing can be learnt from it.")

    def truth(self, table: "pa.Table") -> np.ndarray:
        """float32 [n_rows]."""
        return table["value"].to_numpy().astype(np.float32)

    def any_truth(self, n_rows: int, n_labels: int) -> np.ndarray:
        return np.arange(n_rows, dtype=np.float32)

    # Training

    def targets(self, table: "pa.Table", labels: Sequence[str], optim: OptimConfig) -> np.ndarray:
        return ((self.truth(table) - self.mean) / self.deviation).astype(np.float32)[:, None]

    def soft_targets(self, probs: np.ndarray) -> np.ndarray:
        return ((probs - self.mean) / self.deviation).astype(np.float32)

    def example_targets(self, n_labels: int) -> np.ndarray:
        return np.array([[0], [1]], np.float32)

    def val_metrics(self, n_labels: int) -> dict[str, dict[str, Any]]:
        return {
            "r2": {"_target_": "torchmetrics.R2Score"},
            "mae": {"_target_": "torchmetrics.MeanAbsoluteError"},
            "rmse": {"_target_": "torchmetrics.MeanSquaredError", "squared": False},
            "spearman": {"_target_": "torchmetrics.SpearmanCorrCoef"},
        }

    def fitted_on_train(self, truth: np.ndarray) -> Self:
        return replace(self, mean=float(truth.mean(dtype=float)), deviation=float(truth.std(dtype=float)))

    def fitted(self, probs: np.ndarray, truth: np.ndarray, labels: Sequence[str]) -> Self:
        errors = np.sort(np.abs(probs[:, 0].astype(float) - truth))
        rank = math.ceil((len(errors) + 1) * self.coverage)  # of too few rows, the largest error
        return replace(self, radius=float(errors[min(rank, len(errors)) - 1]))

    # Answers

    def probs(self, logits: np.ndarray) -> np.ndarray:
        return np.clip(logits * np.float32(self.deviation) + np.float32(self.mean), *self._limits)

    def torch_probs(self, logits: Any) -> Any:
        return (logits.float() * self.deviation + self.mean).clamp(*self._limits)

    def torch_answers(self, probs: Any) -> Any:
        return probs[:, 0]

    def prediction(self, row: Sequence[float], labels: Sequence[str]) -> Estimate:
        low, high = self._limits
        return Estimate(row[0], max(row[0] - self.radius, low), min(row[0] + self.radius, high))

    def columns(self, probs: np.ndarray, labels: Sequence[str]) -> "dict[str, pa.Array]":
        import pyarrow as pa

        shifts = {"value": 0, "low": -self.radius, "high": self.radius}
        return {name: pa.array(np.clip(probs[:, 0] + shift, *self._limits)) for name, shift in shifts.items()}

    # Comparing two models

    def gap(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        return np.abs(after - before) / self.deviation

    def agreement(self, before: np.ndarray, after: np.ndarray) -> float:
        return float((self.gap(before, after) < _SAME).mean())

    # Evaluation and the gate

    def purpose(self, names: str) -> str:
        return f"estimates {names}, a number, of a text"

    def measure(self, probs: np.ndarray, truth: np.ndarray, labels: Sequence[str], settings: EvaluateConfig) -> dict[str, Any]:
        def of_rows(rows: np.ndarray | slice) -> dict[str, float]:
            covered = np.abs(probs[rows, 0] - truth[rows]) <= self.radius
            return {**self.summary(probs[rows], truth[rows]), "coverage": float(covered.mean())}

        def of_sample(rows: np.ndarray) -> list[float]:
            return list(of_rows(rows).values())

        measured = of_rows(slice(None))
        samples = metrics.bootstrap_rows(of_sample, len(truth), settings.n_bootstrap)
        low, high = np.quantile(samples, [0.025, 0.975], axis=0).tolist()
        intervals = {name: {"low": low[i], "high": high[i]} for i, name in enumerate(measured)}
        return {"n_rows": len(truth), **measured, "interval_95": intervals}

    def summary(self, probs: np.ndarray, truth: np.ndarray) -> dict[str, float]:
        return number_metrics.summary(probs[:, 0].astype(float), truth.astype(float))

    def gains(self, truth: np.ndarray, challenger: np.ndarray, champion: np.ndarray, n_samples: int) -> np.ndarray:
        values, other = (probs[:, 0].astype(float) for probs in (challenger, champion))
        return number_metrics.paired_gains(truth.astype(float), values, other, n_samples)

    def baseline_probs(self, train: "pa.Table", texts: Sequence[str], labels: Sequence[str]) -> dict[str, np.ndarray]:
        from sodaops.tasks import baselines

        truth = self.truth(train).astype(float)
        ridge = baselines.ridge((train["text"].to_pylist(), truth), texts)
        return {"mean": np.full((len(texts), 1), truth.mean()), "tfidf": np.clip(ridge, *self._limits)[:, None]}

    def warnings(self, measured: Mapping[str, Any], split: str) -> list[str]:
        if measured["interval_95"]["coverage"]["high"] >= self.coverage:
            return []
        return [
            f"The intervals contain {measured['coverage']:.1%} of the values in {split}, less than task.coverage="
            f"{self.coverage:g}: these rows are unlike val, or val has too few."
        ]

    def plots(self, probs: np.ndarray, table: "pa.Table", labels: Sequence[str], n_bins: int) -> list["Wanted"]:
        from sodaops.tasks import plots

        return plots.of_values(probs[:, 0], self.truth(table), labels[0], self.radius)

    def errors(self, table: "pa.Table", probs: np.ndarray, labels: Sequence[str], n_worst: int) -> list[dict[str, Any]]:
        """The largest errors, largest first."""
        worst = np.argsort(-np.abs(probs[:, 0] - self.truth(table)), kind="stable")[:n_worst]
        rows = table.take(worst).select(["text", "label", "row"]).to_pylist()
        return [{**row, "predicted": f"{probs[i, 0]:.4g}"} for i, row in zip(worst, rows, strict=True)]

    # Service, drift and annotation

    def shown(self, prediction: Estimate) -> tuple[str, str]:
        return f"{prediction.value:.4g}", f"{prediction.low:.4g} to {prediction.high:.4g}"

    def logged(self, prediction: Estimate) -> tuple[str, float]:
        return f"{prediction.value:.6g}", prediction.value

    def counted(self, prediction: Estimate) -> tuple[Sequence[str], float | None]:
        return (), None

    def explained(self, prediction: Estimate, labels: Sequence[str]) -> int:
        return 0

    def drift_values(self, probs: np.ndarray, labels: Sequence[str]) -> dict[str, np.ndarray]:
        return {"value": probs[:, 0].astype(float)}

    def uncertainty(self, probs: np.ndarray) -> np.ndarray:
        """The distance from the mean of train: the model gives no variance, and has seen few texts with rare values."""
        return np.abs(probs[:, 0] - self.mean)

    @property
    def question(self) -> dict[str, Any]:
        limits = {"min": self.minimum, "max": self.maximum}
        return {"kind": "number", **{name: limit for name, limit in limits.items() if limit is not None}}

    def labels_without_data(self, config: DataConfig) -> list[str]:
        return [config.label_column]

    def check_answer(self, answer: object, labels: Sequence[str]) -> str:
        number = _number(answer)
        if not self._allowed(np.array(number)):
            raise DataError(f"{labels[0]}={repr(answer)[:80]}; expected {self._expected}.")
        return f"{number:.15g}"

    def answer_value(self, answer: str) -> float:
        return float(answer)

    def agree(self, one: str, other: str) -> bool:
        return abs(float(one) - float(other)) <= self.deviation / 2

    def kappa(self, pairs: Sequence[Pair]) -> float | None:
        """With quadratic weights, which is Lin's concordance."""
        return number_metrics.concordance(np.array(pairs, float)) if pairs else None

    def merged(self, answers: Sequence[str]) -> str | None:
        return f"{np.median([float(answer) for answer in answers]):.15g}" if answers else None


def _number(cell: object) -> float:
    """A cell or an answer; NaN if it is no number."""
    try:
        return math.nan if isinstance(cell, bool) or "_" in str(cell) else float(cell)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan
