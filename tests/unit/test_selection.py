"""Which run is chosen, and which are refused."""

import json
import math
from types import SimpleNamespace

import pytest

from sodaops.cli import main
from sodaops.errors import ConfigError
from sodaops.io.run_record import RunRecord
from sodaops.search import selection
from sodaops.search.selection import Candidate, choose_run


def candidate(name, value, seconds=10.0, status="finished"):
    return Candidate(name, status, value, None, seconds, {}, [name])


def test_best_by_direction_and_ties_by_cost():
    candidates = [candidate("a", 0.70, 30), candidate("b", 0.71, 20), candidate("c", 0.71, 10), candidate("d", 0.69, 1)]
    assert choose_run(candidates, "val/macro_f1", "maximize").best.name == "c"
    assert choose_run(candidates, "val/loss", "minimize").best.name == "d"
    assert choose_run(candidates, "val/macro_f1", "maximize", tolerance=0.02).best.name == "d"


def test_what_cannot_be_chosen():
    bad = [
        candidate("a", 0.9, status="running"), candidate("b", math.nan), candidate("c", None),
        candidate("d", 0.8, status="failed"),
        candidate("e", math.inf), candidate("f", 0.95, status="lost"), candidate("g", 0.99, status="pruned"),
    ]  # fmt: skip
    choice = choose_run([*bad, candidate("ok", 0.1)], "val/macro_f1", "maximize")
    assert choice.best.name == "ok" and choice.n_eligible == 1
    assert choice.left_out == {"running": 1, "not a number": 2, "without the metric": 1, "failed": 1, "lost": 1, "pruned": 1}
    with pytest.raises(ConfigError, match=r"1 running, 2 not a number"):
        choose_run(bad, "val/macro_f1", "maximize")


@pytest.mark.parametrize("metric", ["test/macro_f1", "train/loss", "macro_f1"])
def test_never_by_test(metric, workdir):
    with pytest.raises(ConfigError, match=f"--metric {metric}"):
        choose_run([candidate("a", 0.9)], metric, "maximize")
    with pytest.raises(ConfigError, match=f"--metric {metric}"):
        selection.read_candidates(str(workdir), metric)


def run(folder, f1, number=None, seed=1, n_seeds=1, status="finished"):
    folder.mkdir(parents=True)
    trial = None if number is None else {"study": "s", "number": number, "n_seeds": n_seeds}
    record = RunRecord(folder, {"seed": seed}, trial=trial)
    record.add_metrics("val", {"macro_f1": f1})
    record.add_metrics("test", {"macro_f1": 1 - f1})
    record.finish(status)


def test_a_sweep_of_run_folders(workdir, capsys):
    run(workdir / "s/0000", 0.6, 0, 1, 2)
    run(workdir / "s/0000-seed2", 0.8, 0, 2, 2)
    run(workdir / "s/0001", 0.75, 1, 1, 2)  # its second seed is missing
    run(workdir / "s/lone", 0.65)
    (workdir / "s/broken").mkdir()
    (workdir / "s/broken/run.json").write_text("{")
    assert main(["select", "s", "--json"]) == 0
    choice = json.loads(capsys.readouterr().out)
    best = choice["best"]
    assert best["name"] == "s/0000" and best["value"] == pytest.approx(0.7)
    assert best["spread"] == pytest.approx(math.sqrt(0.02)) and best["folders"] == ["s/0000", "s/0000-seed2"]
    assert choice["left_out"] == {"unfinished": 1, "damaged": 1}
    assert main(["select", "s"]) == 0 and "0.7000 ± 0.1414" in capsys.readouterr().out
    assert main(["select", "s", "--metric", "val/macro_f2"]) == 2
    assert "did you mean val/macro_f1" in capsys.readouterr().err
    assert main(["select", "none"]) == 2 and main(["select", "s", "--tolerance=-1"]) == 2
    run(workdir / "copy/0000", 0.1, 0, 1, 1)
    assert main(["select", ".", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["best"]["value"] == pytest.approx(0.7), "studies of one name stay apart"


def test_the_default_metric_is_what_the_runs_monitored(workdir, capsys):
    for name, rmse in (("a", 0.5), ("b", 0.4)):
        record = RunRecord(workdir / "s" / name, {"checkpoint": {"monitor": "val/rmse"}})
        record.add_metrics("val", {"rmse": rmse, "macro_f1": rmse})
        record.finish("finished")
    assert main(["select", "s"]) == 0 and "s/b: val/rmse 0.4000" in capsys.readouterr().out
    assert main(["runs", "s"]) == 0
    header = capsys.readouterr().out.splitlines()[0]
    assert "val/rmse" in header and "macro_f1" not in header


@pytest.mark.slow
def test_a_sweep_on_wandb(monkeypatch):
    """W&B's servers cannot be reached here, so their answer is a stub."""
    import wandb

    def fake(state, summary):
        return SimpleNamespace(name=state, state=state, summary=summary, config={"optim": {"lr": 1}}, url=f"https://w/{state}")

    wandb_runs = [
        fake("finished", {"val/macro_f1": 0.7, "_runtime": 5}), fake("crashed", {"val/macro_f1": 0.9}),
        fake("running", {"val/macro_f1": 0.8}), fake("finished", {"val/macro_f1": math.nan}), fake("finished", {}),
    ]  # fmt: skip
    monkeypatch.setattr("sodaops.training.wandb_server.check_reachable", lambda *_: None)
    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(sweep=lambda path: SimpleNamespace(runs=wandb_runs)))
    choice = choose_run(selection.read_candidates("wandb:me/project/abc", "val/macro_f1"), "val/macro_f1", "maximize")
    assert choice.best.value == 0.7 and choice.best.folders == ["https://w/finished"] and choice.best.params == {"optim.lr": 1}
    with pytest.raises(ConfigError, match="wandb:abc"):
        selection.read_candidates("wandb:abc", "val/macro_f1")
