"""Training the tiny model: the files of a run, reproducibility, resuming, and settings that are refused."""

import csv
import json
import logging
import os
import shutil
import signal
from contextlib import nullcontext
from itertools import chain

import numpy as np
import pyarrow.parquet as pq
import pytest
from filelock import FileLock

from sodaops.bundle import layout
from sodaops.cli import main
from sodaops.data.preprocess import read_split
from sodaops.errors import ConfigError, ModelError, StorageError, Terminated
from sodaops.inference.predictor import Predictor
from sodaops.io import runs
from tests.conftest import REPO, configured, file_size_limit, lazy, run_overrides

stop = lazy("tests.integration.stop")
fit = lazy("sodaops.training.fit")
metrics_module = lazy("sodaops.tasks.metrics")
pipeline = lazy("sodaops.pipeline")
precision_module = lazy("sodaops.training.precision")
safetensors = lazy("safetensors.torch")
torch = lazy("torch")

NO_EXPORT = ("export.variants=[]", "evaluate.split=none")


def fit_tiny(folder, tweets, *more, **arguments):
    return fit.fit(configured(*run_overrides(folder, tweets, *NO_EXPORT, *more)), **arguments)


def weights(folder):
    parts = [safetensors.load_file(folder / f"run/bundle/{part}.safetensors") for part in ("model", "head")]
    return parts[0] | parts[1]


def checkpoint(folder, name="last"):
    return torch.load(folder / f"run/checkpoints/{name}.ckpt", weights_only=True)


def are_equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="session")
def uninterrupted(small_tweets, tmp_path_factory):
    """Returns a function that gives the folder of an uninterrupted run of three epochs; made once for all workers."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def run(n_accumulated):
        folder = root / f"uninterrupted-{n_accumulated}"
        with FileLock(f"{folder}.lock"):
            if not (folder / "run/bundle/bundle.json").is_file():
                fit_tiny(folder, small_tweets, *CONSTANT_RATE, f"trainer.accumulate_grad_batches={n_accumulated}")
        return folder

    return run


def test_files_of_a_run(trained):
    run = trained / "run"
    files = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    assert [name for name in files if not name.startswith("evaluation/plots/")] == [
        "bundle/bundle.json", "bundle/config.json", "bundle/config.yaml", "bundle/data_manifest.json", "bundle/drift.npz",
        "bundle/head.safetensors", "bundle/model.int8.onnx", "bundle/model.onnx", "bundle/model.safetensors",
        "bundle/tokenizer.json", "bundle/tokenizer_config.json",
        "checkpoints/best.ckpt", "checkpoints/last.ckpt",
        "evaluation/metrics.json", "evaluation/predictions.parquet", "evaluation/report.html",
        "metrics/hparams.yaml", "metrics/metrics.csv", "run.json",
    ]  # fmt: skip
    plots = {path.stem for path in (run / "evaluation/plots").iterdir()}
    assert plots == {"confusion", "reliability", "roc", "precision_recall", "confidence_by_predicted"}


def test_the_bundle_reproduces_the_metrics_of_training(trained):
    predictor = Predictor(trained / "run/bundle", "float32")
    val = read_split(trained / "splits", "val")
    probs = predictor.probs_of_cleaned(val["text"].to_pylist())
    metrics = metrics_module.summary(metrics_module.confusion(val["label_id"].to_numpy().astype(int), probs.argmax(1), 3))
    seen = predictor.info.metrics["val"]
    assert metrics["macro_f1"] == pytest.approx(seen["macro_f1"], abs=1e-6)
    assert metrics["accuracy"] == pytest.approx(seen["accuracy"], abs=1e-6)
    ids = val["label_id"].to_numpy()
    assert -np.log(probs[np.arange(len(ids)), ids]).mean() == pytest.approx(seen["loss"], abs=1e-4)


def test_the_bundle_is_of_the_best_epoch(trained):
    with open(trained / "run/metrics/metrics.csv", newline="") as file:
        scores = [float(row["val/macro_f1"]) for row in csv.DictReader(file) if row["val/macro_f1"]]
    assert len(scores) == 2
    assert Predictor(trained / "run/bundle").info.metrics["val"]["macro_f1"] == pytest.approx(max(scores), abs=1e-6)


def test_checkpoints_of_the_best_and_the_last_epoch(small_tweets, tmp_path):
    # Without learning, the first epoch is the best one.
    fit_tiny(tmp_path, small_tweets, "optim.lr=1e-12", "optim.head_lr=1e-12", "trainer.max_epochs=3")
    assert {name: checkpoint(tmp_path, name)["epoch"] for name in ("best", "last")} == {"best": 0, "last": 2}
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 2


def test_metrics_json_can_be_computed_from_the_predictions(trained):
    metrics = json.loads((trained / "run/evaluation/metrics.json").read_text())
    info = layout.read_info(trained / "run/bundle")
    assert (metrics["bundle_id"], metrics["variant"], metrics["split"]) == (info.bundle_id, "float32", "test")
    assert metrics["same_data"] is True and metrics["data"].items() <= info.data.items()
    assert json.loads((trained / "run/bundle" / layout.DATA).read_text())["cut_share"].keys() == {"max_tokens", "train", "val"}
    assert 0 <= metrics["test"]["cut_share"] < 0.05
    rows = pq.read_table(trained / "run/evaluation/predictions.parquet").to_pydict()
    right = [label == predicted for label, predicted in zip(rows["label"], rows["predicted"], strict=True)]
    assert metrics["test"]["accuracy"] == pytest.approx(sum(right) / len(right))
    assert metrics["test"]["n_rows"] == len(right) == read_split(trained / "splits", "test").num_rows
    interval = metrics["test"]["interval_95"]["macro_f1"]
    assert interval["low"] <= metrics["test"]["macro_f1"] <= interval["high"]


def test_the_same_seed_gives_the_same_weights(trained, small_tweets, tmp_path):
    for seed in (42, 0):
        fit_tiny(tmp_path / f"{seed}", small_tweets, f"seed={seed}")
        assert are_equal(weights(tmp_path / f"{seed}"), weights(trained)) == (seed == 42)


CONSTANT_RATE = ("optim.scheduler.decay=constant", "optim.scheduler.warmup=0.0", "trainer.max_epochs=3")
SIGTERM = "+callbacks.stop={{_target_: tests.integration.stop.SendSigterm, where: {}, epoch: {}}}"
STOPS = {  # overrides that end the first run, its error, the checkpoint to resume from, and whether that is within an epoch
    "after an epoch": (("trainer.max_epochs=1",), None, "last", False),
    "crash": (("+callbacks.stop._target_=tests.integration.stop.Crash",), KeyError, "step", True),
    "SIGTERM": ((SIGTERM.format("batch", 1),), Terminated, "last", True),
    "SIGTERM while accumulating gradients": ((SIGTERM.format("batch", 1),), Terminated, "last", True),
    "SIGTERM in a validation": ((SIGTERM.format("validation", 1),), Terminated, "last", False),
    "SIGTERM in the last validation": ((SIGTERM.format("validation", 2),), Terminated, "last", False),
}


@pytest.mark.parametrize("how", STOPS)
def test_a_resumed_run_equals_an_uninterrupted_one(small_tweets, uninterrupted, tmp_path, how):
    stop, error, name, within_epoch = STOPS[how]
    n_accumulated = 3 if "accumulating" in how else 1
    settings = [*CONSTANT_RATE, f"trainer.accumulate_grad_batches={n_accumulated}"]
    settings += ["checkpoint.every_n_train_steps=7"] if name == "step" else []
    complete, interrupted = uninterrupted(n_accumulated), tmp_path / "interrupted"
    hint = f"run_dir={interrupted / 'run'} ckpt_path=last" if error is Terminated else "crash"
    with pytest.raises(error, match=hint) if error else nullcontext():
        fit_tiny(interrupted, small_tweets, *settings, *stop)
    step, n_batches = checkpoint(interrupted, name)["global_step"], checkpoint(complete)["global_step"] // 3
    assert (step % n_batches != 0) == within_epoch and step >= n_batches
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    resumed = interrupted if "last" in how else tmp_path / "resumed"  # in another folder a finished run cannot be resumed
    fit_tiny(resumed, small_tweets, *settings, f"ckpt_path={interrupted}/run/checkpoints/{name}.ckpt")
    first, second = checkpoint(complete), checkpoint(resumed)
    assert first["global_step"] == second["global_step"] and are_equal(first["state_dict"], second["state_dict"])
    assert are_equal(weights(complete), weights(resumed))
    first, second = (last["optimizer_states"][0]["state"] for last in (first, second))
    assert all(torch.equal(first[key]["exp_avg_sq"], second[key]["exp_avg_sq"]) for key in first)


def test_debug_overfit_reaches_a_low_loss(small_tweets, tmp_path):
    overrides = [o for o in run_overrides(tmp_path, small_tweets, *NO_EXPORT) if "max_epochs" not in o]
    fit.fit(
        configured(*overrides, "debug=overfit", "optim.lr=3e-3", "optim.head_lr=3e-3", "logger=csv", "optim.batch_tokens=256")
    )
    with open(tmp_path / "run/metrics/metrics.csv", newline="") as file:
        losses = [float(row["train/loss_epoch"]) for row in csv.DictReader(file) if row.get("train/loss_epoch")]
    assert len(losses) == 60 and losses[0] > 0.7 and losses[-1] < 0.1


@pytest.mark.parametrize(
    "batches",
    [
        ("optim.batch_tokens=8192",),  # fewer batches than the trace would record
        ("optim.batch_tokens=256", "trainer.max_steps=7", "trainer.val_check_interval=6"),  # ends while recording
    ],
)
def test_debug_profile_logs_a_table_and_writes_a_trace(small_tweets, tmp_path, caplog, batches):
    caplog.set_level(logging.INFO, "sodaops")
    fit_tiny(tmp_path, small_tweets, "debug=profile", *batches)
    assert "aten::" in caplog.text and "backward" in caplog.text  # the slowest operators; which ones depends on the machine
    names = {event.get("name") for event in json.loads((tmp_path / "run/trace.json").read_text())["traceEvents"]}
    assert "aten::addmm" in names


def test_fast_dev_run_writes_no_bundle(small_tweets, tmp_path):
    overrides = [o for o in run_overrides(tmp_path, small_tweets) if "max_epochs" not in o]
    result = pipeline.train(configured(*overrides, "debug=fast_dev_run"))
    assert result.score is None and result.bundle_dir is None and not (tmp_path / "run/bundle").exists()


def test_training_with_balanced_weights_and_hard_labels_and_without_an_evaluation(small_tweets, tmp_path):
    changed = ["loss.class_weights=balanced", "optim.vote_weight=0.0", "loss.label_smoothing=0.1", "model.pooling=cls"]
    result = pipeline.train(configured(*run_overrides(tmp_path, small_tweets, *NO_EXPORT, *changed)))
    info = layout.read_info(tmp_path / "run/bundle")
    assert info.pooling == "cls" and result.score == info.metrics["val"]["macro_f1"] > 0
    assert not (tmp_path / "run/evaluation").exists()


def test_a_loss_that_is_not_finite_is_an_error(small_tweets, tmp_path):
    settings = ["optim.lr=1e30", "optim.head_lr=1e30", "trainer.gradient_clip_val=null", "optim.scheduler.warmup=0.0"]
    with pytest.raises(ModelError, match=r"(nan|inf).*optim\.lr"):
        fit_tiny(tmp_path, small_tweets, *settings)
    assert not (tmp_path / "run/bundle").exists()


def test_ckpt_path_last_in_a_command_that_is_repeated(small_tweets, tmp_path):
    """A scheduler may repeat a command: before the first checkpoint, after one of two epochs, and after both."""
    checkpoints = []
    for epochs in (1, 2, 2):
        fit_tiny(tmp_path, small_tweets, f"trainer.max_epochs={epochs}", "ckpt_path=last")
        checkpoints.append(checkpoint(tmp_path))
    _, second, third = checkpoints
    assert [last["epoch"] for last in checkpoints] == [0, 1, 1] and second["global_step"] == third["global_step"]
    assert are_equal(second["state_dict"], third["state_dict"])
    assert runs.read_run(tmp_path / "run").status == "finished"


def test_max_epochs_auto(small_tweets, tmp_path):
    auto = ("trainer.max_epochs=auto", "optim.batch_tokens=384", "logger=csv", "early_stopping.patience=null")
    fit_tiny(tmp_path / "complete", small_tweets, *auto)
    steps = checkpoint(tmp_path / "complete")["global_step"]
    n_epochs = runs.read_run(tmp_path / "complete/run").params["trainer.max_epochs"]
    assert n_epochs == checkpoint(tmp_path / "complete")["epoch"] + 1 and 3 < n_epochs < 10
    assert 100 <= steps < 100 + steps // n_epochs
    for name in ("bundle/config.yaml", "metrics/hparams.yaml"):
        assert f"max_epochs: {n_epochs}\n" in (tmp_path / "complete/run" / name).read_text()
    last = tmp_path / "complete/run/checkpoints/last.ckpt"
    with pytest.raises(ConfigError, match=rf"{n_epochs} epochs.*trainer\.max_epochs"):
        fit_tiny(tmp_path / "more", small_tweets, *auto, f"ckpt_path={last}")
    # Interrupted with the number written out, and resumed in place
    with pytest.raises(Terminated):
        fit_tiny(tmp_path / "stopped", small_tweets, *auto[1:], f"trainer.max_epochs={n_epochs}", SIGTERM.format("batch", 3))
    for _ in range(2):  # the second time it is finished, and stays as it is
        fit_tiny(tmp_path / "stopped", small_tweets, *auto, "ckpt_path=last")
        assert checkpoint(tmp_path / "stopped")["global_step"] == steps
    assert are_equal(weights(tmp_path / "complete"), weights(tmp_path / "stopped"))
    fit_tiny(tmp_path / "short", small_tweets, *auto, f"trainer.max_steps={steps // n_epochs}")
    assert checkpoint(tmp_path / "short")["global_step"] == steps // n_epochs


def test_ckpt_path_last_does_not_continue_a_run_that_stopped_early(small_tweets, tmp_path):
    not_learning = ("optim.lr=1e-12", "optim.head_lr=1e-12", "early_stopping.patience=1")
    for _ in range(2):
        fit_tiny(tmp_path, small_tweets, *not_learning, "trainer.max_epochs=9", "ckpt_path=last")
        assert checkpoint(tmp_path)["epoch"] == 1


@pytest.fixture
def checkpoints(trained, tmp_path):
    """The last checkpoint of a finished run; one of two processes and two invalid ones are in ``tmp_path``."""
    last = checkpoint(trained)
    torch.save({**last, "begun_with": {**last["begun_with"], "processes": 2}}, tmp_path / "two.ckpt")
    torch.save({"state_dict": last["state_dict"]}, tmp_path / "weights.ckpt")
    (tmp_path / "bad.ckpt").write_bytes(b"no checkpoint")
    return {"last": trained / "run/checkpoints/last.ckpt"}


@pytest.mark.parametrize(
    ("name", "change", "key"),
    [
        ("none", "seed=42", ""),
        ("bad", "seed=42", ""),
        ("weights", "seed=42", ""),
        ("last", "trainer.max_epochs=2", r"trainer\.max_epochs"),
        ("last", "data.labels=[positive,neutral,negative]", r"data\.labels"),
        ("last", "optim.lr=1e-6", r"optim\.lr=1e-06"),
        ("last", "seed=7", "seed=7"),
        ("last", "data.max_rows=500", "fingerprint"),
        ("last", "trainer.precision=bf16-mixed", r"trainer\.precision"),
        ("last", "+model.overrides.vocab_size=31000", "another model"),
        ("two", "seed=42", "processes=1"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(checkpoints, small_tweets, tmp_path, name, change, key):
    path = checkpoints.get(name, tmp_path / f"{name}.ckpt")
    with pytest.raises(ConfigError, match=rf"ckpt_path=.*{name}\.ckpt.*{key}"):
        fit_tiny(tmp_path, small_tweets, "trainer.max_epochs=4", change, f"ckpt_path={path}")
    assert not (tmp_path / "run/bundle").exists()


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("trainer.devices=2", r"trainer\.devices"),  # fit starts no processes
        ("trainer.max_epochs=0", r"trainer\.max_epochs"),
        ("trainer.max_steps=3", r"trainer\.max_steps"),
        ("trainer.check_val_every_n_epoch=9", r"trainer\.check_val_every_n_epoch"),
        ("+callbacks.mine._target_=no.such.Class", r"callbacks\.mine.*no\.such"),
        ("+callbacks.mine._target_=collections.Counter", r"callbacks\.mine.*Counter"),
        ("optim.frozen_layers=0", r"optim\.frozen_layers=0.*model\.random_weights"),
    ],
)
def test_unusable_training_settings_are_refused(small_tweets, tmp_path, change, key):
    with pytest.raises(ConfigError, match=key):
        fit_tiny(tmp_path, small_tweets, "trainer.accelerator=cpu", change)
    assert not (tmp_path / "run/bundle").exists()


def test_a_missing_gpu(small_tweets, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match=r"trainer\.accelerator=gpu"):
        fit_tiny(tmp_path, small_tweets, "trainer.accelerator=gpu")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_are_clipped_with_a_fused_optimizer(small_tweets, tmp_path, precision):
    stop.Gradients.norms.clear()
    settings = [f"trainer.precision={precision}", "trainer.max_epochs=1", "trainer.gradient_clip_val=0.001"]
    fit_tiny(tmp_path, small_tweets, *settings, callbacks=[stop.Gradients()])
    assert len(stop.Gradients.norms) > 2 and max(stop.Gradients.norms) == pytest.approx(0.001, rel=0.01)
    assert stop.Gradients.fused == {True}


def test_too_few_steps_are_logged_and_the_precision_that_auto_chooses_is_saved(small_tweets, tmp_path, caplog):
    caplog.set_level(logging.INFO, "sodaops")
    settings = ("logger=csv", "trainer.accelerator=cpu", "trainer.precision=auto", "trainer.max_epochs=1")
    fit_tiny(tmp_path, small_tweets, *settings, "optim.batch_tokens=4096")
    assert "optim.batch_tokens=4096" in caplog.text
    expected = "bf16-mixed" if precision_module.has_bfloat16("cpu") else "32-true"
    for path in ("run/bundle/config.yaml", "run/metrics/hparams.yaml"):
        assert f"precision: {expected}\n" in (tmp_path / path).read_text()


def test_batches_are_shuffled_and_the_learning_rate_changes_by_step(small_tweets, tmp_path):
    fit_tiny(tmp_path, small_tweets, "+callbacks.seen._target_=tests.integration.stop.Seen")
    batches, rates, seeds = stop.Seen.batches, stop.Seen.rates, stop.Seen.seeds
    first, second = batches[: len(batches) // 2], batches[len(batches) // 2 :]
    assert first != second and sorted(chain(*first)) == sorted(chain(*second))
    assert len(set(rates)) > len(rates) // 2 and rates[0] < max(rates) > rates[-1]
    assert len(set(seeds)) == len(seeds)


COMPILE = "+callbacks.compile._target_=sodaops.training.callbacks.Compile"


@pytest.mark.deep
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_training_gives_a_similar_loss(small_tweets, trained, tmp_path):
    traced = "+callbacks.compile.backend=aot_eager"  # without compiling C++, which takes a minute
    compiled = fit_tiny(tmp_path, small_tweets, COMPILE, traced)
    plain = layout.read_info(trained / "run/bundle")
    assert compiled.metrics["loss"] == pytest.approx(plain.metrics["val"]["loss"], rel=0.05)


def test_compiling_needs_a_compiler(small_tweets, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(ConfigError, match=r"callbacks: .*C\+\+"):
        fit_tiny(tmp_path, small_tweets, COMPILE)


def test_a_full_disk_while_training(small_tweets, run, tmp_path):
    params = str(REPO / "params.yaml")
    with file_size_limit(500_000):
        code, _, error = run("train", "--params", params, *_tiny_params(tmp_path, small_tweets))
    assert code == 2 and error.splitlines()[-1].startswith(f"StorageError: {tmp_path / 'run'}"), error
    assert not (tmp_path / "run/bundle").exists()


def _tiny_params(folder, tweets):
    settings = configured("model=tiny").model
    return [
        "model.random_weights=true",
        *[f"model.overrides.{key}={value}" for key, value in settings.overrides.items()],
        *[o for o in run_overrides(folder, tweets) if "=" in o and not o.startswith(("model=", "logger="))],
    ]


def test_storage_errors_name_the_run_folder(small_tweets, tmp_path):
    (tmp_path / "run").write_text("a file in the way")
    with pytest.raises(StorageError, match=str(tmp_path / "run")):
        fit_tiny(tmp_path, small_tweets)


def test_evaluate_refuses_other_splits(trained, small_tweets, tmp_path, capsys):
    bundle = f"evaluate.bundle={trained / 'run/bundle'}"
    other = [f"data.path={small_tweets}", f"evaluate.splits_dir={tmp_path / 'social'}", "data.cleaning=social"]
    assert main(["preprocess", *other]) == 0
    missing = f"evaluate.splits_dir={tmp_path / 'none'}"
    for arguments, key in (([bundle, *other], "cleaning=social"), ([bundle, missing], "none"), ([missing], "evaluate.bundle")):
        assert main(["evaluate", *arguments]) == 2
        assert key in capsys.readouterr().err


def test_evaluate_on_val_with_slices_and_baselines(trained, tmp_path, small_tweets, capsys):
    splits = f"evaluate.splits_dir={tmp_path / 'splits'}"
    assert main(["preprocess", splits, f"data.path={small_tweets}", "data.slice_columns=[votes_neutral]"]) == 0
    where = [f"evaluate.bundle={trained / 'run/bundle'}", f"evaluate.output_dir={tmp_path / 'out'}"]
    assert main(["evaluate", *where, splits, "evaluate.split=val", "evaluate.n_bootstrap=100"]) == 0
    shown = capsys.readouterr().out
    assert "TF-IDF + logistic regression" in shown and "report: " in shown
    found = json.loads((tmp_path / "out/metrics.json").read_text())["val"]
    assert found["baselines"]["majority"]["macro_f1"] < found["baselines"]["tfidf"]["macro_f1"]
    assert sum(entry["n_rows"] for entry in found["slices"]["votes_neutral"].values()) == found["n_rows"]
    assert (tmp_path / "out/plots/confidence_by_slice_votes_neutral.png").stat().st_size > 5000
