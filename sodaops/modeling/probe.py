"""Checks a pretrained encoder and its tokenizer before any training, with two short batches.

What an encoder can do is measured rather than known from a list of architectures: how many tokens it takes, whether it ignores
padding, and whether its first token sees the others.
"""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from sodaops.config.model import ModelConfig
from sodaops.data.tokens import pad
from sodaops.errors import ConfigError, ModelError, SodaOpsError, joined, reason_of
from sodaops.modeling.encoder import Pretrained, TextEncoder
from sodaops.modeling.losses import Loss

log = logging.getLogger(__name__)
RARE = "\U00012000"  # a cuneiform sign, which hardly any vocabulary has
TEXT = f"A text with numbers (1234), an accent (é), an emoji (\U0001f642) and a rare sign ({RARE})."
_MAX_CHANGE = 1e-3  # of an embedding, relative to its largest value
_FEW = 16  # tokens


def check_pretrained(config: ModelConfig, pretrained: Pretrained, limit: int | None) -> None:
    """Runs a padded batch of ``model.max_tokens`` tokens, in evaluation mode; draws no random numbers.

    Args:
        config: conf/model.
        pretrained: the encoder and its tokenizer.
        limit: tokens of a text that the encoder's own configuration allows; None: any number.

    Raises:
        ModelError: the encoder or its tokenizer cannot be used.
        ConfigError: model.max_tokens or model.pooling does not suit the encoder.
    """
    name = name_of(config)
    transformer = pretrained.transformer
    faults: list[SodaOpsError] = []
    try:
        row = _encode(name, pretrained.tokenizer)
    except ModelError as error:
        faults.append(error)
        row = np.arange(3)
    else:
        faults += _limit_faults(config, len(pretrained.tokenizer.encode("").ids))
    faults += _vocabulary_faults(name, pretrained)
    if getattr(getattr(transformer, "config", None), "is_encoder_decoder", False):
        kind = type(transformer).__name__
        faults.append(ModelError(f"{name}: {kind} is an encoder-decoder; choose an encoder, such as BERT."))
    if not faults:
        with isolate_rng(include_cuda=False), torch.no_grad():
            model = TextEncoder(transformer, 2, config.pooling, dropout=0.0).eval()
            faults += _batch_faults(name, config, model, row, pretrained, limit)
            transformer.train()
    if faults:
        raise joined(faults)


def name_of(config: ModelConfig) -> str:
    """The key and value that name the encoder, for messages."""
    if config.encoder is not None:
        return f"model.encoder._target_={config.encoder['_target_']}"
    return f"model.name_or_path={config.name_or_path.partition('#')[0]}"


def check_head_and_loss(model: TextEncoder, loss: Loss, targets: np.ndarray, truth: np.ndarray) -> None:
    """Computes logits and loss of two made-up texts, with a model in training mode.

    The targets of the loss are float32 [2, ...], and the truth of its method ``validate`` [2, ...].

    No random numbers are drawn.

    Raises:
        ConfigError: a head that does not give a logit for each label, or a loss that does not give a finite scalar.
    """
    target, n_labels = f"head._target_={model.head_section['_target_']}", model.n_labels
    ids, mask = torch.ones(2, 3, dtype=torch.int64), torch.tensor([[1, 1, 1], [1, 1, 0]])
    with isolate_rng(include_cuda=False):
        try:
            with torch.no_grad():
                logits = model.eval()(ids, mask).logits
        except Exception as error:  # a user's head may raise anything
            raise ConfigError(f"{target} raised {type(error).__name__}: {reason_of(error)}") from error
        finally:
            model.train()
        if not (_is_finite(logits) and logits.shape == (2, n_labels)):
            raise ConfigError(
                f"{target}: expected finite logits, float [2, {n_labels}], for 2 texts, got {_described(logits)}."
            )
        try:
            value = loss(logits.requires_grad_(), torch.from_numpy(targets))
            if hasattr(loss, "validate"):
                loss.validate(logits.detach(), torch.from_numpy(truth))
        except Exception as error:  # a user's loss may raise anything
            raise ConfigError(
                f"loss: {type(loss).__name__} raised {type(error).__name__}: {reason_of(error)} (logits {[*logits.shape]}, "
                f"targets {[*targets.shape]}); choose a loss for the task."
            ) from error
    check_loss(value)


def check_loss(value: Any) -> None:
    """Refuses, as a ConfigError, what is no finite scalar that torch computed from the logits."""
    if not (_is_finite(value) and value.ndim == 0):
        raise ConfigError(f"loss: expected a finite scalar tensor, also where targets are 0, got {_described(value)}.")
    if not value.requires_grad:
        raise ConfigError("loss: no gradient reaches the logits; compute it with torch, without detach() and item().")


def _is_finite(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and bool(value.isfinite().all())


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{value.dtype} {list(value.shape)}" + ("" if value.isfinite().all() else " with nan or inf")


def _encode(name: str, tokenizer: Any) -> np.ndarray:
    """The token ids of a text with characters of many kinds, int64 [n_tokens]."""
    try:
        row, rare, empty = (tokenizer.encode(text).ids for text in (TEXT, RARE, ""))
    except BaseException as error:  # the tokenizer's Rust code may panic, which is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise ModelError(
            f"{name}: its tokenizer fails on characters that it does not know ({reason_of(error)}); choose a model whose "
            "tokenizer has an unknown token."
        ) from error
    if len(row) <= len(empty):
        raise ModelError(f"{name}: its tokenizer gives no tokens for {TEXT!r}; choose a model for texts of your language.")
    if len(rare) <= len(empty):
        log.warning("%s: its tokenizer drops characters that it does not know; a text of only these counts as empty", name)
    return np.array(row, dtype=np.int64)


def _limit_faults(config: ModelConfig, n_special: int) -> list[SodaOpsError]:
    """Faults of model.max_tokens and model.stride, given the number of special tokens of a text."""
    limit, usable = config.limit, config.max_tokens - n_special
    if usable < 1:
        more = f"{n_special} of them are special tokens; set model.max_tokens={n_special + 1} or more."
        return [ConfigError(f"model.max_tokens={limit.max_tokens}: a text or window has no place for words, as {more}")]
    if limit.stride >= usable:
        reason = f"a window has {usable} tokens besides the special ones; set model.stride below that"
        return [ConfigError(f"model.stride={limit.stride}: {reason}, or raise model.max_tokens.")]
    return []


def _vocabulary_faults(name: str, pretrained: Pretrained) -> list[SodaOpsError]:
    try:
        table = pretrained.transformer.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # an architecture of another kind; the batch shows whether it works
        return []
    largest = _largest_id(pretrained)
    if not isinstance(table, nn.Embedding) or largest < table.num_embeddings:
        return []
    return [
        ModelError(
            f"{name}: its tokenizer has token ids up to {largest}, its encoder only up to {table.num_embeddings - 1}. "
            f"Save it again after resize_token_embeddings({largest + 1}), or choose another model."
        )
    ]


def _largest_id(pretrained: Pretrained) -> int:
    return max(pretrained.pad_token_id, *pretrained.tokenizer.get_vocab(with_added_tokens=True).values())


def _batch_faults(
    name: str, config: ModelConfig, model: TextEncoder, row: np.ndarray, pretrained: Pretrained, limit: int | None
) -> list[SodaOpsError]:
    """Faults that a padded batch shows: ``row`` repeated to model.max_tokens, and its first tokens alone."""
    short = row[: min(_FEW, config.max_tokens // 2)]

    def embed(*rows: np.ndarray) -> Tensor:
        return model(*map(torch.from_numpy, pad(rows, pretrained.pad_token_id))).embeddings

    try:
        alone = embed(short)[0]
        embed(short, np.array([_largest_id(pretrained)]))
    except Exception as error:  # each architecture has errors of its own
        kind = type(model.transformer).__name__
        return [ModelError(f"{name}: {kind} cannot compute a batch of texts ({reason_of(error)}); choose another model.")]
    faults: list[SodaOpsError] = []
    n_tokens = _longest(embed, row, min(config.max_tokens, limit or config.max_tokens))
    if n_tokens < config.max_tokens:
        faults.append(
            ConfigError(
                f"model.max_tokens={config.max_tokens}: the encoder takes at most {n_tokens}; set model.max_tokens={n_tokens}."
            )
        )
    together = embed(np.resize(row, n_tokens), short)
    if not torch.isfinite(together).all():
        faults.append(ModelError(f"{name}: its output is not finite; choose a model with sound weights."))
    elif (change := _change(together[1], alone)) > _MAX_CHANGE:
        faults.append(
            ModelError(
                f"{name}: padding changes its output, by {change:.1%}, so a text's result would depend on the other texts in "
                "its batch; choose a model that applies the attention mask."
            )
        )
    if config.pooling == "cls" and not _sees_all(embed, row[:3]):
        faults.append(
            ConfigError(
                f"model.pooling=cls: the first token's vector does not depend on the other tokens in "
                f"{type(model.transformer).__name__}; set model.pooling=mean."
            )
        )
    return faults


def _sees_all(embed: Callable[..., Tensor], row: np.ndarray) -> bool:
    """Whether the embedding depends on more than the first token."""
    other = next(i for i in range(len(row) + 1) if i not in row)
    return _change(embed(row)[0], embed(np.array([row[0], *[other] * (len(row) - 1)]))[0]) > 0


def _longest(embed: Callable[..., Tensor], row: np.ndarray, n_tokens: int) -> int:
    """The most tokens of a text that the encoder computes, at most ``n_tokens``."""

    def fits(n: int) -> bool:
        try:
            embed(np.resize(row, n), row[:1])
        except Exception:  # each architecture has errors of its own
            return False
        return True

    if fits(n_tokens):
        return n_tokens
    low, high = 1, n_tokens  # it computes `low` tokens, and not `high`
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _change(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))
