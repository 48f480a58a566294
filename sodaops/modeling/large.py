"""Large encoders: LoRA adapters, gradient checkpointing, and a choice of the attention implementation."""

import contextlib
import hashlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sodaops.config.model import LoraConfig, ModelConfig
from sodaops.errors import ConfigError, nearest, reason_of, some

ALL = "all-linear"  # in model.lora.target_modules


def prepare(transformer: nn.Module, config: ModelConfig) -> None:
    """Adds what conf/model asks for to an encoder, in place; draws random numbers only for adapters.

    Raises:
        ConfigError: ``model.lora``, ``model.gradient_checkpointing`` or ``model.attention`` does not suit the encoder.
    """
    with attention(transformer, config.attention):  # a check; training sets it
        pass
    if config.gradient_checkpointing:
        try:
            transformer.activation_checkpointing_enable({"use_reentrant": False})
            transformer.disable_input_require_grads()  # only reentrant ones need it; frozen layers would have a backward pass
        except (AttributeError, ValueError) as error:
            raise ConfigError(
                f"model.gradient_checkpointing=true: {type(transformer).__name__} has none; set it to false."
            ) from error
    if config.lora is not None:
        add_adapters(transformer, config.lora)


@contextlib.contextmanager
def attention(transformer: nn.Module, name: str | None) -> Iterator[None]:
    """Uses an attention implementation in a block; None: the present one.

    Outside the block an encoder keeps the implementation that transformers chose, which runs on a CPU and can be exported.

    Raises:
        ConfigError: the encoder lacks it, or this machine does.
    """
    if name is None:
        yield
        return
    fault = f"model.attention={name}: not available for {type(transformer).__name__} here"
    if not hasattr(transformer, "set_attn_implementation"):
        raise ConfigError(f"{fault}; set model.attention=null.")
    before = transformer.config._attn_implementation
    try:
        transformer.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{fault} ({reason_of(error)}); set model.attention=null.") from error
    if transformer.config._attn_implementation != name:  # of some architectures transformers leaves it as it is
        raise ConfigError(f"{fault}: it has {before} only; set model.attention=null.")
    try:
        yield
    finally:
        transformer.set_attn_implementation(before)


def add_adapters(transformer: nn.Module, config: LoraConfig) -> None:
    """Adds LoRA adapters (Hu et al., 2021, https://arxiv.org/abs/2106.09685) in place, and freezes all other weights.

    Raises:
        ConfigError: a target matches no layer, or adapters cannot be added.
    """
    from peft import LoraConfig as Settings, inject_adapter_in_model  # takes 3 s

    targets = _targets(transformer, config.target_modules)
    settings = Settings(r=config.r, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets)
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # what peft adapts to GPT-2's layers by itself
            inject_adapter_in_model(settings, transformer)
    except (ValueError, RuntimeError, TypeError) as error:
        raise ConfigError(
            f"model.lora: {type(transformer).__name__} cannot have these adapters ({reason_of(error)})."
        ) from error


def _targets(transformer: nn.Module, given: list[str] | None) -> list[str]:
    """The names, or ends of the names, of the layers that get adapters."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    if given is None:
        given = DEFAULTS.get(getattr(getattr(transformer, "config", None), "model_type", ""), [ALL])
    if given == [ALL]:
        return linear
    names = [name for name, _ in transformer.named_modules()]
    for target in given:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            ends = sorted({name.rpartition(".")[2] for name in linear})
            raise ConfigError(
                f"model.lora.target_modules: {type(transformer).__name__} has no layer {target}{nearest(target, ends)}; it has "
                f"{some(ends, 40)}."
            )
    return given


def has_adapters(transformer: nn.Module) -> bool:
    """Whether adapters have been added and not yet merged."""
    return hasattr(transformer, "peft_config")


def merge_adapters(transformer: nn.Module) -> None:
    """Adds the adapters' products to the weights that they belong to, and removes them; nothing happens if there are none."""
    if not has_adapters(transformer):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(transformer.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            transformer.set_submodule(name, module.get_base_layer())
    del transformer.peft_config


def frozen_weights(module: nn.Module, transformer: nn.Module) -> dict[str, Tensor]:
    """The frozen parameters of a module whose encoder has adapters; of other modules none."""
    if not has_adapters(transformer):
        return {}
    return {name: tensor.detach() for name, tensor in module.named_parameters() if not tensor.requires_grad}


def adapter_signature(transformer: nn.Module) -> dict[str, Any]:
    """A hash of the frozen weights, which a checkpoint with adapters needs again; empty without adapters."""
    frozen = frozen_weights(transformer, transformer)
    hashes = {name: torch.hash_tensor(tensor).item() for name, tensor in frozen.items()}
    return {"the encoder's weights": hashlib.sha256(repr(hashes).encode()).hexdigest()} if frozen else {}
