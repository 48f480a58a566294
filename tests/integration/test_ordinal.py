"""Ordered labels from the table to the gate, the service's answers and the drift reference."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

import sodaops
from sodaops.bundle import layout, reference
from sodaops.cli import main
from sodaops.errors import RegistryError
from tests.conftest import TINY, configured, made_once, table

WORDS = ("awful", "bad", "fair", "good", "great")
GATE = ("slice_floor=null", "max_ece=null", "behaviour=null", "min_gain=-2", "max_latency=null", "n_bootstrap=1000")


@pytest.fixture(scope="module")
def rated(tmp_path_factory):
    """A run on 300 texts whose ratings from 0 to 4 are in their words, in five bins."""

    def make(folder):
        from sodaops.pipeline import train

        rng = np.random.default_rng(0)
        values = rng.uniform(0, 5, 300)
        rows = [(f"text {i} was {WORDS[int(value)]} {WORDS[int(value)]}", f"{value:.3f}") for i, value in enumerate(values)]
        (folder / "rated.csv").write_text(table(rows, ("text", "stars")), encoding="utf-8")
        train(configured(*overrides(folder), "evaluate.baselines=true"))

    return made_once(tmp_path_factory, "rated", make)


def overrides(folder):
    return [
        *TINY, "trainer.max_epochs=4", "optim.lr=3e-3", "optim.layer_decay=1", "optim.head_lr=1e-2", "optim.batch_tokens=256",
        "model.max_tokens=32", "task=ordinal", "task.edges=[1,2,3,4]", "data=csv", f"data.path={folder / 'rated.csv'}",
        "data.label_column=stars", f"run_dir={folder / 'run'}", f"evaluate.splits_dir={folder / 'splits'}",
    ]  # fmt: skip


def test_what_a_training_writes(rated):
    measured = json.loads((rated / "run/evaluation/metrics.json").read_text())["test"]
    assert measured["quadratic_kappa"] > 0.5 and measured["mae"] < measured["baselines"]["majority"]["mae"]
    interval = measured["interval_95"]["quadratic_kappa"]
    assert interval["low"] <= measured["quadratic_kappa"] <= interval["high"]
    predictions = pq.read_table(rated / "run/evaluation/predictions.parquet")
    gaps = np.array(predictions["predicted"].to_pylist(), int) - np.array(predictions["label"].to_pylist(), int)
    assert measured["mae"] == pytest.approx(np.abs(gaps).mean())
    assert measured["off_by_one"] == pytest.approx((np.abs(gaps) <= 1).mean())
    assert (rated / "run/evaluation/plots/ranks.png").is_file()
    info = layout.read_info(rated / "run/bundle")
    assert info.labels == ["1", "2", "3", "4", "5"] and info.task["edges"] == [1, 2, 3, 4]
    assert info.onnx["float32"]["quadratic_kappa_change"] == 0 and "int8" in info.onnx
    assert info.bundle_id != layout.compute_bundle_id(info.files, **{**layout._settings(vars(info)), "task": {}})
    assert reference.read_reference(rated / "run/bundle", info).label_ids.max() <= 4


def test_answers(rated, workdir):
    model = sodaops.load(rated / "run")
    texts = ["text 1 was awful awful", "text 2 was great great"]
    low, high = model.predict(texts)
    assert int(low.label) < int(high.label) and sum(low.probs.values()) == pytest.approx(1, abs=1e-5)
    model.predict_file(rated / "rated.csv", "out.parquet")
    first = pq.read_table("out.parquet").slice(0, 20).to_pylist()
    assert [row["label"] for row in first] == [one.label for one in model.predict([row["text"] for row in first])]
    assert first[0]["score"] == pytest.approx(first[0][f"prob_{first[0]['label']}"])


def test_the_gate(rated, trained, workdir):
    models = sodaops.Registry("registry")
    models.register(str(rated / "run/bundle"), "first")
    rules = [f"registry.gate.{rule}" for rule in GATE] + [f"evaluate.splits_dir={rated / 'splits'}", "registry.wandb=false"]
    promotion = models.promote("challenger", overrides=rules)
    assert promotion.result.passed and set(promotion.result.scores["challenger"]) >= {"quadratic_kappa", "mae"}
    models.register(str(trained / "run/bundle"), "one of another task")
    with pytest.raises(RegistryError, match="ordinal"):
        models.promote("challenger", overrides=[*rules[:-2], f"evaluate.splits_dir={trained / 'splits'}"])


def test_transformers_has_no_such_model(rated, workdir, capsys):
    assert main(["export", str(rated / "run/bundle"), "--format=transformers", "--output=out"]) == 2
    assert "ordinal" in capsys.readouterr().err and not (workdir / "out").exists()


def test_a_checkpoint_of_another_task(rated, workdir, capsys):
    given = [one for one in overrides(rated) if "run_dir" not in one and one not in ("task=ordinal", "task.edges=[1,2,3,4]")]
    words = ["train", *given, "run_dir=other", f"ckpt_path={rated / 'run/checkpoints/last.ckpt'}", "trainer.max_epochs=20"]
    assert main(words) == 2 and "stars" in capsys.readouterr().err  # its numbers are no labels
