"""Metrics, optimizers, schedulers and loggers of a user's own package: what a training with them does."""

import json
from pathlib import Path

import pytest

from sodaops.errors import ConfigError, Terminated
from sodaops.io import runs
from tests.conftest import lazy, run_overrides

compose = lazy("sodaops.config.compose")
fit = lazy("sodaops.training.fit")
mlflow = lazy("mlflow")
pipeline = lazy("sodaops.pipeline")
tracking = lazy("sodaops.training.tracking")
torch = lazy("torch")

BARE = ("export.variants=[]", "evaluate.split=none")
SGD = (
    "optim.optimizer._target_=torch.optim.SGD", "+optim.optimizer.momentum=0.9", "~optim.scheduler",
    "+optim.scheduler._target_=torch.optim.lr_scheduler.CosineAnnealingLR",
)  # fmt: skip


@pytest.fixture
def config_of(extensions, small_tweets, tmp_path):
    """Composes a short training in a folder, with the package's YAML files."""

    def make(name, *overrides):
        return compose.compose(run_overrides(tmp_path / name, small_tweets, *overrides), str(extensions))

    return make


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [("optim=lion",), SGD])
def test_an_optimizer_and_a_scheduler_resume_bit_for_bit(config_of, tmp_path, optimizer):
    overrides = (*BARE, *optimizer)
    fit.fit(config_of("complete", *overrides))
    stop = "+callbacks.stop={_target_: tests.integration.stop.SendSigterm, where: batch, epoch: 1, batch: 3}"
    with pytest.raises(Terminated):
        fit.fit(config_of("stopped", *overrides, stop))
    fit.fit(config_of("stopped", *overrides, "ckpt_path=last"))
    files = (tmp_path / name / "run/checkpoints/last.ckpt" for name in ("complete", "stopped"))
    first, second = (torch.load(file, weights_only=True) for file in files)
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        pairs = zip(leaves(first[key]), leaves(second[key]), strict=True)
        assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs), key
    state = first["optimizer_states"][0]
    assert state["state"][0].keys() == ({"mean"} if "lion" in optimizer[0] else {"momentum_buffer"})
    assert len({group["initial_lr"] for group in state["param_groups"]}) > 2  # each layer has its own learning rate
    run = runs.read_run(tmp_path / "complete/run")
    assert run.params["optim.optimizer._target_"] in ("textlab.lion.Lion", "torch.optim.SGD")


MLFLOW = "+logger.mlflow={_target_: lightning.pytorch.loggers.MLFlowLogger, experiment_name: reviews}"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning:mlflow")
def test_loggers_get_configuration_metrics_and_artifacts(config_of, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    config = config_of("logged", "logger=journal", MLFLOW, "export.variants=[float32]", "trainer.max_epochs=1")
    evaluated = pipeline.train(config).evaluated
    folder = tmp_path / "logged/run"
    lines = [json.loads(line) for line in (folder / "journal/journal.jsonl").read_text().splitlines()]
    assert lines[0]["kind"] == "config" and lines[0]["optim"]["lr"] == config.optim.lr
    metrics = {name: value for line in lines for name, value in line.items() if line["kind"] == "metrics"}
    assert metrics["test/macro_f1"] == evaluated.metrics["macro_f1"] and metrics["val/accuracy"] > 0
    client = mlflow.MlflowClient(f"file:{folder}/mlflow")
    experiment = client.get_experiment_by_name("reviews")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params["optim/lr"] == str(config.optim.lr) and run.info.status == "FINISHED"
    assert run.data.metrics["test/macro_f1"] == evaluated.metrics["macro_f1"]
    for place in (folder / "journal", Path(run.info.artifact_uri.removeprefix("file:"))):
        for name in ("bundle/bundle.json", "evaluation/report.html"):
            assert (place / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{_target_: no.such.Logger}", r"logger\.mine\._target_=no\.such\.Logger"),
        ("{_target_: textlab.journal.Journal, flie: x}", r"logger\.mine\.flie .*did you mean file"),
        ("{_target_: textlab.journal.Journal, save_dir: /dev/null}", r"logger\.mine: .*FileExistsError"),
        ("{_target_: textlab.journal.Journal, file: ..}", r"logger\.mine: .*IsADirectoryError"),  # at the first write
        ("{_target_: fractions.Fraction}", r"logger\.mine.*Logger, got Fraction"),
    ],
)
def test_unusable_loggers_are_refused(config_of, tmp_path, section, message):
    config, loggers = config_of("refused", f"+logger.mine={section}"), []
    with pytest.raises(ConfigError, match=message):
        tracking.make_loggers(config, tmp_path, loggers, None)


def leaves(value):
    if isinstance(value, dict):
        return [leaf for key in sorted(value, key=str) for leaf in leaves(value[key])]
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list | tuple) else [value]
