"""Sweeps on W&B: the definition, what an agent runs, and the registry's versions as artifacts."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import sodaops
from sodaops.cli import main
from sodaops.io import runs
from sodaops.registry.registry import Registry
from tests.conftest import REPO, run_overrides, wait_until

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.usefixtures("no_account")]


def test_the_definition_is_written_without_an_account(workdir, capsys):
    assert main(["sweep", "wandb", "search=default", "optim.scheduler.warmup=0.2"]) == 2
    assert re.search("ConfigError: .*WANDB_API_KEY", capsys.readouterr().err)
    definition = yaml.safe_load(Path("multirun/default/wandb_sweep.yaml").read_text())
    assert definition["method"] == "bayes" and definition["run_cap"] == 20
    assert definition["metric"] == {"name": "val/macro_f1", "goal": "maximize"}
    assert definition["parameters"]["optim.lr"] == {"distribution": "log_uniform_values", "min": 5e-5, "max": 1e-3}
    assert definition["command"][-4:] == ["search=default", "optim.scheduler.warmup=0.2", "logger=wandb", "${args_no_hyphens}"]
    assert main(["sweep", "wandb"]) == 2 and "ConfigError: search=null" in capsys.readouterr().err
    assert main(["sweep"]) == 2 and main(["sweep", "wandb", "search=nope"]) == 2


def test_a_key_without_a_network(workdir, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert main(["sweep", "wandb", "search=default"]) == 2
    err = capsys.readouterr().err
    assert "http://127.0.0.1:9" in err and "multirun/default/wandb_sweep.yaml" in err


@pytest.mark.deep
def test_what_an_agent_runs(workdir, small_tweets):
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args
    from wandb.sdk.lib.config_util import save_config_file_from_dict

    data = [o for o in run_overrides(workdir, small_tweets) if o.startswith(("data.path", "evaluate.splits_dir"))]
    assert main(["sweep", "wandb", "search=smoke", "trainer.max_epochs=1", *data, "--write"]) == 0
    sweep = yaml.safe_load(Path("multirun/smoke/wandb_sweep.yaml").read_text())
    chosen = {"optim.lr": 0.004, "model.pooling": sweep["parameters"]["model.pooling"]["values"][1]}
    args = create_sweep_command_args({"args": {key: {"value": value} for key, value in chosen.items()}})
    words = {"${env}": ["/usr/bin/env"], "${interpreter}": [sys.executable], "${program}": [str(REPO / sweep["program"])],
             "${args_no_hyphens}": args["args_no_hyphens"]}  # fmt: skip
    command = [word for part in create_sweep_command(sweep["command"]) for word in words.get(part, [part])]
    save_config_file_from_dict("wandb/config.yaml", {key: {"value": value} for key, value in chosen.items()})
    environment = {
        "WANDB_MODE": "offline",
        "WANDB_SWEEP_ID": "abc",
        "WANDB_SWEEP_PARAM_PATH": str(workdir / "wandb/config.yaml"),
    }
    done = subprocess.run(command, cwd=workdir, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (run,) = runs.find_runs()
    assert run.params["optim.lr"] == 0.004 and run.params["model.pooling"] == "cls" and run.fields["wandb_id"]
    assert run.params["export.variants"] == [] and run.params["evaluate.split"] == "none"


def test_a_version_is_mirrored_with_its_aliases(workdir, trained, monkeypatch, caplog):
    import wandb

    logged = []
    monkeypatch.setenv("WANDB_MODE", "offline")
    log_artifact = wandb.Run.log_artifact

    def record(run, artifact, **more):
        logged.append((artifact.name, more["aliases"]))
        return log_artifact(run, artifact, **more)

    monkeypatch.setattr(wandb.Run, "log_artifact", record)
    assert main(["register", str(trained / "run/bundle"), "registry.wandb=true"]) == 0
    version = Registry("registry").version("challenger")
    assert [aliases for _, aliases in logged] == [[version, "challenger"]] and logged[0][0].startswith("registry-tweets")
    pattern = "wandb/offline-run-*/*.wandb"  # W&B's own process writes it, perhaps after the command has ended
    wait_until(lambda: any(b"registry-tweets" in path.read_bytes() for path in workdir.glob(pattern)))
    assert wandb.run is None
    Registry("registry").move("champion", version, None, "")
    monkeypatch.setattr(Registry, "roll_back", lambda self, why, alias="champion": version)
    models = sodaops.Registry("registry")  # in Python as on the command line
    models.register(trained / "run")
    models.register(trained / "run", overrides=["registry.wandb=true"])
    models.roll_back("x", overrides=["registry.wandb=true"])
    assert [aliases for _, aliases in logged[1:]] == [[version, "challenger"], [version, "champion"]]
    monkeypatch.delenv("WANDB_MODE")
    caplog.clear()
    assert main(["rollback", "--reason", "x", "registry.wandb=true"]) == 0
    (record,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert "registry.wandb=true" in record.getMessage(), "the registry is changed even if W&B cannot be reached"
    assert json.loads(Path("registry/history/00000002.json").read_text())["state"]["aliases"]["champion"] == version
