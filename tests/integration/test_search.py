"""Sweeps: what they leave, how they resume, and what they refuse. Trials cost nothing, except in the first two tests."""

import json
import os
import re
from pathlib import Path

import pytest

from sodaops.bundle import layout
from sodaops.cli import main
from sodaops.errors import ConfigError, PrunedError
from sodaops.io import remote, runs
from sodaops.search.context import trial_of
from tests.conftest import run_overrides
from tests.gcs import emulated_bucket
from tests.sweeps import run_sweep, states, train_instantly, trials

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def sweep(workdir, small_tweets, no_account):
    """Runs `train -m search=smoke` with real trainings on the small tweets, and returns its exit code."""
    data = [o for o in run_overrides(workdir, small_tweets) if o.startswith(("data.path", "evaluate.splits_dir"))]
    return lambda *more: main(["train", "-m", "search=smoke", "search.study=s", "logger=none", *data, *more])


def test_seeds_pruning_and_the_files_of_real_trainings(sweep):
    below = ["search.pruner=optuna.pruners.ThresholdPruner", "search.pruner_options={lower:0.3}"]
    space = ["search.sampler=random", "~search.space.model", "optim.lr=0.0001,0.005"]
    assert sweep("search.n_trials=3", "search.n_seeds=2", *below, *space, "search.keep_checkpoints=true") == 0
    by_lr = {trial.params["optim.lr"]: trial for trial in trials()}
    bad, good = by_lr[0.0001], by_lr[0.005]
    assert good.state.name == "COMPLETE" and len(good.user_attrs["scores"]) == 2
    assert good.value == pytest.approx(sum(good.user_attrs["scores"]) / 2) and good.user_attrs["spread"] > 0
    first, second = map(Path, good.user_attrs["folders"])
    assert [runs.read_run(folder).params["seed"] for folder in (first, second)] == [42, 43]
    assert (second / "checkpoints/last.ckpt").is_file()
    info = json.loads((first / "bundle/bundle.json").read_text())
    assert info["metrics"]["val"]["macro_f1"] == pytest.approx(good.user_attrs["scores"][0]) and not info["onnx"]
    assert bad.state.name == "PRUNED" and bad.last_step == 1 and len(bad.user_attrs["folders"]) == 1
    assert runs.read_run(bad.user_attrs["folders"][0]).status == "pruned"


def test_no_logger_leaks_into_the_next_job(sweep, workdir):
    assert sweep("search.n_trials=2", "logger=wandb", "trainer.max_epochs=1") == 0
    import wandb

    assert wandb.run is None
    ids = set()
    for number in range(2):
        folder = workdir / f"multirun/s/{number:04d}"
        (offline_run,) = folder.glob("wandb/offline-run-*")
        ids.add(runs.read_run(folder).fields["wandb_id"])
        assert runs.read_run(folder).fields["wandb_id"] in offline_run.name
        assert not (folder / "checkpoints").exists()
    assert len(ids) == 2


def started():
    return {str(run.folder): run.started for run in runs.find_runs(["multirun/s"])}


def test_a_sweep_resumes(workdir):
    run_sweep("search.n_trials=2")
    assert trials()[0].params == {"optim.lr": 3e-4, "model.pooling": "mean"}, "the current configuration comes first"
    before = started()
    assert set(before) == {"multirun/s/0000", "multirun/s/0001"}
    run_sweep("search.n_trials=2")
    assert started() == before, "nothing is repeated"
    run_sweep("search.n_trials=3")
    assert {name: started()[name] for name in before} == before and len(started()) == 3
    assert len({trial.params["optim.lr"] for trial in trials()}) == 3, "a resumed sweep does not draw the same values again"
    for change in ("search.space.optim.lr.high=0.5", "trainer.max_epochs=3"):
        with pytest.raises(ConfigError, match=r"search\.study=s .*" + re.escape(change.partition(".high")[0].split("=")[0])):
            run_sweep("search.n_trials=4", change)
    assert len(trials()) == 3

    assert main(["select", "multirun/s"]) == 0
    assert main(["runs", "--where", "status=finished", "--sort=-val/macro_f1"]) == 0
    with emulated_bucket(workdir / "gcs") as bucket:
        assert main(["sweep", "report", "multirun/s", "--copy-to", f"{bucket}/sweep/"]) == 0
        assert remote.read_if_exists(f"{bucket}/sweep/sweep.html") == Path("multirun/s/sweep.html").read_bytes()


def test_the_page_of_a_sweep(workdir):
    """A failed and a pruned trial stand in the table, the plots are there, and plotly.js is inlined once."""

    def job(config):
        number = trial_of(os.environ).number
        if number == 1:
            raise ConfigError("optim.batch_tokens=1: <too small>")
        if number == 2:
            raise PrunedError("trial pruned")
        return train_instantly(config)

    run_sweep("search.n_trials=4", job=job)
    assert states() == ["COMPLETE", "FAIL", "PRUNED", "COMPLETE"]
    assert "optim.batch_tokens=1" in trials()[1].user_attrs["error"]
    page = Path("multirun/s/sweep.html").read_text(encoding="utf-8")
    assert "optim.batch_tokens=1: &lt;too small&gt;" in page and page.count("<td>pruned</td>") == 1
    assert page.count("plotly-graph-div") == 3 and page.count("plotly.js v") == 1 and not re.search(r"<script[^>]* src=", page)


def test_the_first_trials_all_fail(workdir):
    def job(config):
        raise ConfigError("data.path=none.csv: no such file.")

    with pytest.raises(ConfigError, match=r"3 .*data\.path=none\.csv"):
        run_sweep("search.n_trials=9", job=job)
    assert states() == ["FAIL"] * 3 and "none.csv" in trials()[0].user_attrs["error"]


@pytest.mark.parametrize(("more", "names"), [
    (["search.space.optim.lrr={type:float,low:1,high:2}"], r"search\.space\.optim\.lrr"),
    (["+search.space.optim.lrr={type:float,low:1,high:2}"], r"search\.space\.optim\.lrr .*mean optim\.lr"),
    (["search.space.optim.lr.low=5"], r"search\.space\.optim\.lr: .*low < high"),
    (["search.n_trials=0"], r"search\.n_trials=0"),
    (["search.sampler=optuna.samplers.Nope"], r"search\.sampler=optuna\.samplers\.Nope: "),
    (["search.sampler=optuna.samplers.BruteForceSampler"], r"search\.sampler=optuna\.samplers\.BruteForceSampler: .*step"),
    (["search.sampler=pte"], r"search\.sampler='pte': .*did you mean tpe"),
    (["search.pruner=builtins.dict"], r"search\.pruner=builtins\.dict: .*BasePruner"),
    (["search.pruner=median", "search.pruner_options={n_startup:3}"], r"search\.pruner=median: .*'n_startup'"),
    (["search.storage=nonsense"], r"search\.storage='nonsense'"),
    (["search.storage='postgresql+psycopg://me:secret@127.0.0.1:9/x'"], r"search\.storage=.*me:\*\*\*@.*password"),
    (["search.storage='postgresql+psycog://me:secret@127.0.0.1/x'"], r"search\.storage=.*me:\*\*\*@127.0.0.1"),
    (["search.storage='postgresql://me@h/x?password=secret'"], r"search\.storage=.*password=\*\*\*"),
    (["seed=1,2,3"], r" seed: .*search\.n_seeds"),
    (["checkpoint.monitor=val/loss,val/accuracy"], r" checkpoint\.monitor"),
    (["hydra.sweep.dir=/proc/nope"], "/proc/nope: "),
    (["search.study=../up"], r"search\.study='\.\./up'"),
    (["optim.lr=glob(*)"], r"optim\.lr"),
])  # fmt: skip
def test_what_a_search_refuses(workdir, more, names, capsys):
    assert main(["train", "-m", "search=smoke", "logger=none", *more]) == 2
    err = capsys.readouterr().err
    assert re.search(names, err) and "secret" not in err and "Traceback" not in err


def test_what_is_no_sweep(workdir, capsys):
    assert main(["train", "search=smoke"]) == 2 and "search=smoke" in capsys.readouterr().err
    assert main(["train", "-m", "hydra/sweeper=study", "optim.lr=1e-4,1e-3"]) == 2
    assert "hydra/sweeper=study" in capsys.readouterr().err


def test_another_study_does_not_overwrite(workdir):
    run_sweep("search.n_trials=1")
    with pytest.raises(ConfigError, match=r"multirun/s .*study s "):
        run_sweep("search.n_trials=1", "search.storage=sqlite:///other.db")


def test_a_plain_grid_needs_no_search_and_leaves_a_folder_a_job(workdir, small_tweets):
    data = [o for o in run_overrides(workdir, small_tweets) if o.startswith(("data.path", "evaluate.splits_dir"))]
    grid = ["model=tiny", "trainer.max_epochs=1", "export.variants=[]", "evaluate.split=none", "optim.lr=0.001,0.002"]
    assert main(["train", "-m", *grid, *data]) == 0
    assert sorted(run.params["optim.lr"] for run in runs.find_runs()) == [0.001, 0.002]
    for run in runs.find_runs():
        config = layout.read_config(run.folder / "bundle", layout.read_info(run.folder / "bundle"))
        assert config["optim"]["lr"] == run.params["optim.lr"]
        assert (run.folder / "checkpoints/best.ckpt").exists() and (run.folder / ".hydra").exists()


def test_a_damaged_sweep_folder(workdir, capsys):
    import optuna

    def report(folder="."):
        assert main(["sweep", "report", folder]) == 2
        return capsys.readouterr().err

    assert "ConfigError: none: " in report("none")
    (workdir / "study.json").write_text("{")
    assert "ConfigError: study.json: " in report()
    assert main(["train", "-m", "search=smoke", "hydra.sweep.dir=."]) == 2 and "study.json: " in capsys.readouterr().err
    info = {"study": "x", "storage": "sqlite:////none/study.db", "metric": "m", "direction": "maximize"}
    (workdir / "study.json").write_text(json.dumps(info))
    assert "/none/study.db" in report()
    (workdir / "study.db").write_bytes(b"not a database, but long enough to be looked at " * 40)
    assert "StorageError: search.storage=sqlite:///" in report()
    (workdir / "study.db").unlink()
    optuna.create_study(storage=f"sqlite:///{workdir}/study.db", study_name="y")
    assert re.search(r"ConfigError: study\.json: .* x", report())
