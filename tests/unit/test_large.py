"""LoRA adapters, gradient checkpointing and attention implementations, on small encoders of several architectures."""

import copy

import numpy as np
import pytest

from sodaops.errors import ConfigError
from tests.conftest import configured, lazy
from tests.unit.test_probe import PADDED, PLAIN, VOCABULARY, encoder

datamodule = lazy("sodaops.data.datamodule")
encoder_module = lazy("sodaops.modeling.encoder")
large = lazy("sodaops.modeling.large")
optim_module = lazy("sodaops.modeling.optim")
torch = lazy("torch")

DISTILBERT = {**VOCABULARY, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 16, "max_position_embeddings": 32}
BERT = {**PLAIN, "num_hidden_layers": 2}
LORA = "model.lora={r: 2, alpha: 8, dropout: 0.1}"


def own_encoder():
    """An encoder that is none of transformers'."""
    own = torch.nn.Module()
    own.table, own.first, own.second = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    return own


def prepared(transformer, *overrides):
    large.prepare(transformer, configured(*overrides).model)
    return transformer


def batch():
    ids = torch.arange(3, 27).reshape(3, 8)
    return ids, (ids % 8 < 6).long()


def embed(transformer):
    ids, mask = batch()
    return transformer(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]


@pytest.mark.parametrize(("kind", "settings", "targets", "n_layers"), [
    ("bert", BERT, "", 4),  # query and value
    ("bert", BERT, "dense", 6),
    ("bert", BERT, "[query, layer.1.output.dense]", 3),
    ("distilbert", DISTILBERT, "", 12),
    ("mpnet", PADDED, "all-linear", 6),
    ("modernbert", {**PLAIN, "local_attention": 8}, "", 4),
    ("gpt2", {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, **VOCABULARY}, "all-linear", 4),
])  # fmt: skip
def test_adapters_are_trained_alone_and_merged(kind, settings, targets, n_layers):
    plain = encoder(kind, settings).eval()
    before, names = embed(plain), plain.state_dict().keys()
    described = encoder_module.settings_of(plain)
    adapted = prepared(plain, LORA, *([f"+model.lora.target_modules={targets}"] if targets else []))
    assert adapted is plain and torch.equal(embed(adapted), before)  # an adapter's second matrix is 0 at first
    model = encoder_module.TextEncoder(adapted, 3)
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    assert sum("lora_" in name for name in trained) == 2 * n_layers
    assert {name for name in trained if "lora_" not in name} == {"head.weight", "head.bias"}
    in_groups = [one for group in optim_module.parameter_groups(model, configured().optim) for one in group["params"]]
    assert {id(one) for one in in_groups} == {id(one) for one in trained.values()}
    for one in trained.values():
        torch.nn.init.normal_(one, std=0.5)
    with torch.no_grad():
        changed = embed(adapted.eval())
        large.merge_adapters(adapted)
        assert (changed - before).abs().max() > 0.01
        torch.testing.assert_close(embed(adapted), changed, atol=1e-5, rtol=1e-4)
    assert adapted.state_dict().keys() == names and encoder_module.settings_of(adapted) == described
    large.merge_adapters(adapted)  # there are none


def test_an_encoder_of_ones_own_gets_adapters():
    own = prepared(own_encoder(), "model.lora={r: 64}")  # above the layers' width
    assert {name for name, one in own.named_parameters() if one.requires_grad} == {
        f"{layer}.lora_{matrix}.default.weight" for layer in ("first", "second") for matrix in "AB"
    }


@pytest.mark.parametrize(("overrides", "cause"), [
    (["model.lora={target_modules: [query, valeu]}"], r"model\.lora\.target_modules: BertModel .* valeu .* has dense, key, "),
    (["model.lora={target_modules: [uery]}"], r"model\.lora\.target_modules: BertModel .*uery"),
    (["model.lora={target_modules: LayerNorm}"], r"model\.lora: BertModel .*LayerNorm"),
    (["model.attention=flash_attention_2"], r"model\.attention=flash_attention_2: .*BertModel"),
])  # fmt: skip
def test_settings_that_the_encoder_cannot_have(overrides, cause):
    with pytest.raises(ConfigError, match=cause) as raised:
        prepared(encoder("bert", BERT), *overrides)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("override", "kind"), [
    ("model.attention=sdpa", "mpnet"), ("model.attention=sdpa", None), ("model.gradient_checkpointing=true", None),
])  # fmt: skip
def test_encoders_without_a_choice(override, kind):
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        prepared(encoder(kind, PADDED) if kind else own_encoder(), override)
    if kind:
        prepared(encoder(kind, PADDED), "model.attention=eager")  # which it has


@pytest.mark.parametrize(("overrides", "keys"), [
    (["model.lora={}", "optim.frozen_layers=1"], ("model.lora", "optim.frozen_layers")),
    (["model.lora={}", "trainer=fsdp"], ("model.lora", "trainer.strategy=fsdp")),
    (["model.lora={r: 0}"], ("model.lora.r",)),
    (["model.lora={alpha: 0}"], ("model.lora.alpha",)),
    (["model.lora={rank: 8}"], ("model.lora.rank",)),
    (["model.lora={target_modules: []}"], ("model.lora.target_modules",)),
    (["model.attention=flash"], ("model.attention", "flash_attention_2")),
    (["optim.batch_texts=64", "trainer.accumulate_grad_batches=2"], ("optim.batch_texts", "trainer.accumulate_grad_batches")),
])  # fmt: skip
def test_contradictions_and_wrong_values(overrides, keys):
    with pytest.raises(ConfigError) as raised:
        configured(*overrides)
    assert all(key in str(raised.value) for key in keys)


def gradients(transformer):
    torch.manual_seed(1)  # of dropout
    embed(transformer).pow(2).sum().backward()
    return {name: one.grad for name, one in transformer.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("more", [[], [LORA], ["model.attention=eager"]], ids=["all", "lora", "eager"])
def test_gradient_checkpoints_change_no_gradient(more):
    plain = encoder("bert", BERT)
    other = copy.deepcopy(plain)
    torch.manual_seed(2)
    expected = gradients(prepared(plain, *[text for text in more if "lora" in text]))
    torch.manual_seed(2)
    prepared(other, *more, "model.gradient_checkpointing=true")
    calls = []
    other.encoder.layer[0].attention.register_forward_pre_hook(lambda *_: calls.append(0))
    with large.attention(other, "eager" if "model.attention=eager" in more else None):
        actual = gradients(other)
    assert len(calls) == 2 and other.config._attn_implementation == "sdpa"  # forward, and again in the backward pass
    assert actual.keys() == expected.keys() and actual
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-5, rtol=1e-4)


def test_frozen_layers_of_mpnet_have_no_backward_pass():
    model = encoder_module.TextEncoder(encoder("mpnet", PADDED), 2)
    optim_module.freeze(model, 1)
    assert [name for name, one in model.named_parameters() if one.requires_grad] == ["head.weight", "head.bias"]


@pytest.mark.parametrize(("overrides", "n_processes", "expected"), [
    ([], 1, 1), (["trainer.accumulate_grad_batches=3"], 1, 3),
    (["optim.batch_texts=64"], 1, 4), (["optim.batch_texts=64"], 2, 2), (["optim.batch_texts=3"], 1, 1),
])  # fmt: skip
def test_batches_are_accumulated_to_a_number_of_texts(overrides, n_processes, expected):
    """160 texts of 8 tokens, 16 in a batch of 128 tokens."""
    config = configured("optim.batch_tokens=128", *overrides)
    data = datamodule.TextDataModule(config, None, 0, ["a", "b"])
    offsets, truth = np.arange(161) * 8, np.zeros(160, np.int64)
    tokens = np.ones(1280, np.int32)
    data.splits["train"] = datamodule.Tokenised(tokens, offsets, truth, np.zeros((160, 2), np.float32), 0, config.model.limit)
    assert data.batches_per_step(n_processes) == expected
