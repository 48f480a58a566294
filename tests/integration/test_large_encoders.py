"""Trainings with LoRA adapters: their checkpoints and bundles, resuming, and an encoder of another architecture."""

import signal
import sys
from contextlib import nullcontext

import pytest

from sodaops.errors import ConfigError, Terminated
from sodaops.inference.predictor import Predictor
from tests.conftest import configured, lazy, run_overrides
from tests.integration.test_train import CONSTANT_RATE, SIGTERM, are_equal, checkpoint, fit_tiny, weights

pipeline = lazy("sodaops.pipeline")
pretrained_module = lazy("sodaops.modeling.pretrained")
save = lazy("sodaops.bundle.save")
torch = lazy("torch")
transformers = lazy("transformers")

LORA = ("model.lora={r: 4, dropout: 0.1}", "optim.lr=0.01", "optim.batch_texts=64")
MODERNBERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "pad_token_id": 0}


@pytest.fixture(scope="module")
def adapted(small_tweets, tmp_path_factory):
    """The folder of an uninterrupted run with adapters."""
    folder = tmp_path_factory.mktemp("adapted")
    fit_tiny(folder, small_tweets, *CONSTANT_RATE, *LORA)
    return folder


def test_a_checkpoint_has_the_trained_weights_and_the_bundle_the_merged_ones(adapted, trained, monkeypatch):
    state = checkpoint(adapted, "best")["state_dict"]
    assert all("lora_" in name or name.startswith("model.head.") for name in state) and len(state) == 10
    sizes = [(folder / "run/checkpoints/last.ckpt").stat().st_size for folder in (trained, adapted)]
    assert sizes[0] > 100 * sizes[1]
    assert weights(adapted).keys() == weights(trained).keys()
    monkeypatch.setitem(sys.modules, "peft", None)  # an import raises an ImportError
    merged = save.load_bundle(adapted / "run/bundle").model.transformer.encoder.layer[0].attention.self
    monkeypatch.undo()
    torch.manual_seed(42)
    plain = pretrained_module.load_pretrained(configured("model=tiny").model).transformer.encoder.layer[0].attention.self
    names = (f"model.transformer.encoder.layer.0.attention.self.query.lora_{x}.default.weight" for x in "BA")
    b, a = (state[name] for name in names)
    torch.testing.assert_close(merged.query.weight, plain.query.weight + b @ a * 16 / 4)
    assert torch.equal(merged.key.weight, plain.key.weight) and (b @ a).abs().max() > 0


@pytest.mark.parametrize("where", [None, ("batch", 1), ("validation", 1)])
def test_a_resumed_run_with_adapters_equals_an_uninterrupted_one(small_tweets, adapted, tmp_path, where):
    stop = ("trainer.max_epochs=1",) if where is None else (SIGTERM.format(*where),)
    with pytest.raises(Terminated) if where else nullcontext():
        fit_tiny(tmp_path, small_tweets, *CONSTANT_RATE, *LORA, *stop)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and "lora_" in str(checkpoint(tmp_path)["state_dict"].keys())
    fit_tiny(tmp_path, small_tweets, *CONSTANT_RATE, *LORA, "ckpt_path=last", "model.gradient_checkpointing=true")
    assert are_equal(weights(tmp_path), weights(adapted))


@pytest.mark.parametrize(("change", "key"), [
    ("model.lora=null", r"model\.lora=None"), ("model.lora={r: 2}", r"model\.lora="),
    ("model.overrides.intermediate_size=32", "the encoder's weights"), ("optim.batch_texts=32", r"optim\.batch_texts=32"),
])  # fmt: skip
def test_a_checkpoint_of_other_adapters_or_weights_is_refused(adapted, small_tweets, tmp_path, change, key):
    path = adapted / "run/checkpoints/last.ckpt"
    with pytest.raises(ConfigError, match=rf"ckpt_path={path}.*{key}"):
        fit_tiny(tmp_path, small_tweets, *CONSTANT_RATE, *LORA, change, f"ckpt_path={path}", "trainer.max_epochs=4")


def test_a_target_that_matches_nothing_is_found_before_the_table_is_read(small_tweets, tmp_path):
    with pytest.raises(ConfigError, match=r"model\.lora\.target_modules.*BertModel.*q_proj.*query"):
        fit_tiny(tmp_path, small_tweets, "model.lora={target_modules: q_proj}")
    assert not list(tmp_path.rglob("*.parquet"))


@pytest.mark.deep
def test_modernbert_is_trained_exported_and_predicts(small_tweets, tmp_path):
    tokenizer = pretrained_module.load_pretrained(configured("model=tiny").model).tokenizer
    settings = transformers.ModernBertConfig(**MODERNBERT, local_attention=8, vocab_size=tokenizer.get_vocab_size())
    transformers.ModernBertModel(settings).save_pretrained(tmp_path / "encoder")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(tmp_path / "encoder")
    more = ("model.lora={}", "model.gradient_checkpointing=true", "export.variants=[float32]", "evaluate.split=none")
    own = ("model.random_weights=false", "model.overrides=null", f"model.name_or_path={tmp_path}/encoder")
    pipeline.train(configured(*run_overrides(tmp_path, small_tweets, *own, *more, "trainer.max_epochs=1")))
    bundle = save.load_bundle(tmp_path / "run/bundle")
    texts = ["a good day", "I hate this so much that I would rather be anywhere else"]
    probs = Predictor(tmp_path / "run/bundle", "float32").probs(texts)
    for text, row in zip(texts, probs, strict=True):
        ids = torch.tensor([bundle.tokenizer.encode(text).ids])
        expected = bundle.model(ids, torch.ones_like(ids)).logits.softmax(-1)[0]
        torch.testing.assert_close(torch.from_numpy(row), expected.detach(), atol=1e-4, rtol=1e-3)
