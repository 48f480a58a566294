"""The DVC pipeline, run for real in a clone: what reruns, and what does not."""

import json
import re

import pyarrow.csv
import pytest
import yaml

from sodaops.io.storage import sha256_of
from tests.conftest import table
from tests.gcs import emulated
from tests.slow.test_readme import DVC

pytestmark = pytest.mark.slow
STAGES = ("preprocess", "train", "evaluate")


def metrics(clone):
    """The test metrics of the pipeline's evaluation."""
    return json.loads((clone.folder / "artifacts/evaluation/metrics.json").read_text())["test"]


def ran(output):
    """The stages that DVC ran."""
    return re.findall(r"Running stage '(\w+)'", output)


def change(clone, key, value):
    path = clone.folder / "params.yaml"
    params = yaml.safe_load(path.read_text())
    section, name = key.split(".")
    assert params[section][name] != value
    params[section][name] = value
    path.write_text(yaml.safe_dump(params, sort_keys=False))


def test_pipeline(clone):
    """The README's commands, on 500 rows; then what each change of params.yaml, and an added table, reruns."""
    tweets = clone.folder / "data/raw/tweets.csv"
    pyarrow.csv.write_csv(pyarrow.csv.read_csv(tweets).slice(0, 500), tweets)
    repro, experiment, diff, plots = DVC
    clone("python train.py --cfg job --resolve experiment=smoke evaluate.baselines=false > params.yaml")
    assert ran(clone(repro)) == list(STAGES)
    assert "up to date" in clone(repro)
    assert not (clone.folder / "artifacts/train/evaluation").exists()  # the stage leaves the evaluation to the next one
    first = metrics(clone)["log_loss"]
    clone("git add -A && git -c user.name=t -c user.email=t@t commit -qm smoke")

    assert ran(clone(experiment)) == ["train", "evaluate"]
    second = metrics(clone)["log_loss"]
    assert second != first
    changed = json.loads(clone(f"{diff} --json"))["artifacts/evaluation/metrics.json"]["test.log_loss"]
    assert (changed["old"], changed["new"]) == (pytest.approx(first), pytest.approx(second))
    clone(f"{plots} --out plots")
    page = (clone.folder / "plots/index.html").read_text()
    assert "confusion" in page and "reliability" in page

    change(clone, "evaluate.n_bins", 10)
    assert ran(clone("dvc repro")) == ["evaluate"]
    before = json.loads((clone.folder / "data/processed/tweets/manifest.json").read_text())
    added = clone.folder / "data/raw/added/tweets/2026-11-25.csv"  # as `sodaops annotate merge` writes it
    added.parent.mkdir()
    votes = [(f"a new text about delivery {i}", "negative", 2, 0, 0) for i in range(40)]
    added.write_text(table(votes, ("text", "sentiment", "votes_negative", "votes_neutral", "votes_positive")))
    assert ran(clone("dvc repro preprocess")) == ["preprocess"]
    assert re.findall(r"^(\w+):\n\tchanged deps", clone("dvc status"), re.MULTILINE) == ["train", "evaluate"]
    after = json.loads((clone.folder / "data/processed/tweets/manifest.json").read_text())
    assert sum(after["added"]["data/raw/added/tweets/2026-11-25.csv"].values()) == 40
    assert after["splits"]["test"]["sha256"] == before["splits"]["test"]["sha256"]
    change(clone, "data.cleaning", "social")
    assert "preprocess" in clone("dvc status")


@pytest.mark.deep
def test_a_queue_of_experiments(clone):
    """Three queued, run in copies of the clone, shown side by side; the best is registered and promoted."""
    small = "-S model=tiny -S data.max_rows=600 -S evaluate.n_bootstrap=200 -S evaluate.baselines=false -S trainer.max_epochs=1"
    for lr in ("0.001", "0.003", "0.01"):
        assert "Queued" in clone(f"dvc exp run --queue {small} -S optim.lr={lr}")
    assert clone("dvc queue status").count("Queued") == 3
    clone("dvc exp run --run-all", timeout_s=600)
    shown = json.loads(clone("dvc exp show --json"))
    rates = {
        experiment["revs"][0]["data"]["params"]["params.yaml"]["data"]["optim"]["lr"]:
        experiment["revs"][0]["data"]["metrics"]["artifacts/evaluation/metrics.json"]["data"]["test"]["log_loss"]
        for rev in shown for experiment in rev["experiments"] or []
    }  # fmt: skip
    assert set(rates) == {0.001, 0.003, 0.01} and len(set(rates.values())) == 3
    names = clone("dvc exp list --name-only").split()
    assert len(names) == 3
    clone(f"dvc exp apply {names[0]}")
    assert "challenger" in clone("sodaops register artifacts/train/bundle")
    clone("sodaops promote challenger registry.gate.behaviour=null", allowed=(3,))


@pytest.mark.deep
def test_a_remote_on_google_cloud(clone, tmp_path):
    """Splits go to a version-aware bucket, and a fresh clone gets the very same without an account."""
    start = ["gcp-storage-emulator", "-d", str(tmp_path / "gcs"), "start", "--host", "127.0.0.1", "--default-bucket", "bucket"]
    with emulated(lambda port: [*start, "--port", str(port)]):
        clone("dvc remote add -d storage gs://bucket/sodaops")
        clone("dvc remote modify storage version_aware true")
        clone("dvc remote modify storage allow_anonymous_login true")
        clone("dvc repro preprocess")
        clone("dvc push preprocess")
        splits = json.loads((clone.folder / "data/processed/tweets/manifest.json").read_text())["splits"]
        locked = yaml.safe_load((clone.folder / "dvc.lock").read_text())["stages"]["preprocess"]["outs"][0]["files"]
        assert all(file["cloud"]["storage"]["version_id"] for file in locked)
        clone("git add -A && git -c user.name=t -c user.email=t@t commit -qm pushed")
        clone("git clone -q . ../fresh")
        clone("cd ../fresh && dvc pull preprocess && dvc status preprocess")
        fresh = tmp_path / "fresh/data/processed/tweets"
        assert {name: sha256_of(fresh / f"{name}.parquet") for name in splits} == {
            name: of["sha256"] for name, of in splits.items()
        }
