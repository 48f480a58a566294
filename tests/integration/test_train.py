"""Training for real, on the tiny model: what it leaves behind, and that it repeats itself."""

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from itertools import chain
from typing import ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file

from sodaops.bundle import layout
from sodaops.cli import main
from sodaops.cli.training import train
from sodaops.data.preprocess import read_split
from sodaops.errors import ConfigError, ModelError, StorageError, Terminated
from sodaops.evaluation.metrics import confusion, summary
from sodaops.inference.predictor import Predictor
from sodaops.io import runs
from sodaops.training.fit import fit
from sodaops.training.precision import bfloat16_on
from tests.conftest import REPO, configured, run_overrides
from tests.integration.stop import Seen


def weights(folder):
    return load_file(folder / "run/bundle/model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_run_folder_holds_everything(trained):
    run = trained / "run"
    found = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    assert [name for name in found if not name.startswith("evaluation/plots/")] == [
        "bundle/bundle.json", "bundle/config.yaml", "bundle/data_manifest.json", "bundle/drift.npz", "bundle/encoder.json",
        "bundle/model.int8.onnx", "bundle/model.onnx", "bundle/model.safetensors", "bundle/tokenizer.json",
        "checkpoints/best.ckpt", "checkpoints/last.ckpt",
        "evaluation/metrics.json", "evaluation/predictions.parquet", "evaluation/report.html",
        "metrics/hparams.yaml", "metrics/metrics.csv", "run.json",
    ]  # fmt: skip
    plots = {path.stem for path in (run / "evaluation/plots").iterdir()}
    assert plots == {"confusion", "reliability", "roc", "precision_recall", "confidence_by_predicted"}


def test_the_bundle_gives_the_metrics_that_training_saw(trained):
    predictor = Predictor(trained / "run/bundle", "float32")
    val = read_split(trained / "splits", "val")
    probs = predictor.probs_of_cleaned(val["text"].to_pylist())
    found = summary(confusion(val["label_id"].to_numpy().astype(int), probs.argmax(1), 3))
    seen = predictor.info.metrics["val"]
    assert found["macro_f1"] == pytest.approx(seen["macro_f1"], abs=1e-6)
    assert found["accuracy"] == pytest.approx(seen["accuracy"], abs=1e-6)
    ids = val["label_id"].to_numpy()
    assert -np.log(probs[np.arange(len(ids)), ids]).mean() == pytest.approx(seen["loss"], abs=1e-4)


def test_the_kept_epoch_is_the_best(trained):
    with open(trained / "run/metrics/metrics.csv", newline="") as file:
        scores = [float(row["val/macro_f1"]) for row in csv.DictReader(file) if row["val/macro_f1"]]
    assert len(scores) == 2
    assert Predictor(trained / "run/bundle").info.metrics["val"]["macro_f1"] == pytest.approx(max(scores), abs=1e-6)


def test_last_is_the_last_epoch_and_best_the_best(small_tweets, tmp_path):
    # With nothing learned after the first epoch the best is the first, and a resume must go on from the last all the same.
    still = ["optim.lr=1e-12", "optim.head_lr=1e-12", "trainer.max_epochs=3"]
    fit(configured(*run_overrides(tmp_path, small_tweets, *still)))
    epochs = {p.stem: torch.load(p, weights_only=True)["epoch"] for p in (tmp_path / "run/checkpoints").iterdir()}
    assert epochs == {"best": 0, "last": 2}


def test_metrics_json_can_be_computed_from_the_predictions(trained):
    metrics = json.loads((trained / "run/evaluation/metrics.json").read_text())
    info = layout.read_info(trained / "run/bundle")
    assert (metrics["bundle_id"], metrics["variant"], metrics["split"]) == (info.bundle_id, "float32", "test")
    assert metrics["same_data"] is True and metrics["data"] == info.data
    rows = pq.read_table(trained / "run/evaluation/predictions.parquet").to_pydict()
    right = [label == predicted for label, predicted in zip(rows["label"], rows["predicted"], strict=True)]
    assert metrics["test"]["accuracy"] == pytest.approx(sum(right) / len(right))
    assert metrics["test"]["n_rows"] == len(right) == read_split(trained / "splits", "test").num_rows
    interval = metrics["test"]["interval_95"]["macro_f1"]
    assert interval["low"] <= metrics["test"]["macro_f1"] <= interval["high"]


def test_the_same_seed_gives_the_same_weights_and_seed_0_is_one(trained, small_tweets, tmp_path):
    for name, seed in (("again", 42), ("zero", 0)):
        fit(configured(*run_overrides(tmp_path / name, small_tweets, f"seed={seed}")))
    assert same(weights(trained), weights(tmp_path / "again"))
    assert not same(weights(trained), weights(tmp_path / "zero"))


TOLD = "+callbacks.stop={{_target_: tests.integration.stop.Told, where: {}, epoch: {}}}"
STOPS = {  # what ends the first run, with which error, the checkpoint that it leaves, and whether that is within an epoch
    "after an epoch": (("trainer.max_epochs=1",), None, "last", False),
    "a power cut": (("+callbacks.stop._target_=tests.integration.stop.Stop",), KeyError, "step", True),
    "SIGTERM": ((TOLD.format("batch", 1),), Terminated, "last", True),
    "SIGTERM amid a step": ((TOLD.format("batch", 1),), Terminated, "last", True),
    "SIGTERM in a validation": ((TOLD.format("validation", 1),), Terminated, "last", False),
    "SIGTERM in the last validation": ((TOLD.format("validation", 2),), Terminated, "last", False),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", STOPS)
def test_a_resumed_run_equals_an_unbroken_one(small_tweets, tmp_path, how):
    stop, error, name, within = STOPS[how]
    steady = ["optim.schedule=constant", "optim.warmup=0.0", "trainer.max_epochs=3"]
    steady += ["checkpoint.every_n_train_steps=7"] if name == "step" else []
    steady += ["trainer.accumulate_grad_batches=3"] if how == "SIGTERM amid a step" else []
    fit(configured(*run_overrides(tmp_path / "whole", small_tweets, *steady)))
    last = tmp_path / "broken/run/checkpoints" / f"{name}.ckpt"
    with (
        pytest.raises(error, match="power cut" if error is KeyError else f"go on with run_dir={last.parents[1]} ckpt_path=last")
        if error
        else nullcontext()
    ):
        fit(configured(*run_overrides(tmp_path / "broken", small_tweets, *steady, *stop)))
    step = torch.load(last, weights_only=True)["global_step"]
    n_batches = torch.load(tmp_path / "whole/run/checkpoints/last.ckpt", weights_only=True)["global_step"] // 3
    assert (step % n_batches != 0) == within and step >= n_batches
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    resumed = "broken" if "last" in how else "resumed"  # in another folder a finished run is not gone on with
    fit(configured(*run_overrides(tmp_path / resumed, small_tweets, *steady, f"ckpt_path={last}")))
    ends = [torch.load(tmp_path / name / "run/checkpoints/last.ckpt", weights_only=True) for name in ("whole", resumed)]
    assert ends[0]["global_step"] == ends[1]["global_step"]
    assert same(ends[0]["state_dict"], ends[1]["state_dict"])
    assert same(weights(tmp_path / "whole"), weights(tmp_path / resumed))
    states = [end["optimizer_states"][0]["state"] for end in ends]
    assert all(torch.equal(states[0][k]["exp_avg_sq"], states[1][k]["exp_avg_sq"]) for k in states[0])


@pytest.mark.slow
def test_overfit_learns_a_batch_by_heart(small_tweets, tmp_path):
    overrides = [o for o in run_overrides(tmp_path, small_tweets) if "max_epochs" not in o]
    fit(configured(*overrides, "debug=overfit", "optim.lr=3e-3", "optim.head_lr=3e-3", "logger=csv", "optim.batch_tokens=256"))
    with open(tmp_path / "run/metrics/metrics.csv", newline="") as file:
        losses = [float(row["train/loss_epoch"]) for row in csv.DictReader(file) if row.get("train/loss_epoch")]
    assert len(losses) == 60 and losses[0] > 0.7 and losses[-1] < 0.1


@pytest.mark.slow
def test_the_profile_has_a_table_by_operator_and_a_trace(small_tweets, tmp_path, capsys):
    fit(configured(*run_overrides(tmp_path, small_tweets, "debug=profile", "optim.batch_tokens=256")))
    shown = capsys.readouterr().out
    assert "aten::addmm" in shown and "backward" in shown
    names = {event.get("name") for event in json.loads((tmp_path / "run/trace.json").read_text())["traceEvents"]}
    assert "aten::addmm" in names


@pytest.mark.slow
@pytest.mark.parametrize(
    "few", [("optim.batch_tokens=8192",), ("optim.batch_tokens=256", "trainer.max_steps=7", "trainer.val_check_interval=6")]
)
def test_the_profile_of_a_few_batches(small_tweets, tmp_path, capsys, few):
    fit(configured(*run_overrides(tmp_path, small_tweets, "debug=profile", *few)))
    assert "aten::addmm" in capsys.readouterr().out and (tmp_path / "run/trace.json").is_file()


def test_few_steps_are_noted_and_frozen_random_weights_refused(small_tweets, tmp_path, capsys):
    fit(configured(*run_overrides(tmp_path, small_tweets, "optim.batch_tokens=4096", "trainer.max_epochs=1")))
    assert re.search(r"note: optim.batch_tokens=4096 makes about [234] steps an epoch; with 768 there", capsys.readouterr().out)
    with pytest.raises(ConfigError, match=r"optim.frozen_layers=0: model.random_weights .*set optim.frozen_layers=null"):
        fit(configured(*run_overrides(tmp_path / "frozen", small_tweets, "optim.frozen_layers=0")))


def test_fast_dev_run_keeps_nothing(small_tweets, tmp_path, capsys):
    overrides = [o for o in run_overrides(tmp_path, small_tweets) if "max_epochs" not in o]
    assert train(configured(*overrides, "debug=fast_dev_run")) is None
    assert "nothing kept" in capsys.readouterr().out
    assert not (tmp_path / "run/bundle").exists()


def test_split_none_skips_the_evaluation(small_tweets, tmp_path):
    assert train(configured(*run_overrides(tmp_path, small_tweets, "evaluate.split=none", "export.variants=[]"))) > 0
    assert (tmp_path / "run/bundle").exists() and not (tmp_path / "run/evaluation").exists()


def test_balanced_weights_and_hard_labels_train(small_tweets, tmp_path):
    changed = ["optim.class_weights=balanced", "optim.vote_weight=0.0", "optim.label_smoothing=0.1", "model.pooling=cls"]
    trained = fit(configured(*run_overrides(tmp_path, small_tweets, *changed)))
    assert trained.info.pooling == "cls" and trained.score == trained.metrics["macro_f1"]


def test_divergence_is_said(small_tweets, tmp_path):
    wild = ["optim.lr=1e30", "optim.head_lr=1e30", "trainer.gradient_clip_val=null", "optim.warmup=0.0"]
    with pytest.raises(ModelError, match=r"validation loss is (nan|inf).*Lower optim.lr"):
        fit(configured(*run_overrides(tmp_path, small_tweets, *wild)))
    assert not (tmp_path / "run/bundle").exists()


def test_a_gpu_that_is_not_there(small_tweets, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match=r"trainer.accelerator=gpu.*Ask for what this machine has"):
        fit(configured(*run_overrides(tmp_path, small_tweets, "trainer.accelerator=gpu")))


def test_a_checkpoint_that_cannot_be_read(small_tweets, tmp_path):
    (tmp_path / "bad.ckpt").write_bytes(b"no checkpoint")
    for path, message in (("none.ckpt", "no such file"), ("bad.ckpt", "could not be read")):
        with pytest.raises(ConfigError, match=f"ckpt_path=.*{path}: {message}"):
            fit(configured(*run_overrides(tmp_path, small_tweets, f"ckpt_path={tmp_path / path}")))


def test_a_finished_run_is_not_resumed(trained, small_tweets, tmp_path):
    last = trained / "run/checkpoints/last.ckpt"
    with pytest.raises(ConfigError, match=r"last.ckpt: that run has done 2 epochs; set trainer.max_epochs above that"):
        fit(configured(*run_overrides(tmp_path, small_tweets, f"ckpt_path={last}")))
    assert not (tmp_path / "run").exists()


BARE = ("export.variants=[]", "evaluate.split=none")


def test_last_goes_on_in_the_run_folder_also_after_its_last_epoch(small_tweets, tmp_path):
    """As when a scheduler gives the same command again: nothing there yet, an epoch of two done, both done."""
    ends = []
    for epochs in (1, 2, 2):
        again = run_overrides(tmp_path, small_tweets, f"trainer.max_epochs={epochs}", "ckpt_path=last", *BARE)
        train(configured(*again))
        ends.append(torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True))
    assert [end["epoch"] for end in ends] == [0, 1, 1] and ends[1]["global_step"] == ends[2]["global_step"]
    assert same(ends[1]["state_dict"], ends[2]["state_dict"])
    assert runs.read_run(tmp_path / "run").status == "finished"


@pytest.mark.slow
def test_last_trains_no_more_of_a_run_that_had_stopped_early(small_tweets, tmp_path):
    still = (
        "optim.lr=1e-12",
        "optim.head_lr=1e-12",
        "trainer.max_epochs=9",
        "early_stopping.patience=1",
        "ckpt_path=last",
        *BARE,
    )
    for _ in range(2):
        train(configured(*run_overrides(tmp_path, small_tweets, *still)))
        assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["epoch"] == 1


def test_a_checkpoint_of_another_number_of_processes(trained, small_tweets, tmp_path):
    last = trained / "run/checkpoints/last.ckpt"
    found = torch.load(last, weights_only=True)
    torch.save({**found, "begun_with": {**found["begun_with"], "processes": 2}}, tmp_path / "two.ckpt")
    with pytest.raises(ConfigError, match="another run than this configuration's .*processes=1, begun with 2"):
        fit(configured(*run_overrides(tmp_path, small_tweets, "trainer.max_epochs=4", f"ckpt_path={tmp_path / 'two.ckpt'}")))


def test_a_checkpoint_of_another_model(trained, small_tweets, tmp_path):
    other = ["+model.overrides.vocab_size=31000", "trainer.max_epochs=4", f"ckpt_path={trained / 'run/checkpoints/last.ckpt'}"]
    with pytest.raises(ConfigError, match="of another model than this configuration's"):
        fit(configured(*run_overrides(tmp_path, small_tweets, *other)))


@pytest.mark.parametrize(
    "change",
    ["data.labels=[positive,neutral,negative]", "optim.lr=1e-6", "seed=7", "data.max_rows=500", "trainer.precision=bf16-mixed"],
)
def test_a_checkpoint_of_another_run(trained, small_tweets, tmp_path, change):
    last = f"ckpt_path={trained / 'run/checkpoints/last.ckpt'}"
    key = "begun with" if "max_rows" in change else change.partition("=")[0]
    with pytest.raises(ConfigError, match=f"last.ckpt: another run than this configuration's .*{key}"):
        fit(configured(*run_overrides(tmp_path, small_tweets, last, "trainer.max_epochs=3", change)))


class Stepped(Callback):
    """What the optimizer stepped with."""

    norms: ClassVar[list[float]] = []
    fused: ClassVar[set[bool]] = set()

    def on_before_zero_grad(self, trainer, module, optimizer):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        found = [parameter.grad.norm() for parameter in parameters if parameter.grad is not None]
        self.norms.append(float(torch.stack(found).norm()) if found else 0.0)
        self.fused.update(group["fused"] for group in optimizer.param_groups)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_are_clipped_before_a_fused_optimizer(small_tweets, tmp_path, precision):
    Stepped.norms.clear()
    asked = [f"trainer.precision={precision}", "trainer.max_epochs=1", "trainer.gradient_clip_val=0.001"]
    fit(configured(*run_overrides(tmp_path, small_tweets, *asked)), callbacks=[Stepped()])
    assert len(Stepped.norms) > 2 and max(Stepped.norms) == pytest.approx(0.001, rel=0.01) and Stepped.fused == {True}


def test_the_precision_that_auto_meant_is_told_and_kept(small_tweets, tmp_path, capsys):
    fit(configured(*run_overrides(tmp_path, small_tweets, "logger=csv", "trainer.accelerator=cpu", "trainer.precision=auto")))
    meant = "bf16-mixed" if bfloat16_on("cpu") else "32-true"
    assert capsys.readouterr().out.count(f"precision: {meant}, as fits this CPU") == 1
    for kept in ("run/bundle/config.yaml", "run/metrics/hparams.yaml"):
        assert f"precision: {meant}\n" in (tmp_path / kept).read_text()


def test_fit_starts_no_processes(small_tweets, tmp_path):
    several = ["trainer.accelerator=cpu", "trainer.devices=2"]
    with pytest.raises(ConfigError, match="trainer asks for 2 processes; `sodaops train` and torchrun start them"):
        fit(configured(*run_overrides(tmp_path, small_tweets, *several)))


@pytest.mark.parametrize("change", ["trainer.max_epochs=0", "trainer.max_steps=3", "trainer.check_val_every_n_epoch=9"])
def test_nothing_kept_is_a_fault(small_tweets, tmp_path, change):
    with pytest.raises(ConfigError, match="trainer.check_val_every_n_epoch"):
        fit(configured(*run_overrides(tmp_path, small_tweets, change)))


def test_epochs_differ_and_the_rate_follows_the_steps(small_tweets, tmp_path):
    fit(configured(*run_overrides(tmp_path, small_tweets, "+callbacks.seen._target_=tests.integration.stop.Seen")))
    first, second = Seen.batches[: len(Seen.batches) // 2], Seen.batches[len(Seen.batches) // 2 :]
    assert first != second and sorted(chain(*first)) == sorted(chain(*second))
    assert len(set(Seen.rates)) > len(Seen.rates) // 2 and Seen.rates[0] < max(Seen.rates) > Seen.rates[-1]
    assert len(set(Seen.seeds)) == len(Seen.seeds)


def test_callbacks_of_ones_own(small_tweets, tmp_path):
    with pytest.raises(ConfigError, match=r"callbacks.mine: .*no.such"):
        fit(configured(*run_overrides(tmp_path, small_tweets, "+callbacks.mine._target_=no.such.Class")))


COMPILE = "+callbacks.compile._target_=sodaops.training.callbacks.Compile"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_training_learns_alike(small_tweets, trained, tmp_path):
    traced = "+callbacks.compile.backend=aot_eager"  # all of it but a minute of C++
    compiled = fit(configured(*run_overrides(tmp_path, small_tweets, COMPILE, traced)))
    plain = layout.read_info(trained / "run/bundle")
    assert compiled.metrics["loss"] == pytest.approx(plain.metrics["val"]["loss"], rel=0.05)


def test_compiling_without_a_compiler(small_tweets, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler"):
        fit(configured(*run_overrides(tmp_path, small_tweets, COMPILE)))


@pytest.mark.slow
def test_a_full_disk_while_training(small_tweets, tmp_path):
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000));"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "from sodaops.cli import main; from sodaops.config.compose import compose; import sodaops.config.compose;"
        f"sys.exit(main(['train', '--params', {str(REPO / 'params.yaml')!r}, *{_tiny_params(tmp_path, small_tweets)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "StorageError: " in done.stderr and "make room there" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run/bundle").exists()


def _tiny_params(folder, tweets):
    settings = configured("model=tiny").model
    return [
        "model.random_weights=true",
        *[f"model.overrides.{key}={value}" for key, value in settings.overrides.items()],
        *[o for o in run_overrides(folder, tweets) if "=" in o and not o.startswith(("model=", "logger="))],
    ]


def test_storage_errors_name_the_run(small_tweets, tmp_path):
    (tmp_path / "run").write_text("a file in the way")
    with pytest.raises(StorageError, match="run"):
        fit(configured(*run_overrides(tmp_path, small_tweets)))


def test_evaluate_needs_splits_that_fit(trained, small_tweets, tmp_path, capsys):
    bundle = f"evaluate.bundle={trained / 'run/bundle'}"
    other = [f"data.path={small_tweets}", f"evaluate.splits_dir={tmp_path / 'social'}", "data.cleaning=social"]
    assert main(["preprocess", *other]) == 0
    assert main(["evaluate", bundle, *other]) == 2
    assert "cleaning=social; the bundle has minimal" in capsys.readouterr().err
    assert main(["evaluate", bundle, f"evaluate.splits_dir={tmp_path / 'none'}"]) == 2
    assert "make the splits with `sodaops preprocess`" in capsys.readouterr().err
    assert main(["evaluate", f"evaluate.splits_dir={tmp_path / 'none'}"]) == 2
    assert "evaluate.bundle is missing" in capsys.readouterr().err


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
