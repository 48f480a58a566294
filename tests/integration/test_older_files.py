"""Files of version 0.1.0, as its code wrote them before the modules moved (commit 154efa3), are still read.

tests/fixtures/before_layout holds an encoder with random weights, a run on the first 300 tweets (its record, checkpoints and
metrics), a registry with the run's bundle as champion, and a request log of six requests.
"""

import json
import shutil
from pathlib import Path

import pytest

from sodaops.bundle import layout, reference
from tests.conftest import REPO, TWEETS

VERSION = "582e391bd44d"
TRAINING = (
    "model.name_or_path=encoder", "model.max_tokens=64", "evaluate.n_bootstrap=200", "evaluate.baselines=false",
    "trainer.precision=32-true",
)  # fmt: skip


@pytest.fixture
def older(workdir, run):
    """Runs a command in a copy of the fixture with the table that the run was trained on."""
    shutil.copytree(REPO / "tests/fixtures/before_layout", workdir, dirs_exist_ok=True)
    table = workdir / "data/raw/tweets.csv"
    table.parent.mkdir(parents=True)
    table.write_bytes(b"".join(TWEETS.read_bytes().splitlines(keepends=True)[:301]))

    def command(*argv):
        code, out, err = run(*argv)
        assert code == 0, err
        return out

    return command


def test_a_registry_and_its_bundle(older):
    assert VERSION in older("resolve", "champion")
    assert older("registry", "history").count(VERSION) >= 2
    assert older("predict", "registry@champion", "what a day").split("\t")[0] in ("negative", "neutral", "positive")


def test_a_run(older):
    (run,) = json.loads(older("runs", "run", "--json"))
    assert (run["status"], run["bundle_id"]) == ("finished", VERSION)
    metrics = json.loads(Path("run/evaluation/metrics.json").read_text())["test"]
    assert all(metrics[name] == value for name, value in run["metrics"]["test"].items())


def test_a_request_log(older):
    older("drift", "registry@champion", "drift.request_log=requests", "drift.output_dir=drift")
    assert "0 rows" in older("log", "forget", "--request-id=none", "serve.request_log=requests")


def test_a_checkpoint_resumes_and_a_bundle_is_evaluated_and_exported(older, workdir):
    import torch

    older("preprocess")
    bare = ("export.variants=[]", "evaluate.split=none")
    older("train", *TRAINING, *bare, "trainer.max_epochs=2", "ckpt_path=run/checkpoints/last.ckpt", "run_dir=resumed")
    first, last = (torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True) for run in ("run", "resumed"))
    assert (first["epoch"], last["epoch"]) == (0, 1) and last["global_step"] == 2 * first["global_step"] > 0
    output = ("evaluate.split=val", "evaluate.n_bootstrap=200", "evaluate.output_dir=evaluation")
    older("evaluate", "registry@champion", *output)
    assert json.loads((workdir / "evaluation/metrics.json").read_text())["val"]["n_rows"] == 30
    shutil.copytree(f"registry/versions/{VERSION}", "bundle")
    (workdir / "bundle/card.md").unlink()
    older("export", "bundle")
    known = reference.read_reference("bundle", layout.read_info("bundle"))
    assert (known.truth >= 0).sum() == 30 == (~known.seen).sum()  # quality can be estimated now
