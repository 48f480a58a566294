"""run.json, and the table of runs."""

import json
import os
import subprocess
import sys

import pytest

from sodaops.cli import main
from sodaops.errors import ConfigError
from sodaops.io import runs
from sodaops.io.run_record import RunRecord


def made(folder, status="finished", lr=0.1, f1=0.5, **fields):
    folder.mkdir(parents=True)
    record = RunRecord(folder, {"optim": {"lr": lr}, "seed": 1}, **fields)
    record.add_metrics("val", {"macro_f1": f1})
    if status != "running":
        record.finish(status, None if status == "finished" else "why")
    return folder


@pytest.fixture
def three(workdir):
    made(workdir / "outputs/a", f1=0.5)
    made(workdir / "outputs/b", lr=0.2, f1=0.7)
    made(workdir / "multirun/s/0000", "failed", lr=0.3, f1=0.6)
    return workdir


def folders(runs):
    return [str(run.folder) for run in runs]


def test_sorted_and_filtered(three):
    found = runs.find_runs()
    assert set(folders(found)) == {"outputs/a", "outputs/b", "multirun/s/0000"}
    assert folders(runs.filter_runs(found, [], "-val/macro_f1")) == ["outputs/b", "multirun/s/0000", "outputs/a"]
    assert folders(runs.filter_runs(found, ["val/macro_f1>=0.6", "status=finished"], None)) == ["outputs/b"]
    assert folders(runs.filter_runs(found, ["optim.lr!=0.1"], "optim.lr")) == ["outputs/b", "multirun/s/0000"]
    RunRecord(three, {"seed": 1}).finish("failed", "before there was a metric")
    assert str(three) not in folders(runs.filter_runs(runs.find_runs([three]), ["val/macro_f1>0"], None))
    assert folders(runs.filter_runs(found, [], "status"))[0] == "multirun/s/0000"


@pytest.mark.parametrize(("where", "sort", "key"), [
    (["val/macro_f"], None, "--where val/macro_f"),
    (["optim.rl=1"], None, "did you mean optim.lr"),
    (["optim.lr<x"], None, "--where .*x"),
    ([], "nothing/like_it", "--sort nothing/like_it"),
])  # fmt: skip
def test_invalid_conditions(three, where, sort, key):
    with pytest.raises(ConfigError, match=key):
        runs.filter_runs(runs.find_runs(), where, sort)


def test_the_runs_command(three, capsys):
    assert main(["runs", "--sort=-val/macro_f1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "status", "seconds", "val/macro_f1", "optim.lr"] and lines[1].startswith("outputs/b")
    assert main(["runs", "--json", "outputs"]) == 0
    assert {run["run"] for run in json.loads(capsys.readouterr().out)} == {"outputs/a", "outputs/b"}
    assert main(["runs", "compare", "outputs/a", "outputs/b"]) == 0
    text = capsys.readouterr().out
    assert "optim.lr" in text and "0.2" in text and "seed" not in text
    for wrong in (["compare", "outputs/a"], ["compare", "outputs/a", "x"], ["nowhere"]):
        assert main(["runs", *wrong]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_no_runs(workdir):
    assert main(["runs"]) == 0 and runs.find_runs() == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"status": "finished"}', b"\xff\xfe", b'{"status": 1, "metrics": 3}'])
def test_a_damaged_run_json_is_listed_as_damaged(three, content, capsys):
    (three / "outputs/a/run.json").write_bytes(content)
    (run,) = [run for run in runs.find_runs() if str(run.folder) == "outputs/a"]
    assert run.status == "damaged" and "run.json" in run.fields["error"]
    assert main(["runs"]) == 0 and "damaged" in capsys.readouterr().out


def test_a_run_whose_process_was_killed_is_lost(workdir):
    code = (
        "from pathlib import Path; from sodaops.io.run_record import RunRecord; Path('r').mkdir(); RunRecord(Path('r'), {}); "
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert runs.read_run("r").status == "lost"
    assert runs.read_run(made(workdir / "alive", "running")).status == "running"
