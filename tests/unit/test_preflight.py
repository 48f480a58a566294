"""Faults that are found before a training: targets, disk space, and encoders that cannot be saved or exported."""

import random
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from sodaops.errors import ModelError, StorageError
from tests.conftest import configured, lazy, make_rows, table, tiny_pretrained

encoder_module = lazy("sodaops.modeling.encoder")
preflight = lazy("sodaops.training.preflight")
torch = lazy("torch")
transformers = lazy("transformers")

UNEXPORTED = ("export.variants=[]", "evaluate.split=none")
Usage = namedtuple("Usage", "total used free")


@pytest.mark.slow
def test_all_faults_are_found_before_the_training(run, write, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    write("file", "")
    write("t.csv", table(make_rows(), header=("text", "sentiment")))
    faults = {
        "data.path": "t.csv", "run_dir": "file/run", "registry.path": "file/registry", "evaluate.output_dir": "file/evaluation",
        "model.max_tokens": 513, "trainer.max_epochs": "x",
    }  # fmt: skip
    given = [f"{key}={value}" for key, value in faults.items()]
    code, _, error = run("train", "data=csv", "model=minilm", "optim.batch_tokens=1024", "logger=wandb",
                           "logger.wandb.mode=online", *given)  # fmt: skip
    assert code == 2 and error.startswith("ConfigError: 7 faults:")
    for place in ("t.csv", "run_dir=file/run", "registry.path=file", "evaluate.output_dir=file", "model.max_tokens=513",
                  "trainer.max_epochs='x'", "WANDB_API_KEY"):  # fmt: skip
        assert error.count(place) >= 1, place
    assert not list(Path().rglob("*.ckpt")) and not list(Path().rglob("*.parquet"))


def test_targets_without_faults_are_left_as_they_are(workdir, write):
    config = configured("data=csv", f"data.path={write('t.csv', table(make_rows()))}", "run_dir=new/run", "model=tiny")
    preflight.check_targets(config)
    assert [path.name for path in workdir.rglob("*")] == ["t.csv"]


def test_too_little_disk_space(workdir, monkeypatch):
    config, pretrained = configured("model=tiny", "run_dir=run", *UNEXPORTED), tiny_pretrained()
    n = sum(p.numel() for p in pretrained.transformer.parameters()) + 2 * 33
    needed = 3 * 12 * n + 8 * n
    for free, fits in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: Usage(0, 0, free))
        if fits:
            preflight.check_bundle(config, pretrained, 2)
        else:
            with pytest.raises(StorageError, match="run_dir=run"):
                preflight.check_bundle(config, pretrained, 2)
    (workdir / "run/checkpoints").mkdir(parents=True)
    (workdir / "run/checkpoints/last.ckpt").write_bytes(b"1")  # it will be replaced
    preflight.check_bundle(config, pretrained, 2)


@pytest.mark.slow
def test_an_encoder_that_can_be_exported(workdir, monkeypatch):
    deep, short = "model.overrides.num_hidden_layers=4", ("model.long_texts=windows", "model.max_tokens=3")
    config, pretrained = configured("model=tiny", deep, *short, "seed=1"), tiny_pretrained()
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    preflight.check_bundle(config, pretrained, 2)
    (record,) = Path("cache/sodaops/exported").iterdir()
    assert [path.name for path in workdir.iterdir()] == ["cache"]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]
    made = record.stat().st_mtime_ns
    preflight.check_bundle(config, pretrained, 2)  # once for each architecture
    assert record.stat().st_mtime_ns == made


SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "settings", "cause"),
    [("longformer", {**SMALL, "attention_window": 8, "pad_token_id": 1, "max_position_embeddings": 66}, "LongformerModel")],
)
def test_an_encoder_that_cannot_be_exported(kind, settings, cause, workdir):
    config, tiny = configured("model=tiny", "model.max_tokens=32"), tiny_pretrained()
    settings = transformers.AutoConfig.for_model(kind, vocab_size=tiny.tokenizer.get_vocab_size(), **settings)
    pretrained = encoder_module.Pretrained(encoder_module.random_encoder(settings), tiny.tokenizer, 1)
    with pytest.raises(ModelError, match=cause) as raised:
        preflight.check_bundle(config, pretrained, 2)
    assert "\n" not in str(raised.value) and "\x1b" not in str(raised.value)
    unexported = config.model_copy(update={"export": config.export.model_copy(update={"variants": []})})
    preflight.check_bundle(unexported, pretrained, 2)


def test_an_encoder_whose_weights_share_memory(workdir, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    pretrained = tiny_pretrained()
    shallow = preflight._shallow

    def shared(transformer):
        copied = shallow(transformer)
        copied.encoder.layer[1].output.dense.weight = copied.encoder.layer[0].output.dense.weight
        return copied

    monkeypatch.setattr("sodaops.training.preflight._shallow", shared)
    with pytest.raises(ModelError, match=r"model\.name_or_path"):
        preflight.check_bundle(configured("model=tiny", *UNEXPORTED), pretrained, 2)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "modernbert", "qwen2"])
def test_the_copy_has_two_layers_of_the_same_kind(kind):
    settings = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    settings = {"n_embd": 16, "n_layer": 4, "n_head": 2} if kind == "gpt2" else {**settings, "intermediate_size": 16}
    if kind != "gpt2":
        settings["pad_token_id"] = 0
    transformer = encoder_module.random_encoder(transformers.AutoConfig.for_model(kind, **settings))
    copied = preflight._shallow(transformer)
    again = encoder_module.from_settings(encoder_module.settings_of(copied))
    assert transformer.config.num_hidden_layers == 4 and copied.config.num_hidden_layers == 2
    assert again.state_dict().keys() == copied.state_dict().keys() < transformer.state_dict().keys()


def test_arguments_that_make_no_bundle(monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(0, 0, 0))
    for more in ("trainer.fast_dev_run=true", "trainer.enable_checkpointing=false"):
        preflight.check_bundle(configured("model=tiny", more), tiny_pretrained(), 2)
