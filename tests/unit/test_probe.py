"""Encoders of many architectures, and what is refused before a training."""

import random

import numpy as np
import pytest

from sodaops.errors import ConfigError, ModelError
from tests.conftest import configured, lazy

encoder_module = lazy("sodaops.modeling.encoder")
pretrained_module = lazy("sodaops.modeling.pretrained")
probe = lazy("sodaops.modeling.probe")
torch = lazy("torch")
transformers = lazy("transformers")

VOCABULARY = {"vocab_size": 300}
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, **VOCABULARY}
PADDED = {**SMALL, "pad_token_id": 1, "max_position_embeddings": 34}  # two positions are not for tokens
PLAIN = {**SMALL, "pad_token_id": 0, "max_position_embeddings": 32}
BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
RELATIVE = {"relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, **VOCABULARY}
XLNET = {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16, **VOCABULARY}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, **VOCABULARY}


@pytest.fixture(scope="module")
def byte_level():
    """A tokenizer with a token for every byte."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<s>", "<pad>", "</s>", *alphabet]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return tokenizer


def word_level(unknown=None):
    """A tokenizer that knows four words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", "A", "text", "with", "numbers"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=unknown or "missing"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def encoder(kind, settings):
    torch.manual_seed(0)
    return encoder_module.random_encoder(transformers.AutoConfig.for_model(kind, **settings)).train()


def check(transformer, tokenizer, *overrides, limit=None):
    probe.check_pretrained(configured(*overrides).model, encoder_module.Pretrained(transformer, tokenizer, 1), limit)


@pytest.mark.parametrize(("kind", "settings", "n_positions"), [
    ("bert", PLAIN, 32),
    ("albert", {**PLAIN, "embedding_size": 8}, 32),
    ("roberta", PADDED, 32),
    ("mpnet", PADDED, 32),
    ("longformer", {**PADDED, "attention_window": 8}, 32),
    ("gpt2", GPT2, 32),
    ("distilbert", {**VOCABULARY, "dim": 16, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 32}, 32),
    ("deberta-v2", {**PLAIN, **RELATIVE}, None),
    ("modernbert", {**PLAIN, "local_attention": 8}, None),
    ("qwen2", {**PLAIN, "num_key_value_heads": 1}, None),
    ("xlnet", XLNET, None),
])  # fmt: skip
def test_the_limit_of_tokens_is_measured(kind, settings, n_positions, byte_level):
    transformer = encoder(kind, settings)
    check(transformer, byte_level, "model.max_tokens=32")
    if n_positions is None:
        check(transformer, byte_level, "model.max_tokens=40")
    else:
        with pytest.raises(ConfigError, match=rf"model\.max_tokens=40: .*; set model\.max_tokens={n_positions}\."):
            check(transformer, byte_level, "model.max_tokens=40")
    with pytest.raises(ConfigError, match=r"set model\.max_tokens=20\."):
        check(transformer, byte_level, "model.max_tokens=32", limit=20)
    assert transformer.training


@pytest.mark.parametrize(("kind", "settings", "pooling", "error", "cause"), [
    ("bart", {**BART, **VOCABULARY}, "mean", ModelError, "BartModel is an encoder-decoder"),
    ("t5", T5, "mean", ModelError, "T5Model is an encoder-decoder"),
    ("gpt2", GPT2, "cls", ConfigError, "model.pooling=mean"),
    ("qwen2", {**PLAIN, "num_key_value_heads": 1}, "cls", ConfigError, "model.pooling=mean"),
    ("fnet", PLAIN, "mean", ModelError, "padding"),  # takes no attention mask
    ("bert", {**PLAIN, "vocab_size": 258}, "mean", ModelError, r"258.* 257.*resize_token_embeddings\(259\)"),
])  # fmt: skip
def test_encoders_that_cannot_classify(kind, settings, pooling, error, cause, byte_level):
    with pytest.raises(error, match=cause) as raised:
        check(encoder(kind, settings), byte_level, f"model.pooling={pooling}", "model.max_tokens=16")
    assert "\n" not in str(raised.value) and "\x1b" not in str(raised.value)


def test_an_encoder_that_takes_padding_for_words(byte_level):
    transformer = encoder("bert", PLAIN)
    forward = transformer.forward
    transformer.forward = lambda input_ids, attention_mask: forward(input_ids=input_ids)
    with pytest.raises(ModelError, match="padding"):
        check(transformer, byte_level, "model.max_tokens=32")


def test_weights_that_are_not_finite(byte_level):
    transformer = encoder("bert", PLAIN)
    transformer.embeddings.position_embeddings.weight.data[31] = float("nan")  # of the longest text only
    check(transformer, byte_level, "model.max_tokens=31")
    with pytest.raises(ModelError, match="finite"):
        check(transformer, byte_level, "model.max_tokens=32")


def test_tokenizers_without_an_unknown_token(caplog):
    check(encoder("bert", PLAIN), word_level("[UNK]"), "model.max_tokens=32")
    with pytest.raises(ModelError, match="tokenizer"):
        check(encoder("bert", PLAIN), word_level(), "model.max_tokens=32")
    with pytest.raises(ModelError) as raised:
        check(encoder("t5", T5), word_level(), "model.max_tokens=32")
    assert "T5Model" in str(raised.value) and "tokenizer" in str(raised.value)


def test_a_tokenizer_that_drops_what_it_does_not_know(caplog):
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.BPE({"A": 0, "t": 1, "x": 2}, []))
    check(encoder("bert", PLAIN), tokenizer, "model.max_tokens=32")
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "tokenizer" in caplog.text
    with pytest.raises(ModelError, match="tokenizer"):
        check(encoder("bert", PLAIN), Tokenizer(models.BPE({"Z": 0}, [])), "model.max_tokens=32")


def test_no_random_number_is_drawn(byte_level):
    transformer = encoder("bert", PLAIN)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    check(transformer, byte_level, "model.max_tokens=32")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]


def test_a_limit_of_minus_one_is_none(tmp_path, byte_level):
    encoder("xlnet", XLNET).save_pretrained(tmp_path)
    names = {"pad_token": "<pad>", "unk_token": "<s>", "model_max_length": -1}
    transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level, **names).save_pretrained(tmp_path)
    assert (
        pretrained_module.load_pretrained(
            configured(f"model.name_or_path={tmp_path}", "model.max_tokens=64").model
        ).pad_token_id
        == 1
    )
