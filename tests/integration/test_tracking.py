"""Tracking with W&B (offline), TensorBoard and CSV: what is logged, after a crash, a resume and without a network too."""

import csv
import json
import socket
import subprocess
import sys

import pytest

from sodaops.errors import ConfigError
from sodaops.io import runs
from tests.conftest import configured, lazy, run_overrides

fit = lazy("sodaops.training.fit")
pipeline = lazy("sodaops.pipeline")
tracking = lazy("sodaops.training.tracking")
wandb = lazy("wandb")

BARE = ("export.variants=[]", "evaluate.split=none")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _no_mode(no_account, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)


def records(run_dir):
    (file,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def exit_code(run_dir):
    (entry,) = [record["exit"] for record in records(run_dir) if "exit" in record]
    return int(entry.get("exit_code", entry.get("exitCode", 0)))


def overrides(folder, tweets, *more):
    logger = [] if any(text.startswith("logger=") for text in more) else ["logger=wandb"]
    return [o for o in run_overrides(folder, tweets) if o != "logger=none"] + [*logger, *more]


def test_earlier_metrics_are_renamed_and_kept(tmp_path):
    """Also when one of the numbered folders was deleted."""
    config = configured(f"run_dir={tmp_path}", "logger=csv")
    for name in ("metrics", "metrics.1", "metrics.3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text(name)
    for new in ("metrics.2", "metrics.4"):
        tracking.make_loggers(config, tmp_path, [], None)
        (tmp_path / "metrics").mkdir(exist_ok=True)
        assert (tmp_path / new).is_dir()
    assert [(tmp_path / f"metrics.{n}/metrics.csv").read_text() for n in (1, 2, 3)] == ["metrics.1", "metrics", "metrics.3"]


def test_a_second_training_in_a_run_folder_is_refused(tmp_path):
    config = configured(f"run_dir={tmp_path / 'run'}")
    for _ in range(2):  # the folder is free again after a training
        with tracking.tracked(config), pytest.raises(ConfigError, match="run_dir="), tracking.tracked(config):
            raise AssertionError
    assert list(tmp_path.iterdir()) == []


def test_a_crash_closes_the_run_as_failed(small_tweets, tmp_path):
    crash = "+callbacks.stop._target_=tests.integration.stop.Crash"
    with pytest.raises(KeyError, match="crash"):
        fit.fit(configured(*overrides(tmp_path, small_tweets, *BARE, crash)))
    assert exit_code(tmp_path / "run") == 1 and wandb.run is None
    run = runs.read_run(tmp_path / "run")
    assert run.status == "failed" and "crash" in run.fields["error"] and run.seconds > 0


@pytest.mark.parametrize("address", [None, "http://127.0.0.1:9", "http://nowhere.invalid", "silent"])
def test_online_without_a_key_or_a_network_is_refused(small_tweets, tmp_path, monkeypatch, address):
    monkeypatch.setattr("sodaops.training.wandb_server._TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections and never answers
        if address is not None:
            monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
            port = silent.getsockname()[1]
            monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}" if address == "silent" else address)
        with pytest.raises(ConfigError, match=r"(WANDB_API_KEY|W&B at http).*logger\.wandb\.mode=offline"):
            fit.fit(configured(*overrides(tmp_path, small_tweets, "logger.wandb.mode=online", *BARE)))
    assert wandb.run is None and not list((tmp_path / "run").glob("wandb/*"))


def test_everything_is_logged_offline(small_tweets, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pipeline.train(configured(*overrides(tmp_path, small_tweets, "logger=many")))
    entries = records(tmp_path / "run")
    text = json.dumps(entries)
    for logged in ("val/macro_f1", "train/loss", "layer_decay", "test/macro_f1", "test/confusion_matrix", "test/roc",
                   "test/precision_recall", "test/errors", "bundle-tweets", "splits-tweets", "fingerprint"):  # fmt: skip
        assert logged in text, logged
    assert any("stats" in record for record in entries), "system metrics"
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


def test_a_resumed_run_continues_its_wandb_run(small_tweets, tmp_path):
    fit.fit(configured(*overrides(tmp_path, small_tweets, *BARE, "trainer.max_epochs=1")))
    first = runs.read_run(tmp_path / "run").fields["wandb_id"]
    last = f"ckpt_path={tmp_path / 'run/checkpoints/last.ckpt'}"
    fit.fit(configured(*overrides(tmp_path, small_tweets, *BARE, last, f"run_dir={tmp_path / 'more'}")))
    assert runs.read_run(tmp_path / "more").fields["wandb_id"] == first
    (kept,) = (tmp_path / "more").glob("wandb/offline-run-*")
    assert kept.name.endswith(first)
    fit.fit(configured(*overrides(tmp_path, small_tweets, *BARE, f"run_dir={tmp_path / 'new'}", "trainer.max_epochs=1")))
    assert runs.read_run(tmp_path / "new").fields["wandb_id"] != first
