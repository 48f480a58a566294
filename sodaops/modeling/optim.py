"""AdamW with layer-wise learning rates, and the schedule."""

import math
import re
from collections.abc import Callable

import torch
from torch import nn

from sodaops.config.schema import OptimConfig
from sodaops.errors import ConfigError
from sodaops.modeling.encoder import TextEncoder

_LAYER = re.compile(r"\blayers?\.(\d+)\.")


def layer_of(name: str, n_layers: int) -> int:
    """The depth of a transformer parameter: 0 for embeddings, 1 to n_layers, n_layers for what comes after them.

    >>> layer_of("encoder.layer.2.output.dense.weight", 6), layer_of("embeddings.word_embeddings.weight", 6)
    (3, 0)
    """
    found = _LAYER.search(name)
    if found:
        return int(found[1]) + 1
    return 0 if "embed" in name else n_layers


def layers_of(transformer: nn.Module) -> list[nn.Module]:
    """The transformer's layers, the lowest first."""
    return [module for name, module in transformer.named_modules() if _LAYER.search(f"{name}.") and name[-1].isdigit()]


def freeze(model: TextEncoder, n_layers: int | None) -> None:
    """Keeps the embeddings and the lowest layers as they are; what lies below the lowest trained layer needs no backward.

    Args:
        model: changed in place.
        n_layers: layers above the embeddings; None: nothing is frozen.

    Raises:
        ConfigError: more layers than the encoder has.
    """
    if n_layers is None:
        return
    n_all = model.transformer.config.num_hidden_layers
    if n_layers > n_all:
        raise ConfigError(f"optim.frozen_layers={n_layers}: the encoder has {n_all}; expected null or 0 to {n_all}.")
    for name, parameter in model.transformer.named_parameters():
        if _LAYER.search(name) or "embed" in name:  # what comes after the layers is trained
            parameter.requires_grad_(layer_of(name, n_all) > n_layers)


def parameter_groups(model: TextEncoder, config: OptimConfig) -> list[dict]:
    """Trained parameters grouped by learning rate and decay: no decay on biases and norms (tensors of one dimension)."""
    n_layers = model.transformer.config.num_hidden_layers
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith("transformer."):
            depth = layer_of(name.removeprefix("transformer."), n_layers)
            lr = config.lr * config.layer_decay ** (n_layers - depth)
        else:
            lr = config.head_lr
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((lr, decay), []).append(parameter)
    return [{"params": group, "lr": lr, "weight_decay": decay} for (lr, decay), group in groups.items()]


def make_optimizer(model: TextEncoder, config: OptimConfig, fused: bool = True) -> torch.optim.AdamW:
    """AdamW over :func:`parameter_groups`, in its fused form unless something must see the gradients unscaled."""
    return torch.optim.AdamW(parameter_groups(model, config), fused=fused)


def lr_factor(config: OptimConfig, n_steps: int) -> Callable[[int], float]:
    """The learning rate's factor at a step: a linear rise over the warm-up, then the schedule, down to 0 at n_steps.

    Args:
        config: schedule and share of warm-up.
        n_steps: optimizer steps of the whole run.
    """
    n_warmup = max(1, round(config.warmup * n_steps))

    def factor(step: int) -> float:
        if step < n_warmup:
            return (step + 1) / n_warmup
        done = min(1.0, (step - n_warmup) / max(1, n_steps - n_warmup))
        return {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0}[config.schedule]

    return factor
