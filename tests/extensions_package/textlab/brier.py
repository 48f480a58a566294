"""A loss: the Brier score."""

from torch import Tensor, nn


class BrierLoss(nn.Module):
    """Squared difference of probabilities and targets, summed over the labels, mean over the batch."""

    def __init__(self, class_weights: Tensor | None = None, scale: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("class_weights", class_weights)
        self.scale = scale

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        terms = (logits.softmax(-1) - targets) ** 2  # [n_examples, n_labels]
        return self.scale * (terms if self.class_weights is None else terms * self.class_weights).sum(-1).mean()
