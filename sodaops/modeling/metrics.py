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

_MAX_ROWS = 1000  # of the batch that each metric is tried on


class OwnMetrics(nn.Module):
    """The metrics of the section ``metrics``. Each is tried on a small batch when it is made.

    Args:
        sections: name -> the metric's class and its arguments; ``num_classes`` is added where the class takes it.
        n_labels: number of labels.

    Raises:
        ConfigError: a metric that cannot be made, raises an error, as one for another task does, or gives no single number.
    """

    def __init__(self, sections: Mapping[str, dict[str, Any]], n_labels: int) -> None:
        super().__init__()
        self._targets = {name: section["_target_"] for name, section in sections.items()}
        self._metrics = nn.ModuleList(_make(f"metrics.{name}", section, n_labels) for name, section in sections.items())
        n_rows = min(n_labels, _MAX_ROWS)
        with warnings.catch_warnings():  # such as that there are few rows
            warnings.simplefilter("ignore")
            self.update(torch.eye(n_rows, n_labels).softmax(-1), torch.arange(n_rows))
            self.compute()

    def update(self, probs: Tensor, label_ids: Tensor) -> None:
        """Counts a batch.

        Args:
            probs: float [n_examples, n_labels].
            label_ids: int64 [n_examples].
        """
        for name, metric in zip(self._targets, self._metrics, strict=True):
            self._call(name, metric.update, probs, label_ids)

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
                "gets probabilities, float [n_examples, n_labels], and label ids, int64 [n_examples]."
            ) from error


def _never() -> bool:
    return False


def _make(key: str, section: dict[str, Any], n_labels: int) -> Metric:
    offers = accepts(load(f"{key}._target_", section["_target_"]), "num_classes") and "num_classes" not in section
    return build_subclass(key, section, "torchmetrics.Metric", **({"num_classes": n_labels} if offers else {}))
