"""Metrics of the user's own: classes of torchmetrics, or derived from its Metric."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.metric import jit_distributed_available

from sodaops.config.extensions import accepts, build_subclass, load
from sodaops.errors import ConfigError, reason_of
from sodaops.tasks.base import Task
from sodaops.tasks.make import SINGLE_LABEL

_MAX_ROWS = 1000  # of the batch that each metric is tried on


class OwnMetrics(nn.Module):
    """The metrics of the section ``metrics``. Each is tried on a small batch when it is made.

    Args:
        sections: name -> the metric's class and its arguments; ``num_classes`` or ``num_labels`` is added where it
            takes one.
        n_labels: number of labels.
        task: makes the batch.

    Raises:
        ConfigError: a metric that cannot be made, raises an error, as one for another task does, or gives no single number.
    """

    def __init__(self, sections: Mapping[str, dict[str, Any]], n_labels: int, task: Task = SINGLE_LABEL) -> None:
        super().__init__()
        self._targets = {name: section["_target_"] for name, section in sections.items()}
        self._metrics = nn.ModuleList(_make(f"metrics.{name}", section, n_labels) for name, section in sections.items())
        n_rows = min(max(2, n_labels), _MAX_ROWS)
        eye, truth = torch.eye(n_rows, task.n_outputs(n_labels)), torch.from_numpy(task.any_truth(n_rows, n_labels))
        values = []
        with warnings.catch_warnings():  # such as that there are few rows
            warnings.simplefilter("ignore")
            for logits in (eye, -eye, torch.ones_like(eye))[: 3 if truth.ndim > 1 else 1]:
                self.update(task.torch_probs(logits), truth)
                values.append(self.compute())
        # Metrics for one label per text take answers with several labels for something else, without an error.
        for name, value in values[0].items():
            if len(values) > 1 and all(float(value) == float(of[name]) for of in values):
                fault = f"{self._targets[name]} is {float(value):g} for right and wrong answers alike"
                raise ConfigError(f"metrics.{name}: {fault}; choose a metric for task={task.name}.")

    def update(self, probs: Tensor, truth: Tensor) -> None:
        """Counts a batch.

        Args:
            probs: float [n_examples, n_labels].
            truth: as the task reads it, such as label ids, int64 [n_examples].
        """
        probs = probs[:, 0] if probs.shape[1:] == (1,) and truth.ndim == 1 else probs  # numbers, as metrics expect them
        for name, metric in zip(self._targets, self._metrics, strict=True):
            self._call(name, metric.update, probs, truth)

    def compute(self, synced: bool = False) -> dict[str, Tensor]:
        """Name -> float, a scalar, over all batches since the last call.

        Args:
            synced: count those of all processes of a training, which must all call it; else of this process alone.
        """
        for metric in self.modules():
            if isinstance(metric, Metric):
                metric.distributed_available_fn = jit_distributed_available if synced else _never
        values = {}
        for name, metric in zip(self._targets, self._metrics, strict=True):
            value = values[name] = self._call(name, metric.compute)
            if not isinstance(value, Tensor) or value.numel() != 1:
                given = f"a tensor of shape {[*value.shape]}" if isinstance(value, Tensor) else type(value).__name__
                raise ConfigError(f"metrics.{name}: {self._targets[name]} gives {given}; expected a tensor with one number.")
            metric.reset()
        return values

    def _call(self, name: str, method: Any, *arguments: Tensor) -> Any:
        try:
            return method(*arguments)
        except Exception as error:  # a user's class may raise anything
            raise ConfigError(
                f"metrics.{name}: {self._targets[name]} raised {type(error).__name__}: {reason_of(error)}. A metric "
                "gets the task's answers and targets: of one label per text probabilities, float [n_examples, n_labels], and "
                "label ids, int64 [n_examples]."
            ) from error


def _never() -> bool:
    return False


def _make(key: str, section: dict[str, Any], n_labels: int) -> Metric:
    kind = load(f"{key}._target_", section["_target_"])
    offered = {name: n_labels for name in ("num_classes", "num_labels") if name not in section and accepts(kind, name)}
    return build_subclass(key, section, "torchmetrics.Metric", **offered)
