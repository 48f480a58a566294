"""Sweeps that are killed, stopped, shared by processes, and run by Hydra's launchers. Most trials cost nothing."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sodaops.io import runs
from tests.conftest import REPO, run_overrides, wait_until
from tests.sweeps import HOLD, run_sweep, states, train_instantly, trials

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture
def start(begin, workdir):
    """Starts a sweep with instant trials in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    return lambda *arguments, **more: begin(["-m", "tests.sweeps", *arguments], workdir, {**env, **more})


def finish(process, code=0, timeout_s=240):
    assert process.wait(timeout_s) == code, process.log.read_text()[-3000:]


def test_a_killed_trial_is_requeued(start):
    """And another one is dropped, whose process died after it asked for the trial and before the first heartbeat."""
    from sodaops.search import study as studies

    process = start("search.n_trials=4", **{HOLD: "1:never"})
    wait_until(Path("multirun/s/0001/run.json").is_file)  # the second trial has started
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
    first = runs.read_run("multirun/s/0000")
    assert first.status == "finished" and runs.read_run("multirun/s/0001").status == "lost"
    study, _ = studies.load_study_of(Path("multirun/s"))
    study.ask()
    assert states() == ["COMPLETE", "RUNNING", "RUNNING"]
    run_sweep("search.n_trials=4")
    assert runs.read_run("multirun/s/0000").started == first.started, "a finished trial is not repeated"
    assert states() == ["COMPLETE", "FAIL", "FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    assert trials()[1].params in [trial.params for trial in trials()[3:]]


def test_ctrl_c_requeues_the_trial(workdir):
    def stopped(config):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"search\.study=s"):
        run_sweep("search.n_trials=2", job=stopped)
    assert states() == ["FAIL", "WAITING"]
    run_sweep("search.n_trials=2")
    assert states() == ["FAIL", "COMPLETE", "COMPLETE"] and trials()[0].params == trials()[1].params


@pytest.mark.deep
def test_ctrl_c_during_a_real_training(begin, workdir, small_tweets):
    data = [o for o in run_overrides(workdir, small_tweets) if o.startswith(("data.path", "evaluate.splits_dir"))]
    command = [str(REPO / "train.py"), "-m", "search=smoke", "search.study=s", "logger=none", "search.n_trials=2", *data]
    process = begin([*command, "trainer.max_epochs=9"], workdir)
    wait_until(lambda: Path("multirun/s/0000/run.json").is_file() and "epoch 1/" in process.log.read_text())
    process.send_signal(signal.SIGINT)
    finish(process, 130)
    assert "search.study=s" in process.log.read_text() and "Traceback" not in process.log.read_text()
    assert states() == ["FAIL", "WAITING"]
    finish(begin([*command, "trainer.max_epochs=9"], workdir))
    assert states() == ["FAIL", "COMPLETE", "COMPLETE"]


def test_two_processes_share_a_study(start):
    """The other process holds its first trial until this one has started one too."""
    other = start("search.n_trials=6", "search.grace_s=60", **{HOLD: "0:started"})
    wait_until(Path("multirun/s/0000/run.json").is_file)

    def job(config):
        Path("started").touch()
        return train_instantly(config)

    run_sweep("search.n_trials=6", "search.grace_s=60", job=job)
    finish(other)
    assert states() == ["COMPLETE"] * 6
    assert len({trial.user_attrs["folders"][0] for trial in trials()}) == 6
    assert len({runs.read_run(trial.user_attrs["folders"][0]).fields["pid"] for trial in trials()}) == 2


LAUNCHERS = {
    "joblib": ["hydra.launcher.n_jobs=2"],
    "submitit_local": ["hydra.launcher.timeout_min=5", "search.n_jobs=2"],
    "ray": ["search.n_jobs=2"],
}


@pytest.fixture(params=LAUNCHERS)
def launcher(request, monkeypatch):
    """The overrides of one of Hydra's launchers."""
    if request.param == "ray":
        pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="docs/choosing.md says how to install Ray's launcher")
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return [f"hydra/launcher={request.param}", *LAUNCHERS[request.param]]


def test_launchers(workdir, launcher):
    run_sweep(*launcher, "search.n_trials=2")
    assert states() == ["COMPLETE"] * 2
    records = [runs.read_run(f"multirun/s/{number:04d}").fields for number in range(2)]
    assert [record["trial"]["number"] for record in records] == [0, 1]
    assert os.getpid() not in {record["pid"] for record in records}


@pytest.mark.deep
def test_launchers_prune_real_trainings(begin, workdir, small_tweets, launcher):
    data = [o for o in run_overrides(workdir, small_tweets) if o.startswith(("data.path", "evaluate.splits_dir"))]
    pruner = ["search.pruner=optuna.pruners.ThresholdPruner", "search.pruner_options={lower:0.3}", "optim.lr=0.0001,0.005"]
    command = [str(REPO / "train.py"), "-m", "search=smoke", "search.study=s", "logger=none", "search.n_trials=3"]
    finish(begin([*command, *data, *launcher, *pruner], workdir))
    assert set(states()) == {"PRUNED", "COMPLETE"} and len(trials()) == 3
    for trial in trials():  # what each reported from its own process decided how it ended
        assert trial.state.name == ("PRUNED" if trial.intermediate_values[1] < 0.3 else "COMPLETE")


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


@pytest.mark.deep
def test_slurm(workdir, monkeypatch):
    """The real launcher and real jobs, with a stand-in for Slurm's three commands."""
    programs = workdir / "slurm"
    programs.mkdir()
    for name in ("sbatch", "srun", "sacct"):
        (programs / name).write_text(SLURM)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = ["hydra.launcher.timeout_min=7", "hydra.launcher.cpus_per_task=3", "hydra.launcher.partition=cpu"]
    run_sweep("hydra/launcher=submitit_slurm", *settings, "search.n_jobs=2", "search.n_trials=2")
    assert states() == ["COMPLETE"] * 2
    script = (programs / "100.sbatch").read_text()
    wanted = ("--array=0-1%2", "--time=7", "--cpus-per-task=3", "--partition=cpu")
    assert all(f"#SBATCH {option}\n" in script for option in wanted) and "\nsrun " in script, script
    assert {path.name for path in programs.glob("100.*.log")} == {"100.0.log", "100.1.log"}


def test_processes_open_an_empty_database_at_once(workdir):
    code = "from sodaops.search.database import open_storage; open_storage('sqlite:///study.db')"
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    with contextlib.ExitStack() as stack:
        command = [sys.executable, "-W", "ignore", "-c", code]
        processes = [stack.enter_context(subprocess.Popen(command, env=env, stderr=subprocess.PIPE)) for _ in range(3)]
        for process in processes:
            _, error = process.communicate(timeout=240)
            assert process.returncode == 0, error.decode()[-2000:]
