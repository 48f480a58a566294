"""A metric for labels that are ordered."""

import torch
from torch import Tensor
from torchmetrics import Metric


class MeanDistance(Metric):
    """The mean distance between the predicted and the true label, in steps of the labels' order, to some power."""

    higher_is_better = False

    def __init__(self, power: float = 1.0) -> None:
        super().__init__()
        self.power = power
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("n_rows", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, probs: Tensor, label_ids: Tensor) -> None:
        self.total += (probs.argmax(-1) - label_ids).abs().pow(self.power).sum()
        self.n_rows += len(label_ids)

    def compute(self) -> Tensor:
        return self.total / self.n_rows
