"""Sweeps on a real PostgreSQL, with trials that cost nothing."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sodaops.cli import main
from sodaops.errors import StorageError
from tests import postgres
from tests.conftest import REPO, wait_until
from tests.sweeps import HOLD, run_sweep, states, train_instantly, trials

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture(scope="module")
def server():
    with postgres.running() as running:
        yield running


@pytest.fixture
def url(server, workdir, monkeypatch):
    """An empty database, whose password is in the environment."""
    monkeypatch.setenv("PGPASSWORD", server.password)
    return server.empty_database()


OPEN = """
import sys
from sodaops.search import study as studies
studies.silence_optuna_loggers()
print("ready", flush=True)
for line in sys.stdin:
    studies.open_study(line.strip(), "s", 60, "maximize", {"lr": 1})
    print("opened", flush=True)
"""


def test_processes_open_an_empty_database_at_once(server, url):
    """Optuna looks for its tables and then creates them. Three databases, since processes do not collide every time."""
    urls = [url, *(server.empty_database() for _ in range(2))]
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-W", "ignore", "-c", OPEN], env=env, **pipes) for _ in range(3)]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 3
    for name in urls:
        for process in processes:
            process.stdin.write(f"{name}\n")
            process.stdin.flush()
        assert [process.stdout.readline() for process in processes] == ["opened\n"] * 3
        assert trials(name) == []
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0


def test_a_sweep_waits_for_a_restarted_database(server, url, workdir):
    def job(config):
        if not Path("restarted").exists():
            Path("restarted").touch()
            server.stop()
            threading.Timer(2.0, server.start).start()
        return train_instantly(config)

    run_sweep(f"search.storage={url}", "search.n_trials=3", job=job)
    assert states(url) == ["COMPLETE"] * 3
    assert len({trial.params["optim.lr"] for trial in trials(url)}) == 3
    files = [file for file in workdir.rglob("*") if file.is_file()]
    assert len(files) > 3 and not [file for file in files if server.password.encode() in file.read_bytes()]


@pytest.mark.deep
def test_machines_share_a_study_while_one_dies_and_the_database_restarts(server, url, begin, workdir):
    env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    command = ["-m", "tests.sweeps", f"search.storage={url}", "search.n_trials=8", "search.grace_s=12"]
    b = begin(command, workdir / "b", {**env, HOLD: "0:never"})
    wait_until(lambda: list(b.log.parent.glob("multirun/s/*/run.json")))
    a, c = (begin(command, workdir / name, {**env, HOLD: f"{number}:../go"}) for number, name in ((1, "a"), (2, "c")))
    wait_until(lambda: states(url).count("RUNNING") == 3)
    os.killpg(b.pid, signal.SIGKILL)
    b.wait(30)
    server.stop()
    time.sleep(15)  # longer than the grace period
    server.start()
    (workdir / "go").touch()
    for process in (a, c):
        assert process.wait(300) == 0, process.log.read_text()[-3000:]
    completed = [trial for trial in trials(url) if trial.state.name == "COMPLETE"]
    lost = [trial for trial in trials(url) if trial.state.name == "FAIL"]
    assert len(completed) == 8 and len(completed) + len(lost) == len(trials(url)), "as many as asked for, in all machines"
    assert lost[0].number == 0 and not any("error" in trial.user_attrs for trial in lost)
    assert all(trial.params in [other.params for other in completed] for trial in lost), "a lost trial is run again"
    learning_rates = [trial.params["optim.lr"] for trial in completed]
    assert len(set(learning_rates)) == 8 and learning_rates.count(3e-4) == 1, "no two machines draw the same values"
    machines = {trial.user_attrs["where"].partition(":")[2] for trial in completed}
    assert machines == {str(process.log.parent / "multirun/s") for process in (a, c)}


@pytest.mark.deep
def test_ctrl_c_while_the_database_is_away(server, url):
    def job(config):
        server.stop()
        raise KeyboardInterrupt

    try:
        with pytest.raises(KeyboardInterrupt, match=r"search\.study=s"):
            run_sweep(f"search.storage={url}", "search.n_trials=1", job=job)
    finally:
        server.start()
    assert states(url) == ["RUNNING"]
    run_sweep(f"search.storage={url}", "search.n_trials=1")
    assert states(url) == ["FAIL", "COMPLETE"]


@pytest.mark.deep
def test_a_database_that_stays_away(server, url, monkeypatch):
    from sodaops.search import sweeper

    monkeypatch.setattr(sweeper, "_MAX_OUTAGE", 0)

    def job(config):
        server.stop()
        return train_instantly(config)

    try:
        with pytest.raises(StorageError, match=re.escape(f"search.storage={url}:")) as raised:
            run_sweep(f"search.storage={url}", "search.n_trials=1", job=job)
    finally:
        server.start()
    assert server.password not in str(raised.value)
    run_sweep(f"search.storage={url}", "search.n_trials=1")
    assert states(url) == ["FAIL", "COMPLETE"]


def test_heartbeats_of_machines_in_other_time_zones(url, monkeypatch):
    """Optuna stores them without a zone: east of the reader they would never be old, west of it always."""
    from sodaops.search import study as studies

    for own, other in (("Asia/Tokyo", "America/New_York"), ("America/New_York", "Asia/Tokyo")):
        monkeypatch.setenv("PGTZ", own)
        study = studies.open_study(url, own[:4], 20, "maximize", {})
        trial_id = study.ask()._trial_id
        study._storage.record_heartbeat(trial_id)
        monkeypatch.setenv("PGTZ", other)
        reader = studies.open_study(url, own[:4], 20, "maximize", {})
        assert trial_id not in reader._storage._get_stale_trial_ids(reader._study_id)
        reader._storage._backend.grace_period = 1
        wait_until(lambda r=reader, n=trial_id: n in r._storage._get_stale_trial_ids(r._study_id), 60)


@pytest.mark.parametrize(("change", "error", "names"), [
    ({"password": "wrong"}, "StorageError", 'user "sweeper"'),
    ({"password": None}, "StorageError", "password"),
    ({"to": ("@127.0.0.1:", "@127.0.0.2:")}, "StorageError", "127.0.0.2"),
    ({"to": ("@127.0.0.1:", "@nowhere.invalid:")}, "StorageError", "nowhere.invalid"),
    ({"to": ("sweeps", "none")}, "StorageError", 'database "none\\d+"'),
    ({"to": ("+psycopg:", "+pg8000:")}, "ConfigError", "pg8000"),
])  # fmt: skip
def test_what_the_database_refuses(url, server, workdir, monkeypatch, capfd, change, error, names):
    from sodaops.search import database

    if change.get("password", "") is None:
        monkeypatch.delenv("PGPASSWORD")
    elif "password" in change:
        monkeypatch.setenv("PGPASSWORD", change["password"])
    monkeypatch.setattr(database, "_RETRY_DELAYS_S", (0.1,))
    arguments = ["search=smoke", "search.study=s", f"search.storage={url.replace(*change.get('to', ('', '')))}"]
    assert main(["train", "-m", *arguments]) == 2
    out, err = capfd.readouterr()
    assert re.search(f"^{error}: search.storage=postgresql", err, re.MULTILINE) and re.search(names, err), err
    assert "Traceback" not in out + err and server.password not in out + err
    assert not list(workdir.rglob("run.json")), "no training was started"
