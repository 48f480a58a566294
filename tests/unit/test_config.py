import inspect
import subprocess
import sys
from functools import cache
from pathlib import Path

import pydantic
import pytest
import yaml
from omegaconf import OmegaConf

from sodaops.config.validation import build_config
from sodaops.errors import ConfigError
from tests.conftest import REPO, configured, lazy

compose = lazy("sodaops.config.compose")
L = lazy("lightning")
trainer = lazy("sodaops.training.trainer")


@cache
def default_config():
    return configured()


def tree(**changes):
    root = default_config().model_dump()
    for key, value in changes.items():
        *section, name = key.split("__")
        node = root
        for part in section:
            node = node[part]
        node[name] = value
    return root


def test_params_yaml_is_conf_composed():
    # `make params` writes it anew after a change in conf/.
    assert compose.load_params(REPO / "params.yaml") == default_config()


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["data=csv", "data.path=reviews.csv"], "reviews"),
        (["data=csv", "data.path=gs://bucket/raw/reviews.v2.jsonl.GZ"], "reviews.v2"),
        (["data=csv", "data.path='a/Kundenmeinungen (neu).csv'"], "Kundenmeinungen-neu"),
        (["data=csv", "data.path='评论.csv'"], "data"),
        (["data=csv", "data.path=reviews.csv", "data.name=other"], "other"),
        (["data=csv", "data.path=null", "data.files={train:sets/news/a.csv,val:b.csv,test:c.csv}"], "news"),
        (["data=csv", "data.path=null", "data.files={train:a.csv,val:b.csv,test:c.csv}"], "data"),
        (["data.path=mine.csv"], "tweets"),
    ],
)
def test_splits_are_named_after_the_file(overrides, name):
    config = configured(*overrides)
    assert config.data.name == name and config.splits_dir == Path("data/processed") / name
    assert config.data.added == f"data/raw/added/{name}"


def test_dvc_composes_the_name_too(tmp_path):
    """`dvc exp run -S data=csv` composes conf/ in DVC's process, which imports only Hydra's plugins of this project."""
    command = "compose_and_dump(sys.argv[1], sys.argv[2], None, 'config', sys.argv[1], ['data=csv', 'data.path=reviews.csv'])"
    unused = "assert 'sodaops.config.compose' not in sys.modules"
    code = f"import sys; from dvc.utils.hydra import compose_and_dump; {command}; {unused}"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "params.yaml"), str(REPO / "conf")], check=True, cwd=tmp_path)
    assert compose.load_params(tmp_path / "params.yaml").data.name == "reviews"


@pytest.mark.slow
@pytest.mark.parametrize(
    "group", ["data", "model", "head", "loss", "optim", "trainer", "logger", "experiment", "debug", "evaluate"]
)
def test_every_option_composes(group):
    options = [path.stem for path in (compose.conf_dir() / group).glob("*.yaml") if path.stem != "base"]
    assert options
    for option in options:
        extra = ["data.path=t.csv"] if option == "csv" and group == "data" else []
        configured(f"{group}={option}", *extra)


def test_experiments_are_small_diffs():
    for path in (compose.conf_dir() / "experiment").glob("*.yaml"):
        keys = yaml.safe_load(path.read_text()) or {}
        assert 0 < sum(len(v) if isinstance(v, dict | list) else 1 for v in keys.values()) <= 8, path.name


def test_conf_trainer_holds_lightnings_own_arguments_and_defaults():
    ours = {
        "precision", "devices", "max_epochs", "gradient_clip_val", "num_sanity_val_steps", "log_every_n_steps",
        "enable_model_summary",
    }  # fmt: skip
    signature = inspect.signature(L.Trainer.__init__).parameters
    defaults = {name: value.default for name, value in signature.items() if name not in trainer._NOT_CONFIGURABLE}
    written = OmegaConf.to_container(OmegaConf.load(compose.conf_dir() / "trainer/default.yaml"))
    assert set(written) == set(defaults)
    assert {k: v for k, v in written.items() if k not in ours} == {k: v for k, v in defaults.items() if k not in ours}


def test_frozen():
    with pytest.raises(pydantic.ValidationError):
        default_config().optim.lr = 1.0


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optim__lrr", 1, r"optim\.lrr .*\(did you mean lr\?\).* lr, head_lr"),
        ("sed", 1, r"sed .*\(did you mean seed\?\).* seed"),
        ("optim__lr", "1e-3", "optim.lr='1e-3': .*number"),
        ("optim__lr", 0, "optim.lr=0: .*greater than 0"),
        ("optim__lr", True, "optim.lr=True: "),
        ("seed", -1, "seed=-1"),
        ("seed", None, "seed=None"),
        ("optim__schedule", "linear", r"optim\.schedule .*optim\.scheduler\.decay"),
        ("optim__optimizer", {"lr": 1}, r"optim\.optimizer=.*_target_"),
        ("model__dropout", 1.0, "model.dropout=1.0: .*less than 1"),
        ("model__pooling", "max", "model.pooling='max': .*'mean' or 'cls'"),
        ("data__labels", ["a"], "data.labels="),
        ("data__labels", ["a", "a"], "data.labels="),
        ("data__vote_columns", {"negative": "a"}, "data.vote_columns .*negative.*negative, neutral, positive"),
        ("data__label_map", {1: "positiv"}, r"data.label_map.1='positiv'.*did you mean positive"),
        ("data__fractions", [0.5, 0.2, 0.2], "data.fractions=.*0.9.* 1"),
        ("data__path", "t.xls", "data.path='t.xls': .*.csv"),
        ("data__path", None, "data.path .*data.files"),
        ("data__name", "../up", "data.name='../up'"),
        ("data__cleaning", "minimla", r"data.cleaning='minimla'.*did you mean minimal\?"),
        ("optim__batch_tokens", 64, "optim.batch_tokens=64 .*model.max_tokens=128"),
        ("model__max_windows", 0, "model.max_windows=0: .*1"),
        ("model__max_windows", 2, "model.max_windows=2 .*model.long_texts=windows"),
        ("model__stride", -1, "model.stride=-1: .*0"),
        ("model__stride", 0, "model.stride=0 .*model.long_texts=windows"),
        ("model__long_texts", "window", "model.long_texts='window': .*did you mean windows"),
        ("callbacks__mine", {"x": 1}, "callbacks.mine=.*_target_"),
        ("checkpoint__monitor", "val/macrof1", r"checkpoint.monitor='val/macrof1'.*did you mean val/macro_f1\?"),
        ("evaluate__split", "tset", r"evaluate.split='tset'.*did you mean test\?"),
        ("drift__alpha", 0.001, "drift.alpha=0.001 .*drift.n_permutations=8001"),
        ("drift__last", 200_000, "drift.last=200000 .*drift.max_rows=100000"),
        ("logger__wandb", {"project": "x"}, "logger.wandb.entity "),
        ("metrics", {"accuracy": {"_target_": "a.B"}}, "metrics.accuracy: "),
        ("metrics", {"a b": {"_target_": "a.B"}}, "metrics.a b"),
        ("metrics", {"a": {"x": 1}}, "metrics.a=.*_target_"),
        ("logger__wand", {"project": "x"}, r"logger\.wand=.*_target_.*did you mean wandb\?"),
        ("logger__csv", {"_target_": "a.B"}, r"logger\.csv\._target_ "),
    ],
)
def test_faults(key, value, message):
    with pytest.raises(ConfigError, match=message):
        build_config(tree(**{key: value}))


def test_all_faults_at_once():
    with pytest.raises(ConfigError) as caught:
        build_config(tree(optim__lr="x", model__poling="cls", seed=1.5))
    assert all(part in str(caught.value) for part in ("3 faults", "optim.lr='x'", "model.poling", "seed=1.5"))


def test_seed_0_is_a_seed():
    assert configured("seed=0").seed == 0


def test_trainer_takes_lightnings_types():
    given = {
        "max_epochs": 2,
        "precision": "bf16-mixed",
        "devices": [0, 1],
        "max_time": "00:01:00:00",
        "val_check_interval": 0.5,
    }
    assert trainer.trainer_arguments(given) == given


def test_an_epoch_cannot_be_chosen_without_val():
    for nothing in (0, 0.0):
        with pytest.raises(ConfigError, match=r"trainer\.limit_val_batches=0"):
            trainer.trainer_arguments({"limit_val_batches": nothing})
    assert trainer.trainer_arguments({"limit_val_batches": None}) == {"limit_val_batches": None}


def test_trainer_faults_come_together():
    with pytest.raises(ConfigError) as caught:
        trainer.trainer_arguments({"max_epoch": 3, "max_steps": "ten", "precision": 17, "callbacks": []})
    text = str(caught.value)
    keys = ("trainer.max_epoch ", "max_epochs?", "trainer.max_steps='ten'", "trainer.precision=17", "trainer.callbacks")
    assert all(key in text for key in keys)


def test_params_file_faults(workdir):
    with pytest.raises(ConfigError, match="--params none.yaml"):
        compose.load_params("none.yaml")
    with pytest.raises(ConfigError, match="'seed': .*KEY=VALUE"):
        compose.load_params(REPO / "params.yaml", ["seed"])
    assert compose.load_params(REPO / "params.yaml", ["seed=7", "optim.lr=0.5"]).optim.lr == 0.5
