"""The search space on W&B: the sweep's file, what an agent runs by it, and the registry's versions as artifacts."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import wandb
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args
from wandb.sdk.lib.config_util import save_config_file_from_dict

from sodaops.cli import main
from sodaops.io import runs
from sodaops.registry.registry import Registry
from tests.conftest import REPO, run_overrides

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _no_account(monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")


def test_the_file_is_written_and_a_missing_key_is_told(workdir, capsys):
    assert main(["sweep", "wandb", "search=default", "optim.warmup=0.2"]) == 2
    err = capsys.readouterr().err
    assert "WANDB_API_KEY is not set" in err and "python train.py -m search=" in err
    found = yaml.safe_load(Path("multirun/default/wandb_sweep.yaml").read_text())
    assert (
        found["method"] == "bayes"
        and found["metric"] == {"name": "val/macro_f1", "goal": "maximize"}
        and found["run_cap"] == 20
    )
    assert found["parameters"]["optim.lr"] == {"distribution": "log_uniform_values", "min": 5e-5, "max": 1e-3}
    assert found["command"][-4:] == ["search=default", "optim.warmup=0.2", "logger=wandb", "${args_no_hyphens}"]
    assert main(["sweep", "wandb"]) == 2 and "a sweep needs a search space" in capsys.readouterr().err
    assert main(["sweep"]) == 2 and main(["sweep", "wandb", "search=nope"]) == 2


def test_a_key_without_a_network(workdir, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert main(["sweep", "wandb", "search=default"]) == 2
    assert "does not answer" in (err := capsys.readouterr().err) and "start it later with `wandb sweep" in err


@pytest.mark.slow
def test_what_an_agent_runs(workdir, small_tweets):
    data = [o for o in run_overrides(workdir, small_tweets) if o.startswith(("data.path", "evaluate.splits_dir"))]
    assert main(["sweep", "wandb", "search=smoke", "trainer.max_epochs=1", *data, "--write"]) == 0
    sweep = yaml.safe_load(Path("multirun/smoke/wandb_sweep.yaml").read_text())
    chosen = {"optim.lr": 0.004, "model.pooling": sweep["parameters"]["model.pooling"]["values"][1]}
    args = create_sweep_command_args({"args": {key: {"value": value} for key, value in chosen.items()}})
    words = {"${env}": ["/usr/bin/env"], "${interpreter}": [sys.executable], "${program}": [str(REPO / sweep["program"])],
             "${args_no_hyphens}": args["args_no_hyphens"]}  # fmt: skip
    command = [word for part in create_sweep_command(sweep["command"]) for word in words.get(part, [part])]
    save_config_file_from_dict("wandb/config.yaml", {key: {"value": value} for key, value in chosen.items()})
    told = {"WANDB_MODE": "offline", "WANDB_SWEEP_ID": "abc", "WANDB_SWEEP_PARAM_PATH": str(workdir / "wandb/config.yaml")}
    done = subprocess.run(command, cwd=workdir, env={**os.environ, **told}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (run,) = runs.find_runs()
    assert run.params["optim.lr"] == 0.004 and run.params["model.pooling"] == "cls" and run.fields["wandb_id"]
    assert run.params["export.variants"] == [] and run.params["evaluate.split"] == "none"


@pytest.mark.slow
def test_a_version_is_mirrored_with_its_aliases(workdir, trained, monkeypatch, capsys):
    logged = []
    monkeypatch.setenv("WANDB_MODE", "offline")
    log = wandb.Run.log_artifact
    monkeypatch.setattr(
        wandb.Run,
        "log_artifact",
        lambda run, artifact, **more: (logged.append((artifact.name, more["aliases"])), log(run, artifact, **more)),
    )
    assert main(["register", str(trained / "run/bundle"), "registry.wandb=true"]) == 0
    version = Registry("registry").version("challenger")
    assert [aliases for _, aliases in logged] == [[version, "challenger"]] and logged[0][0].startswith("registry-tweets")
    until = time.monotonic() + 30
    while not any(b"registry-tweets" in path.read_bytes() for path in workdir.glob("wandb/offline-run-*/*.wandb")):
        assert time.monotonic() < until, "W&B's own process writes the file, and may still be at it when finish() is back"
        time.sleep(0.1)
    assert wandb.run is None
    capsys.readouterr()
    monkeypatch.delenv("WANDB_MODE")
    Registry("registry").move("champion", version, None, "")
    monkeypatch.setattr(Registry, "roll_back", lambda self, why: version)
    assert main(["rollback", "--reason", "x", "registry.wandb=true"]) == 0
    assert "warning: not mirrored to W&B" in capsys.readouterr().err, "the registry counts, W&B only shows"
    assert json.loads(Path("registry/history/00000002.json").read_text())["state"]["aliases"]["champion"] == version
