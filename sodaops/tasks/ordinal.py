"""One of several ordered labels, such as stars."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sodaops.config.schema import DataConfig, EvaluateConfig
from sodaops.errors import ConfigError, DataError, some
from sodaops.tasks.base import Metric, Prediction, Targets
from sodaops.tasks.metrics import draw_counts, paired_gains, rank_metrics
from sodaops.tasks.single_label import SingleLabel

if TYPE_CHECKING:
    import pyarrow as pa

    from sodaops.tasks.plots import Wanted


class Ordinal(SingleLabel):
    """Ordered labels. The answer is the median of the distribution over them, which has the least expected error in ranks.

    Args:
        edges: of a numeric column, the values at which the next label begins: [0, 2] gives three labels. The labels are
            ``data.labels``, or the numbers from 1. None: the column has labels.
    """

    name = "ordinal"
    metrics = (
        Metric("quadratic_kappa", "quadratic kappa", note="agreement beyond chance, far errors count more"),
        Metric("mae", "error in ranks", False, "on average; 0 is best"),
        Metric("off_by_one", "at most one off", note="share of rows"),
        *SingleLabel.metrics,
    )
    slice_key = "quadratic_kappa"
    problem_type = None
    worst = "The predictions that are the most ranks off, then those with the highest confidence."

    def __init__(self, edges: Sequence[float] | None = None) -> None:
        if edges is not None and not (len(edges) and all(map(_is_number, edges)) and (np.diff(edges) > 0).all()):
            raise ConfigError(f"task.edges={list(edges)}: expected increasing numbers.")
        self.edges = None if edges is None else [float(edge) for edge in edges]

    def section(self) -> dict[str, Any]:
        return {**super().section(), "edges": self.edges}

    # Data

    def read_cells(self, place: str, counts: Mapping[str, int], config: DataConfig) -> Targets:
        if self.edges is not None:
            return _binned(self.edges, config, list(counts))
        if config.labels is None and not all(re.fullmatch("-?[0-9]+", cell) for cell in counts if cell):
            raise ConfigError(
                f"data.labels is missing: task=ordinal needs the labels in order; {place} has {some(list(counts), 10)} in "
                f"{config.label_column}. Numbers need no list."
            )
        return super().read_cells(place, counts, config)

    def labels_without_data(self, config: DataConfig) -> list[str]:
        numbers = [] if self.edges is None else [str(number) for number in range(1, len(self.edges) + 2)]
        return super().labels_without_data(config) or numbers

    def table_cells(self, answer: str, config: DataConfig) -> dict[str, Any]:
        if self.edges is None:
            return super().table_cells(answer, config)
        place = self.labels_without_data(config).index(answer)  # of a bin: the value at which it begins
        return {config.label_column: self.edges[place - 1] if place else self.edges[0] - 1}

    def bad_cells(
        self, place: str, cells: Sequence[str], rows: Sequence[int], labels: Sequence[str], config: DataConfig
    ) -> DataError:
        if self.edges is None:
            return super().bad_cells(place, cells, rows, labels, config)
        return DataError(f"{place}={cells[0]!r} at row {rows[0]}; expected a number ({len(rows)} bad rows: {some(rows)}).")

    # Training

    def n_outputs(self, n_labels: int) -> int:
        return n_labels - 1

    def val_metrics(self, n_labels: int) -> dict[str, dict[str, Any]]:
        kappa = {
            "_target_": "torchmetrics.classification.MulticlassCohenKappa",
            "num_classes": n_labels,
            "weights": "quadratic",
        }
        return {
            "quadratic_kappa": kappa,
            "mae": {"_target_": "torchmetrics.MeanAbsoluteError"},
            **super().val_metrics(n_labels),
        }

    # Answers

    def probs(self, logits: np.ndarray) -> np.ndarray:
        """As in :class:`sodaops.modeling.losses.OrdinalLoss`: logit k is of the chance above label k, given not below it."""
        above = np.cumprod(0.5 * (1 + np.tanh(0.5 * logits)), axis=-1)  # the logistic function, without overflow
        one, none = np.ones_like(above[:, :1]), np.zeros_like(above[:, :1])
        return np.concatenate([one, above], axis=-1) - np.concatenate([above, none], axis=-1)

    def torch_probs(self, logits: Any) -> Any:
        return logits.new_tensor(self.probs(logits.float().cpu().numpy()))

    def decide(self, probs: np.ndarray) -> np.ndarray:
        """The median of each distribution, int64 [n]."""
        return np.minimum((probs.cumsum(axis=1) < 0.5).sum(axis=1), probs.shape[1] - 1)

    def torch_answers(self, probs: Any) -> Any:
        return (probs.cumsum(-1) < 0.5).sum(-1).clamp(max=probs.shape[-1] - 1)

    def prediction(self, row: Sequence[float], labels: Sequence[str]) -> Prediction:
        best = int(self.decide(np.array([row]))[0])
        return Prediction(labels[best], row[best], dict(zip(labels, row, strict=True)))

    # Evaluation and the gate

    def purpose(self, names: str) -> str:
        return f"rates a text as one of these, in order: {names}"

    def measure(self, probs: np.ndarray, truth: np.ndarray, labels: Sequence[str], settings: EvaluateConfig) -> dict[str, Any]:
        (true, predicted), counts = np.unique(np.stack([truth, self.decide(probs)]), axis=1, return_counts=True)
        own = {name: float(value) for name, value in rank_metrics(true, predicted, counts, len(labels)).items()}
        blocks = [rank_metrics(true, predicted, draws, len(labels)) for draws in draw_counts(counts, settings.n_bootstrap)]
        intervals = {}
        for name in own:
            low, high = np.quantile(np.concatenate([block[name] for block in blocks]), [0.025, 0.975]).tolist()
            intervals[name] = {"low": low, "high": high}
        measured = super().measure(probs, truth, labels, settings)
        return {**measured, **own, "interval_95": intervals | measured["interval_95"]}

    def summary(self, probs: np.ndarray, truth: np.ndarray) -> dict[str, float]:
        ranks = rank_metrics(truth, self.decide(probs), np.ones(len(truth)), probs.shape[1])
        return {name: float(value) for name, value in ranks.items()} | super().summary(probs, truth)

    def distance(self, truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
        return np.abs(truth - predicted)

    def gains(self, truth: np.ndarray, challenger: np.ndarray, champion: np.ndarray, n_samples: int) -> np.ndarray:
        return paired_gains(
            truth, self.decide(challenger), self.decide(champion), challenger.shape[1], n_samples, metric=_kappa
        )

    def plots(self, probs: np.ndarray, table: "pa.Table", labels: Sequence[str], n_bins: int) -> list["Wanted"]:
        from sodaops.tasks import plots

        confusion, *others = super().plots(probs, table, labels, n_bins)
        return [confusion, plots.of_ranks(self.truth(table), self.decide(probs)), *others]


def _kappa(*cells: Any) -> np.ndarray:
    return rank_metrics(*cells)["quadratic_kappa"]


def _binned(edges: Sequence[float], config: DataConfig, cells: Sequence[str]) -> Targets:
    import pyarrow as pa

    labels = [str(label) for label in config.labels or range(1, len(edges) + 2)]
    if len(labels) != len(edges) + 1:
        raise ConfigError(f"task.edges has {len(edges)} values, for {len(edges) + 1} labels; data.labels has {len(labels)}.")
    values = np.array([_number(cell) for cell in cells])
    ids = np.where(np.isnan(values), -1, np.searchsorted(edges, values, side="right"))
    columns = {"label": pa.array(labels, pa.string()), "label_id": pa.array(np.arange(len(labels)), pa.int32())}
    return Targets(labels, ids.astype(np.int32), columns)


def _is_number(edge: object) -> bool:
    return isinstance(edge, int | float) and bool(np.isfinite(edge))


def _number(cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        return float("nan")
    return value if np.isfinite(value) else float("nan")
