"""The runs' own accounts, and the table made of them."""

import json
import os
import subprocess
import sys

import pytest

from sodaops.cli import main
from sodaops.errors import ConfigError
from sodaops.io import runs


def made(folder, status="finished", lr=0.1, f1=0.5, **fields):
    folder.mkdir(parents=True)
    record = runs.Record(folder, {"optim": {"lr": lr}, "seed": 1}, **fields)
    record.measured("val", {"macro_f1": f1})
    if status != "running":
        record.end(status, None if status == "finished" else "why")
    return folder


@pytest.fixture
def three(workdir):
    made(workdir / "outputs/a", f1=0.5)
    made(workdir / "outputs/b", lr=0.2, f1=0.7)
    made(workdir / "multirun/s/0000", "failed", lr=0.3, f1=0.6)
    return workdir


def names(found):
    return [str(run.folder) for run in found]


def test_sorted_and_filtered(three):
    found = runs.find()
    assert set(names(found)) == {"outputs/a", "outputs/b", "multirun/s/0000"}
    assert names(runs.select(found, [], "-val/macro_f1")) == ["outputs/b", "multirun/s/0000", "outputs/a"]
    assert names(runs.select(found, ["val/macro_f1>=0.6", "status=finished"], None)) == ["outputs/b"]
    assert names(runs.select(found, ["optim.lr!=0.1"], "optim.lr")) == ["outputs/b", "multirun/s/0000"]
    runs.Record(three, {"seed": 1}).end("failed", "before there was a metric")
    assert str(three) not in names(runs.select(runs.find([three]), ["val/macro_f1>0"], None))
    assert names(runs.select(found, [], "status"))[0] == "multirun/s/0000"


@pytest.mark.parametrize(
    ("where", "says"),
    [("val/macro_f", "expected KEY=VALUE"), ("optim.rl=1", "did you mean optim.lr"), ("optim.lr<x", "expected a number")],
)
def test_a_condition_that_cannot_be(three, where, says):
    with pytest.raises(ConfigError, match=says):
        runs.select(runs.find(), [where], None)
    with pytest.raises(ConfigError, match="no run has it"):
        runs.select(runs.find(), [], "nothing/like_it")


def test_the_verb(three, capsys):
    assert main(["runs", "--sort=-val/macro_f1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "status", "seconds", "val/macro_f1", "optim.lr"] and lines[1].startswith("outputs/b")
    assert main(["runs", "--json", "outputs"]) == 0
    assert {run["run"] for run in json.loads(capsys.readouterr().out)} == {"outputs/a", "outputs/b"}
    assert main(["runs", "compare", "outputs/a", "outputs/b"]) == 0
    text = capsys.readouterr().out
    assert "optim.lr" in text and "0.2" in text and "seed" not in text
    assert main(["runs", "compare", "outputs/a"]) == 2 and main(["runs", "compare", "outputs/a", "x"]) == 2
    assert main(["runs", "nowhere"]) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err


def test_no_runs(workdir, capsys):
    assert main(["runs"]) == 0 and "no runs here" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"status": "finished"}', b"\xff\xfe", b'{"status": 1, "metrics": 3}'])
def test_a_damaged_record_is_shown_as_one(three, content, capsys):
    (three / "outputs/a/run.json").write_bytes(content)
    (run,) = [run for run in runs.find() if str(run.folder) == "outputs/a"]
    assert run.status == "damaged" and "cannot be read" in run.fields["error"]
    assert main(["runs"]) == 0 and "damaged" in capsys.readouterr().out


def test_a_run_whose_process_is_gone_is_lost(workdir):
    code = (
        "from pathlib import Path; from sodaops.io.runs import Record; Path('r').mkdir(); Record(Path('r'), {}); "
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert runs.read("r").status == "lost"
    assert runs.read(made(workdir / "alive", "running")).status == "running"
