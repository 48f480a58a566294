"""Weights & Biases offline, for real: what a run leaves, and how a crash is told."""

import json
import subprocess
import sys

import pytest
import wandb

from sodaops.errors import ConfigError
from sodaops.training.fit import fit
from tests.conftest import configured, run_overrides

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _no_account(monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")


def records(run_dir):
    (file,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def exit_code(run_dir):
    (found,) = [record["exit"] for record in records(run_dir) if "exit" in record]
    return int(found.get("exit_code", found.get("exitCode", 0)))


def overrides(folder, tweets, *more):
    return [o for o in run_overrides(folder, tweets) if o != "logger=none"] + ["logger=wandb", *more]


def test_offline_without_a_key(small_tweets, tmp_path):
    fit(configured(*overrides(tmp_path, small_tweets)))
    text = json.dumps(records(tmp_path / "run"))
    assert "val/macro_f1" in text and "train/loss" in text and "layer_decay" in text
    assert exit_code(tmp_path / "run") == 0 and wandb.run is None


def test_a_crash_closes_the_run_as_failed(small_tweets, tmp_path):
    stop = ["+callbacks.stop._target_=tests.integration.stop.Stop"]
    with pytest.raises(KeyError, match="power cut"):
        fit(configured(*overrides(tmp_path, small_tweets, *stop)))
    assert exit_code(tmp_path / "run") == 1 and wandb.run is None


def test_online_without_a_key_is_refused_at_once(small_tweets, tmp_path):
    with pytest.raises(ConfigError, match="WANDB_API_KEY is not set.*logger.wandb.mode=offline"):
        fit(configured(*overrides(tmp_path, small_tweets, "logger.wandb.mode=online")))
