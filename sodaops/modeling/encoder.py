"""The model: an encoder, a pooled sentence embedding and a head."""

import json
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig

from sodaops.config.extensions import accepts, build_subclass
from sodaops.data.pairs import template_of
from sodaops.errors import ConfigError

Pooling = Literal["mean", "cls"]
LINEAR = {"_target_": "sodaops.modeling.heads.LinearHead"}
_SECTION = "sodaops_section"  # attribute of an encoder that model.encoder built


class Pretrained(NamedTuple):
    """A pretrained encoder without a head, and its tokenizer."""

    transformer: nn.Module
    tokenizer: Any  # tokenizers.Tokenizer, without padding or truncation
    pad_token_id: int


class EncoderOutput(NamedTuple):
    """The output for a batch."""

    logits: Tensor  # float [n_examples, n_labels]
    embeddings: Tensor  # float [n_examples, hidden_size]


class TextEncoder(nn.Module):
    """Computes label logits and a sentence embedding from tokens.

    Args:
        transformer: an encoder of Hugging Face, or of ``model.encoder``.
        n_labels: the size of the output.
        pooling: ``mean`` over the tokens, or ``cls``, the first token's vector.
        dropout: of the embedding, before the head.
        head: its section of the configuration (:mod:`sodaops.modeling.heads`).
        separator: the token that ends the first part of a pair, see :func:`separator_of`; None: no token types are given.

    Raises:
        ConfigError: the head cannot be made.
    """

    def __init__(
        self,
        transformer: nn.Module,
        n_labels: int,
        pooling: Pooling = "mean",
        dropout: float = 0.1,
        head: Mapping[str, Any] = LINEAR,
        separator: int | None = None,
    ) -> None:
        super().__init__()
        self.separator = separator
        self.transformer = transformer
        self.n_labels = n_labels
        self.pooling = pooling
        self.dropout = nn.Dropout(dropout)
        self.head_section = dict(head)
        self.head = build_subclass("head", head, "torch.nn.Module", hidden_size=hidden_size_of(transformer), n_labels=n_labels)
        self._head_inputs = [name for name in ("hidden_states", "attention_mask") if accepts(self.head.forward, name)]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, windows: Tensor | None = None) -> EncoderOutput:
        """Computes a padded batch.

        Args:
            input_ids: int64 [n_rows, n_tokens]; a row is an example, or a window of one.
            attention_mask: int64 [n_rows, n_tokens], 1 for a token and 0 for padding.
            windows: int64 [n_examples, n_windows], the rows of each example, followed by -1; None: each row is an example.

        Returns:
            logits, float [n_examples, n_labels], and embeddings, float [n_examples, hidden_size].
        """
        types = {} if self.separator is None else {"token_type_ids": token_types(input_ids, self.separator)}
        # [n_rows, n_tokens, hidden_size]
        hidden = self.transformer(input_ids=input_ids, attention_mask=attention_mask, **types).last_hidden_state
        tokens = {"hidden_states": hidden, "attention_mask": attention_mask}
        if windows is not None:
            embeddings = pool_windows(hidden, attention_mask, windows, self.pooling)
            tokens = {name: by_example(x, windows).flatten(1, 2) for name, x in tokens.items() if name in self._head_inputs}
        else:
            embeddings = hidden[:, 0] if self.pooling == "cls" else mean_pool(hidden, attention_mask)
        logits = self.head(self.dropout(embeddings), **{name: tokens[name] for name in self._head_inputs})
        return EncoderOutput(logits, embeddings)


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


def pool_windows(hidden: Tensor, attention_mask: Tensor, windows: Tensor, pooling: Pooling) -> Tensor:
    """Mean over the tokens of all windows of an example, those that windows share counted in each; ``cls``: of the first ones.

    Of examples with one window, it is exactly what pooling of their rows gives.

    Args:
        hidden: float [n_rows, n_tokens, hidden_size].
        attention_mask: int64 [n_rows, n_tokens], 1 for a token and 0 for padding.
        windows: int64 [n_examples, n_windows], the rows of each example, followed by -1.
        pooling: as of :class:`TextEncoder`.

    Returns:
        float [n_examples, hidden_size].

    >>> hidden, mask = torch.tensor([[[2.0], [4.0]], [[9.0], [0.0]]]), torch.tensor([[1, 1], [1, 0]])
    >>> pool_windows(hidden, mask, torch.tensor([[0, 1]]), "mean")
    tensor([[5.]])
    """
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)  # [n_rows, n_tokens, 1]
    # Of each row, [n_rows, hidden_size] and [n_rows, 1].
    sums, counts = (hidden[:, 0], mask[:, 0]) if pooling == "cls" else ((hidden * mask).sum(1), mask.sum(1))
    return by_example(sums, windows).sum(1) / by_example(counts, windows).sum(1).clamp(min=1)


def by_example(rows: Tensor, windows: Tensor) -> Tensor:
    """The rows of each example, [n_examples, n_windows, ...], of rows [n_rows, ...]; zeros where ``windows`` is -1."""
    return torch.cat([rows, rows.new_zeros((1, *rows.shape[1:]))])[windows]


def token_types(input_ids: Tensor, separator: int) -> Tensor:
    """Token types of pairs, int64 as ``input_ids``: 0 up to the first separator, 1 after it.

    They are computed in the model, so that training, the ONNX graph and the checks of an export get the same ones.

    >>> token_types(torch.tensor([[101, 7, 102, 8, 102]]), 102).tolist()
    [[0, 0, 0, 1, 1]]
    """
    is_separator = (input_ids == separator).long()
    return (is_separator.cumsum(-1) - is_separator).clamp(max=1)


def separator_of(transformer: nn.Module, tokenizer: Any, n_columns: int) -> int | None:
    """The token that ends the first part of a pair, if tokenizer and encoder tell the parts apart by token types; else None."""
    n_types = getattr(getattr(transformer, "config", None), "type_vocab_size", 2)
    if n_columns != 2 or n_types < 2 or not accepts(transformer.forward, "token_type_ids"):
        return None
    return template_of(tokenizer).separator


def from_settings(settings: dict[str, Any]) -> nn.Module:
    """An encoder with random weights from its configuration, into which a bundle's weights are loaded.

    Args:
        settings: as :func:`settings_of` returns them, or the section ``model.encoder``.
    """
    if "_target_" in settings:
        encoder = build_subclass("model.encoder", settings, "torch.nn.Module")
        setattr(encoder, _SECTION, dict(settings))
        return encoder
    kind = settings["model_type"]
    return random_encoder(AutoConfig.for_model(kind, **{k: v for k, v in settings.items() if k != "model_type"}))


def random_encoder(settings: PretrainedConfig) -> nn.Module:
    """An encoder with random weights."""
    return without_pooler(lambda **kwargs: AutoModel.from_config(settings, dtype=torch.float32, **kwargs))


def without_pooler(make: Callable[..., Any]) -> Any:
    """Calls ``make`` with ``add_pooling_layer=False``, which encoders without a pooler, such as DistilBERT, do not take."""
    try:
        return make(add_pooling_layer=False)
    except TypeError:
        return make()


def settings_of(transformer: nn.Module) -> dict[str, Any]:
    """The encoder's configuration as JSON values, from which :func:`from_settings` builds it again."""
    if (section := getattr(transformer, _SECTION, None)) is not None:
        return section
    return json.loads(transformer.config.to_json_string(use_diff=False))


def hidden_size_of(transformer: nn.Module) -> int:
    """The width of an encoder's output: ``config.hidden_size``, or ``hidden_size``.

    Raises:
        ConfigError: it has neither.
    """
    width = getattr(getattr(transformer, "config", None), "hidden_size", getattr(transformer, "hidden_size", None))
    if not isinstance(width, int):
        raise ConfigError(f"model.encoder: {type(transformer).__name__} has no hidden_size; set it in the constructor.")
    return width
