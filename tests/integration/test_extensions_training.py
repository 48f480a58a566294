"""Metrics, optimizers, schedulers and loggers of a user's own package: what a training with them does."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from sodaops.cli import main
from sodaops.config.schema import BUILT_IN_METRICS
from sodaops.errors import ConfigError, Terminated
from sodaops.io import runs
from tests.conftest import configured, lazy, run_overrides

compose = lazy("sodaops.config.compose")
evaluation = lazy("sodaops.tasks.metrics")
fit = lazy("sodaops.training.fit")
metrics_module = lazy("sodaops.modeling.metrics")
mlflow = lazy("mlflow")
pipeline = lazy("sodaops.pipeline")
selection = lazy("sodaops.search.selection")
sk = lazy("sklearn.metrics")
tracking = lazy("sodaops.training.tracking")
torch = lazy("torch")
wandb_sweep = lazy("sodaops.search.wandb_sweep")

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


CRASH = ("+callbacks.stop._target_=tests.integration.stop.Crash",)
MLFLOW = "+logger.mlflow={_target_: lightning.pytorch.loggers.MLFlowLogger, experiment_name: reviews}"


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


@pytest.mark.parametrize(
    ("method", "kind", "more"),
    [("log_metrics", "KeyError", ()), ("log_metrics", "ConnectionError", ()), ("finalize", "ValueError", ()), ("", "", CRASH)],
)
def test_errors_of_a_logger_after_the_start_name_it(config_of, tmp_path, method, kind, more):
    failing = f"+logger.second={{_target_: tests.integration.stop.Failing, method: '{method}', error: '{kind}'}}"
    config = config_of("failed", *BARE, "logger=journal", failing, *more)
    named = rf"logger\.second: tests\.integration\.stop\.Failing raised {kind}: .*lost"
    with pytest.raises(ConfigError if method else KeyError, match=named if method else "crash"):
        fit.fit(config)
    assert runs.read_run(tmp_path / "failed/run").status == "failed"
    assert (tmp_path / "failed/run/checkpoints/last.ckpt").exists() == (method != "log_metrics")


KAPPA = "+metrics.kappa._target_=torchmetrics.classification.MulticlassCohenKappa"  # num_classes is added


def test_metrics_are_everywhere_and_choose_the_epoch(config_of, tmp_path, capsys):
    config = config_of(
        "measured", "+metrics=distance", KAPPA, "checkpoint.monitor=val/distance", "logger=csv", "optim.head_lr=0.05",
        "export.variants=[float32]",
    )  # fmt: skip
    result, run = pipeline.train(config), tmp_path / "measured/run"
    with open(run / "metrics/metrics.csv", newline="") as file:
        epochs = [row for row in csv.DictReader(file) if row["val/distance"]]
    assert len(epochs) == 2 and all(-1 <= float(row["val/kappa"]) <= 1 for row in epochs)
    val = result.info.metrics["val"]
    assert result.score == pytest.approx(val["distance"]) == min(float(row["val/distance"]) for row in epochs)
    # After the training, from the probabilities of the ONNX graph
    rows = pq.read_table(run / "evaluation/predictions.parquet").to_pydict()
    order = dict(zip(result.info.labels, range(3), strict=True))
    pairs = [(order[row], order[predicted]) for row, predicted in zip(rows["label"], rows["predicted"], strict=True)]
    measured = json.loads((run / "evaluation/metrics.json").read_text())["test"]
    assert measured["distance"] == pytest.approx(np.mean([(a - b) ** 2 for a, b in pairs]))
    assert measured["kappa"] == pytest.approx(sk.cohen_kappa_score(*zip(*pairs, strict=True)), abs=1e-6)
    record = runs.read_run(run)
    assert record.metrics["test/distance"] == measured["distance"] and record.metrics["val/kappa"] == val["kappa"]
    table = runs.format_runs([record]).splitlines()[0].split()
    assert {"val/distance", "test/distance", "val/kappa", "test/kappa"} < {*table}
    assert ">distance<" in (run / "evaluation/report.html").read_text()
    assert main(["report", str(run)]) == 0
    assert {"distance on val by step", "kappa on val by step"} <= {
        *re.findall('aria-label="([^"]+)"', (run / "project_report.html").read_text())
    }
    # A bundle alone: its configuration names its metrics
    capsys.readouterr()
    assert main(["evaluate", str(run / "bundle"), "evaluate.split=val", f"evaluate.splits_dir={tmp_path}/measured/splits"]) == 0
    output = capsys.readouterr().out
    assert f"distance {val['distance']:.4g}  kappa {val['kappa']:.4g}" in output


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (["+metrics.mse._target_=torchmetrics.MeanSquaredError"], "metrics.mse: .*MeanSquaredError raised"),  # another task
        (
            ["+metrics.many._target_=torchmetrics.classification.MultilabelAccuracy"],
            r"metrics\.many: .*MultilabelAccuracy raised",
        ),
        (["+metrics.two._target_=torchmetrics.classification.BinaryAccuracy"], r"metrics\.two: "),
        (["+metrics.f1={_target_: torchmetrics.classification.MulticlassF1Score, average: none}"], r"metrics\.f1: .*\[3\]"),
        (["+metrics.kappa={_target_: torchmetrics.CohenKappa}"], r"metrics\.kappa: .*task"),
        (["+metrics.kappa={_target_: textlab.distance.MeanDistance, powr: 2}"], r"metrics\.kappa\.powr .*power"),
        (["+metrics.mine._target_=textlab.distance.Nothing"], r"metrics\.mine\._target_=textlab\.distance\.Nothing"),
        (["+metrics.sh={_target_: subprocess.getoutput, cmd: exit}"], r"metrics\.sh\._target_=subprocess.*Metric"),
        (
            ["+metrics.in={_target_: torchmetrics.MinMaxMetric, base_metric: {_target_: os.getcwd}}"],
            r"base_metric\._target_=os",
        ),
    ],
)
def test_unusable_metrics_are_refused(config_of, sections, message):
    with pytest.raises(ConfigError, match=message):
        metrics_module.OwnMetrics(config_of("refused", *sections).metrics, 3)


def test_a_metric_that_fails_ends_the_training_before_the_first_epoch(config_of, tmp_path):
    config = config_of("failed", *BARE, "+metrics.mse._target_=torchmetrics.MeanSquaredError", "trainer.max_epochs=1")
    with pytest.raises(ConfigError, match=r"metrics\.mse"):
        fit.fit(config)
    assert not (tmp_path / "failed/run/checkpoints").exists()


@pytest.mark.parametrize(
    ("metric", "settings", "mode"),
    [
        ("torchmetrics.classification.MulticlassCohenKappa", (), "max"),
        ("torchmetrics.classification.MulticlassCalibrationError", (), "min"),
        ("torchmetrics.classification.MulticlassCalibrationError", ("checkpoint.mode=max",), "max"),
        ("torchmetrics.CohenKappa", (), "checkpoint.mode"),  # a wrapper, which does not say so
        ("no.such.Metric", (), "metrics.mine._target_"),
    ],
)
def test_the_direction_of_a_monitored_metric(metric, settings, mode):
    overrides = (f"+metrics.mine._target_={metric}", "checkpoint.monitor=val/mine", *settings)
    config = configured("search=smoke", *overrides)
    params = {"metrics.mine._target_": metric, "checkpoint.monitor": "val/mine", "checkpoint.mode": config.checkpoint.mode}
    candidate = selection.Candidate("run", "finished", 0.5, None, 1.0, params, [])
    if mode in ("min", "max"):
        assert wandb_sweep.sweep_definition(config, [])["metric"] == {"name": "val/mine", "goal": f"{mode}imize"}
        assert selection.direction_of("val/mine", [candidate]) == f"{mode}imize"
    else:
        with pytest.raises(ConfigError, match=mode):
            wandb_sweep.sweep_definition(config, [])


def test_two_metrics_of_one_name_are_refused(run, tmp_path):
    twice = ("+metrics.kappa._target_=a.B", "+metrics.kappa._target_=c.D")
    (tmp_path / "mine/metrics").mkdir(parents=True)
    (tmp_path / "mine/metrics/twice.yaml").write_text("kappa: {_target_: a.B}\nkappa: {_target_: c.D}\n")
    for arguments in (twice, ("--config-dir", "mine", "+metrics=twice")):
        code, _, error = run("train", *arguments)
        assert code == 2 and "kappa" in error


def test_names_of_built_in_metrics():
    probs, ids = np.eye(3), np.arange(3)
    assert {*evaluation.measure(probs, ids, ["a", "b", "c"], 100)} < BUILT_IN_METRICS


def leaves(value):
    if isinstance(value, dict):
        return [leaf for key in sorted(value, key=str) for leaf in leaves(value[key])]
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list | tuple) else [value]
