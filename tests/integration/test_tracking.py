"""Where runs are told, for real: W&B offline, TensorBoard, CSV, and how a crash, a resume and no network are told."""

import csv
import json
import socket
import subprocess
import sys
import time

import pytest
import wandb

from sodaops.cli.training import train
from sodaops.errors import ConfigError
from sodaops.io import runs
from sodaops.training.fit import fit
from sodaops.training.tracking import make_loggers
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
    logger = [] if any(text.startswith("logger=") for text in more) else ["logger=wandb"]
    return [o for o in run_overrides(folder, tweets) if o != "logger=none"] + [*logger, *more]


def test_what_was_logged_before_keeps_its_numbers(tmp_path):
    """Also where somebody has taken one of the folders away."""
    config = configured(f"run_dir={tmp_path}", "logger=csv")
    for name in ("metrics", "metrics.1", "metrics.3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text(name)
    for new in ("metrics.2", "metrics.4"):
        make_loggers(config, tmp_path, [], None)
        (tmp_path / "metrics").mkdir(exist_ok=True)
        assert (tmp_path / new).is_dir()
    assert [(tmp_path / f"metrics.{n}/metrics.csv").read_text() for n in (1, 2, 3)] == ["metrics.1", "metrics", "metrics.3"]


def test_a_crash_closes_the_run_as_failed(small_tweets, tmp_path):
    stop = ["+callbacks.stop._target_=tests.integration.stop.Stop"]
    with pytest.raises(KeyError, match="power cut"):
        fit(configured(*overrides(tmp_path, small_tweets, *stop)))
    assert exit_code(tmp_path / "run") == 1 and wandb.run is None
    run = runs.read_run(tmp_path / "run")
    assert run.status == "failed" and "power cut" in run.fields["error"] and run.seconds > 0


def test_online_without_a_key_is_refused_at_once(small_tweets, tmp_path):
    with pytest.raises(ConfigError, match="WANDB_API_KEY is not set.*logger.wandb.mode=offline"):
        fit(configured(*overrides(tmp_path, small_tweets, "logger.wandb.mode=online")))


@pytest.mark.slow
@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "http://nowhere.invalid", "silent"])
def test_a_key_without_a_network_is_told_in_seconds(small_tweets, tmp_path, monkeypatch, address):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"http://127.0.0.1:{mute.getsockname()[1]}" if address == "silent" else address  # it takes, and never answers
        monkeypatch.setenv("WANDB_BASE_URL", address)
        monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
        begun = time.monotonic()
        with pytest.raises(
            ConfigError, match=r"W&B at .* does not answer .*Set logger.wandb.mode=offline|set logger.wandb.mode=offline"
        ):
            fit(configured(*overrides(tmp_path, small_tweets)))
        assert time.monotonic() - begun < 30
    assert wandb.run is None and not list((tmp_path / "run").glob("wandb/*"))


@pytest.mark.slow
def test_everything_is_logged_offline(small_tweets, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(configured(*overrides(tmp_path, small_tweets, "logger=many")))
    found = records(tmp_path / "run")
    text = json.dumps(found)
    for logged in ("val/macro_f1", "train/loss", "layer_decay", "test/macro_f1", "test/confusion_matrix", "test/roc",
                   "test/precision_recall", "test/errors", "bundle-tweets", "splits-tweets", "fingerprint"):  # fmt: skip
        assert logged in text, logged
    assert any("stats" in record for record in found), "system metrics"
    assert exit_code(tmp_path / "run") == 0 and wandb.run is None

    run = runs.read_run(tmp_path / "run")
    measured = json.loads((tmp_path / "run/evaluation/metrics.json").read_text())["test"]
    assert run.status == "finished" and run.metrics["test/macro_f1"] == measured["macro_f1"]
    assert run.fields["bundle_id"] == json.loads((tmp_path / "run/bundle/bundle.json").read_text())["bundle_id"]
    board = EventAccumulator(str(tmp_path / "run/tensorboard"))
    board.Reload()
    assert {"val/macro_f1", "train/loss_epoch", "test/macro_f1"} <= set(board.Tags()["scalars"])
    with (tmp_path / "run/metrics/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["test/macro_f1"]) for row in rows if row["test/macro_f1"]] == [pytest.approx(measured["macro_f1"])]


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_the_same_wandb_run(small_tweets, tmp_path):
    fit(configured(*overrides(tmp_path, small_tweets, "trainer.max_epochs=1")))
    first = runs.read_run(tmp_path / "run").fields["wandb_id"]
    last = f"ckpt_path={tmp_path / 'run/checkpoints/last.ckpt'}"
    fit(configured(*overrides(tmp_path, small_tweets, last, f"run_dir={tmp_path / 'more'}")))
    assert runs.read_run(tmp_path / "more").fields["wandb_id"] == first
    (kept,) = (tmp_path / "more").glob("wandb/offline-run-*")
    assert kept.name.endswith(first)
    fit(configured(*overrides(tmp_path, small_tweets, f"run_dir={tmp_path / 'new'}")))
    assert runs.read_run(tmp_path / "new").fields["wandb_id"] != first
