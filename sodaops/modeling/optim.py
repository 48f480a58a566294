"""The optimizer, with a learning rate for each layer, its learning rate scheduler, and frozen layers."""

import math
import re
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from sodaops.config.extensions import accepts, build, load
from sodaops.config.schema import OptimConfig
from sodaops.errors import ConfigError
from sodaops.modeling.encoder import TextEncoder

_LAYER = re.compile(r"\blayers?\.(\d+)\.")  # in parameter names: encoder.layer.2., layers.2.
_BELOW = re.compile("embed|relative_attention_bias")  # MPNet's, which all layers use


def layer_of(name: str, n_layers: int) -> int:
    """The depth of a transformer parameter: 0 for embeddings, 1 to n_layers for layers, n_layers for what comes after them.

    >>> layer_of("encoder.layer.2.output.dense.weight", 6), layer_of("embeddings.word_embeddings.weight", 6)
    (3, 0)
    """
    layer = _LAYER.search(name)
    if layer:
        return int(layer[1]) + 1
    return 0 if _BELOW.search(name) else n_layers


def layers_of(transformer: nn.Module) -> list[nn.Module]:
    """The transformer's layers, lowest first."""
    return [m for name, m in transformer.named_modules() if _LAYER.search(f"{name}.") and name.rpartition(".")[2].isdigit()]


def n_layers_of(transformer: nn.Module) -> int:
    """The number of layers: of the encoder's configuration, else counted by the names of its modules."""
    return getattr(getattr(transformer, "config", None), "num_hidden_layers", None) or len(layers_of(transformer))


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
    n_all = n_layers_of(model.transformer)
    if n_layers > n_all:
        raise ConfigError(f"optim.frozen_layers={n_layers}: the encoder has {n_all}; expected null or 0 to {n_all}.")
    for name, parameter in model.transformer.named_parameters():
        if _LAYER.search(name) or _BELOW.search(name):  # a norm after the layers is always trained
            parameter.requires_grad_(layer_of(name, n_all) > n_layers)


def parameter_groups(model: TextEncoder, config: OptimConfig) -> list[dict]:
    """Trained parameters grouped by learning rate and weight decay.

    A transformer layer at depth d of D has the rate ``lr * layer_decay ** (D - d)``, as in Howard and Ruder (2018,
    https://arxiv.org/abs/1801.06146); the head has ``head_lr``. Biases and norms, which have one dimension, do not decay.
    """
    n_layers = n_layers_of(model.transformer)
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


def make_optimizer(groups: Sequence[dict[str, Any]], config: OptimConfig, scaled: bool = False) -> Optimizer:
    """The optimizer of ``optim.optimizer``.

    Args:
        groups: as :func:`parameter_groups` returns them.
        config: with ``optimizer``, and ``lr`` and ``weight_decay``, which the groups replace.
        scaled: whether a gradient scaler must unscale the gradients; without one, an optimizer that can be fused is.

    Raises:
        ConfigError: it cannot be made, or does not use ``optim.weight_decay``.
    """
    section, key = config.optimizer, "optim.optimizer"
    target, offered = load(f"{key}._target_", section["_target_"]), {"lr": config.lr, "weight_decay": config.weight_decay}
    if not section.keys() & {"fused", "foreach", "differentiable"}:  # these exclude each other
        offered["fused"] = not scaled
    more = {name: value for name, value in offered.items() if accepts(target, name)}
    optimizer = build(key, section, list(groups), kind=Optimizer, **more)
    if config.weight_decay and "weight_decay" not in optimizer.defaults:
        raise ConfigError(
            f"optim.weight_decay={config.weight_decay:g}: {section['_target_']} has no weight decay; set optim.weight_decay=0."
        )
    return optimizer


def make_scheduler(optimizer: Optimizer, config: OptimConfig, n_steps: int | None) -> LRScheduler | None:
    """The scheduler of ``optim.scheduler``.

    It gets the number of steps, as ``total_steps``, ``T_max`` or ``num_training_steps``, and the groups' learning rates, as
    ``max_lr``, where it takes them and its section does not give them.

    Args:
        optimizer: of :func:`make_optimizer`.
        config: with ``scheduler``; None: the learning rates are constant.
        n_steps: optimizer steps of the whole run; None: not known.

    Raises:
        ConfigError: it cannot be made.
    """
    if (section := config.scheduler) is None:
        return None
    target = load("optim.scheduler._target_", section["_target_"])
    offered: dict[str, Any] = {"max_lr": [group["lr"] for group in optimizer.param_groups]}
    if n_steps is not None:
        offered |= dict.fromkeys(("total_steps", "T_max", "num_training_steps"), n_steps)
    more = {name: value for name, value in offered.items() if name not in section and accepts(target, name)}
    return build("optim.scheduler", section, optimizer, kind=LRScheduler, **more)


def warmup_schedule(
    optimizer: Optimizer, total_steps: int | None = None, warmup: float = 0.1, decay: str = "linear"
) -> LambdaLR:
    """The learning rate rises linearly during the warm-up, then stays constant, or goes down to 0, linearly or along a cosine.

    Args:
        optimizer: whose learning rates are the highest ones.
        total_steps: optimizer steps of the whole run.
        warmup: share of the steps in the warm-up.
        decay: linear, cosine or constant.

    Raises:
        ValueError: another ``decay`` or ``warmup``, or no ``total_steps``, which all but ``constant`` need.
    """
    if decay not in ("linear", "cosine", "constant") or not 0 <= warmup < 1:
        raise ValueError(f"decay={decay}, warmup={warmup}: expected linear, cosine or constant, and a share from 0 below 1")
    if total_steps is None and decay != "constant":
        raise ValueError(f"decay={decay} needs the number of steps; set trainer.max_epochs or trainer.max_steps")
    n_steps = total_steps or 1
    n_warmup = max(1, round(warmup * n_steps))

    def factor(step: int) -> float:
        if step < n_warmup:
            return (step + 1) / n_warmup
        progress = min(1.0, (step - n_warmup) / max(1, n_steps - n_warmup))  # 0 after the warm-up, 1 at the end
        return {"linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress)), "constant": 1.0}[decay]

    return LambdaLR(optimizer, factor)
