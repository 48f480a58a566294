"""Searches for real: what a sweep leaves, how it goes on, and what it refuses."""

import json
import re
from pathlib import Path

import optuna
import pytest

from sodaops.cli import main
from sodaops.io import remote, runs
from sodaops.search import study as studies
from tests.conftest import run_overrides
from tests.gcs import emulated_bucket

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture
def sweep(workdir, small_tweets, monkeypatch):
    """Runs `train -m search=smoke …` on the small tweets in an empty folder, and returns its exit code."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")

    def go(*more):
        data = [o for o in run_overrides(workdir, small_tweets) if o.startswith(("data.path", "evaluate.splits_dir"))]
        return main(["train", "-m", "search=smoke", "search.study=s", "logger=none", *data, *more])

    return go


def trials():
    study, _ = studies.recall(Path("multirun/s"))
    return study.get_trials(deepcopy=False)


def states():
    return [trial.state.name for trial in trials()]


def started():
    return {str(run.folder): run.started for run in runs.find_runs(["multirun/s"])}


def test_a_sweep_and_how_it_goes_on(sweep, workdir, capsys):
    assert sweep("search.n_trials=2") == 0
    out = capsys.readouterr().out
    assert "s: 2 trials finished, 0 pruned, 0 failed" in out and "choose: sodaops select multirun/s" in out
    first = trials()[0]
    assert first.params == {"optim.lr": 3e-4, "model.pooling": "mean"}, "the configuration as it stands comes first"
    before = started()
    assert set(before) == {"multirun/s/0000", "multirun/s/0001"}
    info = json.loads(Path("multirun/s/0001/bundle/bundle.json").read_text())
    assert info["metrics"]["val"]["macro_f1"] == pytest.approx(trials()[1].value)
    assert not list(Path("multirun/s").glob("*/checkpoints")) and not info["onnx"]

    assert sweep("search.n_trials=2") == 0 and started() == before, "nothing is repeated"
    assert sweep("search.n_trials=3") == 0
    assert {name: started()[name] for name in before} == before and len(started()) == 3
    drawn = [trial.params["optim.lr"] for trial in trials()]
    assert len(set(drawn)) == 3, "a resumed sweep does not draw the same again"
    page = Path("multirun/s/sweep.html").read_text(encoding="utf-8")
    assert all(f"trial {i}" in page for i in range(3)) and "http://" not in page.split("<script>")[0]
    capsys.readouterr()
    assert main(["select", "multirun/s"]) == 0 and main(["sweep", "report", "multirun/s"]) == 0
    assert main(["runs", "--where", "status=finished", "--sort=-val/macro_f1"]) == 0
    with emulated_bucket(workdir / "gcs") as bucket:
        assert main(["sweep", "report", "multirun/s", "--copy-to", f"{bucket}/sweep/"]) == 0
        assert remote.read_if_there(f"{bucket}/sweep/sweep.html") == Path("multirun/s/sweep.html").read_bytes()

    assert sweep("search.n_trials=4", "search.space.optim.lr.high=0.5") == 2
    err = capsys.readouterr().err
    assert "search.study=s was begun with another question" in err and "search.space.optim.lr: ['float', 0.0001, 0.01" in err
    assert len(trials()) == 3
    assert sweep("search.n_trials=4", "trainer.max_epochs=3") == 2 and len(trials()) == 3


def test_seeds_pruning_and_what_a_trial_keeps(sweep, capsys):
    below = ["search.pruner=optuna.pruners.ThresholdPruner", "search.pruner_options={lower:0.3}"]
    swept = "optim.lr=0.0001,0.005"
    assert sweep("search.n_trials=3", "search.n_seeds=2", *below, swept, "search.space={}", "search.keep_checkpoints=true") == 0
    out = capsys.readouterr().out
    assert "is not in the space (optim.lr=0.0003)" in out
    by_lr = {}
    for trial in trials():
        by_lr.setdefault(trial.params["optim.lr"], trial)
    assert set(by_lr) <= {0.0001, 0.005}
    good = by_lr[0.005]
    assert good.state.name == "COMPLETE" and len(good.user_attrs["scores"]) == 2
    assert good.value == pytest.approx(sum(good.user_attrs["scores"]) / 2) and good.user_attrs["spread"] > 0
    seeds = [runs.read_run(folder).params["seed"] for folder in good.user_attrs["folders"]]
    assert seeds == [42, 43] and (Path(good.user_attrs["folders"][1]) / "checkpoints/last.ckpt").is_file()
    if 0.0001 in by_lr:
        bad = by_lr[0.0001]
        assert bad.state.name == "PRUNED" and bad.last_step == 1 and len(bad.user_attrs["folders"]) == 1
        assert runs.read_run(bad.user_attrs["folders"][0]).status == "pruned"


def test_a_failed_trial_is_shown_and_the_sweep_goes_on(sweep, capsys):
    assert sweep("search.n_trials=5", "search.sampler=random", "~search.space.optim", "optim.batch_tokens=1,512,768") == 0
    out = capsys.readouterr().out
    assert (
        re.search(r"[1-4] trials finished, \d pruned, [1-4] failed", out) and "failed: ConfigError: optim.batch_tokens=1" in out
    )
    failed = [trial for trial in trials() if trial.state.name == "FAIL"]
    assert {trial.params["optim.batch_tokens"] for trial in failed} == {1} and len(trials()) == 5
    assert all("a batch must hold the longest text" in trial.user_attrs["error"] for trial in failed)
    assert "a batch must hold the longest text" in Path("multirun/s/sweep.html").read_text(encoding="utf-8")


def test_the_first_trials_all_fail(sweep, capsys):
    assert sweep("search.n_trials=9", "data.path=none.csv") == 2
    assert "the first 3 trials all failed: none.csv: no such file" in capsys.readouterr().err
    assert states() == ["FAIL"] * 3 and "no such file" in trials()[0].user_attrs["error"]


def test_no_logger_leaks_into_the_next_job(sweep, workdir):
    assert sweep("search.n_trials=2", "logger=wandb", "trainer.max_epochs=1") == 0
    import wandb

    assert wandb.run is None
    ids = set()
    for number in range(2):
        folder = workdir / f"multirun/s/{number:04d}"
        (kept,) = folder.glob("wandb/offline-run-*")
        ids.add(runs.read_run(folder).fields["wandb_id"])
        assert runs.read_run(folder).fields["wandb_id"] in kept.name
    assert len(ids) == 2


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["search.space.optim.lrr={type:float,low:1,high:2}"], "Could not override 'search.space.optim.lrr'|is not a key"),
        (["+search.space.optim.lrr={type:float,low:1,high:2}"], "search.space.optim.lrr is not a key of .*mean optim.lr"),
        (["search.space.optim.lr.low=5"], "expected low < high"),
        (["search.n_trials=0"], "search.n_trials=0"),
        (["search.sampler=optuna.samplers.Nope"], "search.sampler=optuna.samplers.Nope: "),
        (["search.sampler=optuna.samplers.BruteForceSampler"], "BruteForceSampler: .*step must be given"),
        (["search.sampler=pte"], "search.sampler='pte': expected tpe, random or a class .did you mean tpe"),
        (["search.pruner=builtins.dict"], "no subclass of BasePruner"),
        (["search.pruner_options={n_startup:3}"], "unexpected keyword argument 'n_startup'"),
        (["search.storage=nonsense"], "search.storage='nonsense'"),
        (["search.storage='postgresql+psycopg://me:secret@127.0.0.1:9/x'"], "a password has no place in a key"),
        (["search.storage='postgresql+psycog://me:secret@127.0.0.1/x'"], r"me:\*\*\*@127.0.0.1"),
        (["search.storage='postgresql://me@h/x?password=secret'"], "a password has no place in a key"),
        (["seed=1,2,3"], "a search over seed: .*search.n_seeds"),
        (["checkpoint.monitor=val/loss,val/accuracy"], "a search over checkpoint.monitor"),
        (["hydra.sweep.dir=/proc/nope"], "/proc/nope: could not be written"),
        (["search.study=../up"], "search.study='../up'"),
        (["optim.lr=glob(*)"], "optim.lr"),
    ],
)  # fmt: skip
def test_what_a_search_refuses(sweep, more, says, capsys):
    assert sweep(*more) == 2
    err = capsys.readouterr().err
    assert re.search(says, err) and "secret" not in err and "Traceback" not in err


def test_a_search_without_multirun(workdir, capsys):
    assert main(["train", "search=smoke"]) == 2
    assert "search=smoke is a sweep; run it with -m" in capsys.readouterr().err


def test_another_study_does_not_overwrite(sweep, capsys):
    assert sweep("search.n_trials=1", "trainer.max_epochs=1") == 0
    assert sweep("search.n_trials=1", "trainer.max_epochs=1", "search.storage=sqlite:///other.db") == 2
    assert "multirun/s holds the runs of study s in" in capsys.readouterr().err
    assert main(["train", "-m", "hydra/sweeper=study", "optim.lr=1e-4,1e-3"]) == 2
    assert "needs a search space" in capsys.readouterr().err


def test_a_plain_grid_needs_no_search(sweep, workdir, small_tweets):
    data = [o for o in run_overrides(workdir, small_tweets) if o.startswith(("data.path", "evaluate.splits_dir"))]
    grid = ["model=tiny", "trainer.max_epochs=1", "export.variants=[]", "evaluate.split=none", "optim.lr=0.001,0.002"]
    assert main(["train", "-m", *grid, *data]) == 0
    assert sorted(run.params["optim.lr"] for run in runs.find_runs()) == [0.001, 0.002]


def test_a_damaged_sweep_folder(workdir, capsys):
    assert main(["sweep", "report", "none"]) == 2 and "expected the folder of a sweep" in capsys.readouterr().err
    (workdir / "study.json").write_text("{")
    assert main(["sweep", "report", "."]) == 2 and "damaged" in capsys.readouterr().err
    assert main(["train", "-m", "search=smoke", "hydra.sweep.dir=."]) == 2 and "damaged" in capsys.readouterr().err
    (workdir / "study.json").write_text(
        json.dumps({"study": "x", "storage": "sqlite:////none/study.db", "metric": "m", "direction": "maximize"})
    )
    assert main(["sweep", "report", "."]) == 2 and "its database /none/study.db is gone" in capsys.readouterr().err
    (workdir / "study.db").write_bytes(b"not a database, but long enough to be looked at " * 40)
    assert main(["sweep", "report", "."]) == 2 and "file is not a database" in capsys.readouterr().err
    (workdir / "study.db").unlink()
    optuna.create_study(storage=f"sqlite:///{workdir}/study.db", study_name="y")
    assert main(["sweep", "report", "."]) == 2 and "the database holds no study x" in capsys.readouterr().err
