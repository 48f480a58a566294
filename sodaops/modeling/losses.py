"""Losses (conf/loss).

``loss(logits, targets)``, both float [n_examples, n_labels], gives a scalar, the mean over the examples. The rows of targets
sum to 1: they mix labels and votes (``optim.vote_weight``). ``val/loss`` is the mean over val of the loss, or, where it has a
method ``validate(logits, label_ids)``, which gives float [n_examples], the mean of that.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sodaops.config.extensions import build
from sodaops.errors import ConfigError

Loss = Callable[[Tensor, Tensor], Tensor]


class CrossEntropyLoss(nn.Module):
    """Cross-entropy against target distributions; ``label_smoothing`` is the share that is distributed over all labels."""

    def __init__(self, class_weights: Tensor | None = None, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss, a scalar."""
        return F.cross_entropy(logits, targets, weight=self.class_weights, label_smoothing=self.label_smoothing)

    def validate(self, logits: Tensor, label_ids: Tensor) -> Tensor:
        """The log loss of each example's label, without weights and smoothing, so that runs can be compared."""
        return F.cross_entropy(logits, label_ids, reduction="none")


class FocalLoss(nn.Module):
    """Focal loss, Lin et al. (2017, https://arxiv.org/abs/1708.02002): examples that are already right count less.

    With weight w, target t and probability p of each label it is the sum of ``-w t (1 - p)^gamma log p``.
    """

    def __init__(self, class_weights: Tensor | None = None, gamma: float = 2.0) -> None:
        super().__init__()
        if gamma < 0:
            raise ValueError(f"gamma={gamma}; expected 0 or more")
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.gamma = gamma

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss, a scalar."""
        log_probs = torch.log_softmax(logits, -1)
        factors = (1 - log_probs.exp()).clamp(min=1e-6).pow(self.gamma)  # at 0 a root has no finite slope
        terms = -targets * factors * log_probs
        return (terms if self.class_weights is None else terms * self.class_weights).sum(-1).mean()


class BinaryCrossEntropyLoss(nn.Module):
    """Binary cross-entropy of each label, for texts with any number of labels.

    ``class_weights`` are the weights of texts that have a label, float [n_labels]; of the others it is 1.
    """

    def __init__(self, class_weights: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean over texts and labels, a scalar."""
        return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=self.class_weights)

    def validate(self, logits: Tensor, truth: Tensor) -> Tensor:
        """The loss of each example, without weights, so that runs can be compared."""
        return F.binary_cross_entropy_with_logits(logits, truth.to(logits.dtype), reduction="none").mean(-1)


class OrdinalLoss(nn.Module):
    """Cross-entropy of ordered labels under conditional chances (CORN, Shi et al. 2021, https://arxiv.org/abs/2111.08851).

    Of K labels there are K - 1 logits: logit k is of the chance that a label is above k, given that it is not below k. The
    loss of an example is ``-sum_c target_c log p_c``; the targets may be votes.
    """

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss, a scalar, of logits float [n_examples, n_labels - 1] and targets float [n_examples, n_labels]."""
        above, stays = F.logsigmoid(logits).cumsum(-1), F.logsigmoid(-logits)
        # log p_c = log P(above each of the labels below c) + log P(not above c); the last label has no second term
        reached = F.pad(above, (1, 0))
        return -(targets * (reached + F.pad(stays, (0, 1)))).sum(-1).mean()


def make_loss(section: Mapping[str, Any], balanced: Callable[[], Tensor]) -> Loss:
    """The loss of a section; ``class_weights: balanced`` in it becomes ``balanced()``, float [n_labels], and ``none`` None.

    Raises:
        ConfigError: it cannot be made, is no callable, or has parameters of its own.
    """
    own, given, target = dict(section), {}, f"loss._target_={section['_target_']}"
    if "class_weights" in own:
        chosen = own.pop("class_weights")
        if chosen not in ("none", None, "balanced"):
            raise ConfigError(f"loss.class_weights={chosen!r}: expected none or balanced.")
        given = {"class_weights": balanced() if chosen == "balanced" else None}
    loss = build("loss", own, **given)
    if not callable(loss):
        raise ConfigError(f"{target}: expected a callable(logits, targets), got {type(loss).__name__}.")
    if isinstance(loss, nn.Module) and any(True for _ in loss.parameters()):
        raise ConfigError(f"{target}: it has parameters, which nothing would train; use buffers.")
    return loss
