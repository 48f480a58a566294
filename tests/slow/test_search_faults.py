"""Sweeps that are killed, shared by processes, and run by Hydra's launchers; each a real process."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sodaops.io import runs
from sodaops.search import study as studies
from tests.conftest import REPO, run_overrides

pytestmark = pytest.mark.slow


@pytest.fixture
def start(begin, workdir, small_tweets):
    """Starts `train.py -m search=smoke …`."""
    data = [o for o in run_overrides(workdir, small_tweets) if o.startswith(("data.path", "evaluate.splits_dir"))]
    command = [str(REPO / "train.py"), "-m", "search=smoke", "search.study=s", "logger=none", *data]
    return lambda *more: begin([*command, *more], workdir)


def finish(process, timeout_s=240):
    assert process.wait(timeout_s) == 0, process.log.read_text()[-3000:]
    return process.log.read_text()


def trials():
    study, _ = studies.recall(Path("multirun/s"))
    return study.get_trials(deepcopy=False)


def wait_for(holds, timeout_s=120):
    until = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_kill_9_within_a_trial_and_between_trials(start):
    more = ["search.n_trials=4", "search.grace_s=4", "search.pruner=none"]
    process = start(*more)
    record = Path("multirun/s/0001/run.json")
    wait_for(record.is_file)  # the second trial has begun to train
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
    first = runs.read_run("multirun/s/0000")
    assert first.status == "finished" and runs.read_run("multirun/s/0001").status == "lost"
    assert [trial.state.name for trial in trials()] == ["COMPLETE", "RUNNING"]

    process = start(*more)
    wait_for(lambda: sum(trial.state.name == "COMPLETE" for trial in trials()) >= 2 or process.poll() is not None)
    with contextlib.suppress(ProcessLookupError):  # it may have come to its end
        os.killpg(process.pid, signal.SIGKILL)  # between trials, or as good as
    process.wait(30)
    text = finish(start(*more))
    assert "4 trials finished, 0 pruned, 0 failed" in text
    assert runs.read_run("multirun/s/0000").started == first.started, "a finished trial is not repeated"
    lost = [trial for trial in trials() if trial.state.name == "FAIL"]
    done = [trial.params for trial in trials() if trial.state.name == "COMPLETE"]
    assert lost and all(trial.params in done for trial in lost), "a lost trial is run again"


def test_ctrl_c_puts_the_trial_back(start):
    process = start("search.n_trials=2", "trainer.max_epochs=9")
    wait_for(Path("multirun/s/0000/run.json").is_file)
    wait_for(lambda: "epoch 1/" in process.log.read_text())
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130, process.log.read_text()[-3000:]
    text = process.log.read_text()
    assert "stopped; the same command goes on with search.study=s" in text and "Traceback" not in text
    assert [trial.state.name for trial in trials()] == ["FAIL", "WAITING"]
    assert "2 trials finished" in finish(start("search.n_trials=2", "trainer.max_epochs=9"))
    assert [trial.state.name for trial in trials()] == ["FAIL", "COMPLETE", "COMPLETE"]


def test_two_processes_share_a_study(start):
    both = [start("search.n_trials=6", "search.pruner=none", "trainer.max_epochs=1") for _ in range(2)]
    for process in both:
        finish(process)
    states = [trial.state.name for trial in trials()]
    assert states == ["COMPLETE"] * 6
    assert len({trial.user_attrs["folders"][0] for trial in trials()}) == 6


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local", "ray"])
def test_hydra_launchers(start, launcher):
    if launcher == "ray":
        pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="docs/choosing.md says how to install Ray's launcher")
    settings = {"joblib": ["hydra.launcher.n_jobs=2"], "submitit_local": ["hydra.launcher.timeout_min=5", "search.n_jobs=2"],
                "ray": ["search.n_jobs=2"]}  # fmt: skip
    below = ["search.pruner=optuna.pruners.ThresholdPruner", "search.pruner_options={lower:0.3}"]
    text = finish(
        start(f"hydra/launcher={launcher}", *settings[launcher], "search.n_trials=3", "optim.lr=0.0001,0.005", *below)
    )
    assert len(trials()) == 3 and "trial 2" in text
    for trial in trials():  # what each reported from where it ran decided how it ended
        assert trial.state.name == ("PRUNED" if trial.intermediate_values[1] < 0.3 else "COMPLETE"), text[-2000:]
    assert {trial.state.name for trial in trials()} == {"PRUNED", "COMPLETE"}


SLURM = """#!/bin/bash
# Stands in for a Slurm of two nodes: a job of an array is a process in the background of this machine.
kept=$(dirname "$0")
case "$(basename "$0")" in
sbatch)
    id=$((100 + $(find "$kept" -name '*.sbatch' | wc -l))); cp "$1" "$kept/$id.sbatch"
    last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$1")
    for i in $(seq 0 "$last"); do
        env SLURM_JOB_ID=$((id * 100 + i)) SLURM_ARRAY_JOB_ID=$id SLURM_ARRAY_TASK_ID=$i SLURM_JOB_NAME=sweep \\
            SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_JOB_NODELIST=node$i \\
            bash "$1" </dev/null >"$kept/$id.$i.log" 2>&1 &
    done
    echo "Submitted batch job $id" ;;
srun)
    while [[ $1 == --* ]]; do [[ $1 == --unbuffered ]] && shift || shift 2; done
    exec "$@" ;;
sacct) echo "JobID|State|NodeList" ;;
esac
"""


def test_slurm(start, workdir, monkeypatch):
    """Against a stand-in for its three commands, the real launcher and real jobs; no Slurm was at hand."""
    programs = workdir / "slurm"
    programs.mkdir()
    for name in ("sbatch", "srun", "sacct"):
        (programs / name).write_text(SLURM)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = ["hydra.launcher.timeout_min=7", "hydra.launcher.cpus_per_task=3", "hydra.launcher.partition=cpu"]
    sweep = ["search.n_jobs=2", "search.n_trials=2", "search.pruner=none", "trainer.max_epochs=1"]
    text = finish(start("hydra/launcher=submitit_slurm", *settings, *sweep))
    assert "2 trials finished" in text, text
    script = (programs / "100.sbatch").read_text()
    wanted = ("--array=0-1%2", "--time=7", "--cpus-per-task=3", "--partition=cpu")
    assert all(f"#SBATCH {option}\n" in script for option in wanted) and "\nsrun " in script, script
    assert {path.name for path in programs.glob("100.*.log")} == {"100.0.log", "100.1.log"}


def test_a_trial_that_never_came_to_life_is_dropped(start):
    """Its process died between the question and the first heartbeat."""
    assert finish(start("search.n_trials=1", "search.grace_s=4"))
    study, _ = studies.recall(Path("multirun/s"))
    study.ask()
    assert "2 trials finished" in finish(start("search.n_trials=2", "search.grace_s=4"))
    assert [trial.state.name for trial in trials()] == ["COMPLETE", "FAIL", "COMPLETE"]


def test_two_begin_at_once_in_an_empty_database(workdir):
    code = "from sodaops.search.database import open_storage; import sys; open_storage('sqlite:///study.db')"
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    found = [subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], env=env, stderr=subprocess.PIPE) for _ in range(4)]
    for process in found:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said.decode()[-2000:]
