"""AdamW with a learning rate for each layer, frozen layers, and the learning rate schedule."""

import math
import re
from collections.abc import Callable

import torch
from torch import nn

from sodaops.config.schema import OptimConfig
from sodaops.errors import ConfigError
from sodaops.modeling.encoder import TextEncoder

_LAYER = re.compile(r"\blayers?\.(\d+)\.")  # in parameter names: encoder.layer.2., layers.2.


def layer_of(name: str, n_layers: int) -> int:
    """The depth of a transformer parameter: 0 for embeddings, 1 to n_layers for layers, n_layers for what comes after them.

    >>> layer_of("encoder.layer.2.output.dense.weight", 6), layer_of("embeddings.word_embeddings.weight", 6)
    (3, 0)
    """
    layer = _LAYER.search(name)
    if layer:
        return int(layer[1]) + 1
    return 0 if "embed" in name else n_layers


def layers_of(transformer: nn.Module) -> list[nn.Module]:
    """The transformer's layers, lowest first."""
    return [module for name, module in transformer.named_modules() if _LAYER.search(f"{name}.") and name[-1].isdigit()]


def freeze(model: TextEncoder, n_layers: int | None) -> None:
    """Freezes the embeddings and the lowest layers, which also saves their backward pass.

    Args:
        model: changed in place.
        n_layers: the number of frozen layers, 0 for the embeddings alone; None: nothing is frozen.

    Raises:
        ConfigError: more layers than the encoder has.
    """
    if n_layers is None:
        return
    n_all = model.transformer.config.num_hidden_layers
    if n_layers > n_all:
        raise ConfigError(f"optim.frozen_layers={n_layers}: the encoder has {n_all}; expected null or 0 to {n_all}.")
    for name, parameter in model.transformer.named_parameters():
        if _LAYER.search(name) or "embed" in name:  # a norm after the layers is always trained
            parameter.requires_grad_(layer_of(name, n_all) > n_layers)


def parameter_groups(model: TextEncoder, config: OptimConfig) -> list[dict]:
    """Trained parameters grouped by learning rate and weight decay.

    A transformer layer at depth d of D has the rate ``lr * layer_decay ** (D - d)``, as in Howard and Ruder (2018,
    https://arxiv.org/abs/1801.06146); the head has ``head_lr``. Biases and norms, which have one dimension, do not decay.
    """
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
    """AdamW over :func:`parameter_groups`, fused unless a gradient scaler must unscale the gradients first."""
    return torch.optim.AdamW(parameter_groups(model, config), fused=fused)


def lr_factor(config: OptimConfig, n_steps: int) -> Callable[[int], float]:
    """The learning rate as a function of the step, as a factor of the maximum.

    It rises linearly during the warm-up, then follows the schedule: constant, or down to 0 at ``n_steps``, linearly or along
    a cosine.

    Args:
        config: with ``schedule``, and ``warmup``, the share of steps in the warm-up.
        n_steps: optimizer steps of the whole run.
    """
    n_warmup = max(1, round(config.warmup * n_steps))

    def factor(step: int) -> float:
        if step < n_warmup:
            return (step + 1) / n_warmup
        progress = min(1.0, (step - n_warmup) / max(1, n_steps - n_warmup))  # 0 after the warm-up, 1 at the end
        return {"linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress)), "constant": 1.0}[config.schedule]

    return factor
