"""Sweeps of several machines on one PostgreSQL: each machine a folder and processes of its own, the database a real one."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import optuna
import pytest

from sodaops.cli import main
from sodaops.search import database, study as studies, sweeper
from tests import postgres
from tests.conftest import REPO, run_overrides

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture(scope="module")
def server():
    with postgres.running() as found:
        yield found


@pytest.fixture
def url(server, monkeypatch):
    """An empty database, whose password the environment has."""
    monkeypatch.setenv("PGPASSWORD", server.password)
    return server.empty_database()


@pytest.fixture
def sweep(workdir, small_tweets):
    """The command of a sweep."""
    data = [o for o in run_overrides(workdir, small_tweets) if o.startswith("data.path")]
    return lambda url, *more: [
        "-m", "search=smoke", "search.study=s", f"search.storage={url}", "logger=none", "search.pruner=none",
        "search.grace_s=4", "trainer.max_epochs=1", *data, *more,
    ]  # fmt: skip


@pytest.fixture
def machine(begin, workdir):
    """Starts a process in a machine's own folder."""
    env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    return lambda name, *command: begin(command, workdir / name, env)


def said_by(process, code=0, timeout_s=240):
    returned, text = process.wait(timeout_s), process.log.read_text()
    assert returned == code and "Traceback" not in text, text[-3000:]
    return text


def trials(url):
    return optuna.load_study(study_name="s", storage=database.open_storage(url)).get_trials(deepcopy=False)


def wait_for(holds, timeout_s=120):
    until = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.05)


BEGIN = """
import sys, time
from sodaops.search import database, study as studies
studies.quieten()
print("ready", flush=True)
for line in sys.stdin:
    at, url = line.split()
    time.sleep(max(0.0, float(at) - time.time()))
    studies.open_study(url, "s", 60, "maximize", {"lr": 1})
    print("begun", flush=True)
"""


def test_three_begin_at_once_in_an_empty_database(server, url, workdir):
    """Optuna looks for its tables and then makes them; three databases, since processes do not meet every time."""
    urls = [url, *(server.empty_database() for _ in range(2))]
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    three = [subprocess.Popen([sys.executable, "-W", "ignore", "-c", BEGIN], env=env, **pipes) for _ in range(3)]
    for process in three:
        assert process.stdout.readline() == "ready\n"
    begin_at = time.time() + 0.5
    lines = "".join(f"{begin_at + 1.5 * i} {name}\n" for i, name in enumerate(urls))
    for process in three:
        process.stdin.write(lines)
        process.stdin.close()
    for process in three:
        out, err = process.stdout.read(), process.stderr.read()
        assert process.wait(60) == 0 and out == "begun\n" * 3, err[-2000:]
        process.stdout.close()
        process.stderr.close()
    assert all(trials(name) == [] for name in urls)


def test_machines_share_a_study_while_one_dies_and_the_database_restarts(server, url, sweep, machine):
    command = [str(REPO / "train.py"), *sweep(url, "search.n_trials=8")]
    a, b, c = (machine(name, *command) for name in "abc")
    wait_for(lambda: list(b.log.parent.glob("multirun/s/*/run.json")))
    os.killpg(b.pid, signal.SIGKILL)
    b.wait(30)
    wait_for(lambda: any(trial.state.name == "COMPLETE" for trial in trials(url)))
    server.stop()
    time.sleep(6)  # longer than anybody may be silent for
    server.start()
    texts = [said_by(process) for process in (a, c)]
    assert any("waiting up to 20 s" in text and "it answers again" in text for text in texts), texts

    done = [trial for trial in trials(url) if trial.state.name == "COMPLETE"]
    lost = [trial for trial in trials(url) if trial.state.name == "FAIL"]
    assert len(done) == 8 and len(done) + len(lost) == len(trials(url)), "as many as asked for, over the machines together"
    assert lost and all(trial.params in [other.params for other in done] for trial in lost), "what died is run again"
    assert {trial.number for trial in lost} <= {int(path.name) for path in b.log.parent.glob("multirun/s/*/")}, (
        "and nothing else"
    )
    assert not any("error" in trial.user_attrs for trial in lost)
    drawn = [trial.params["optim.lr"] for trial in done]
    assert len(set(drawn)) == 8 and drawn.count(3e-4) == 1, "no two machines draw the same, or begin with the default"
    assert len({tuple(trial.user_attrs["folders"]) for trial in done}) == 8
    homes = {trial.user_attrs["where"].partition(":")[2] for trial in done}
    assert {str(a.log.parent / "multirun/s"), str(c.log.parent / "multirun/s")} <= homes
    for process, text, other in ((a, texts[0], c), (c, texts[1], a)):
        own = sum(f"/{process.log.parent.name}/" in trial.user_attrs["where"] for trial in done)
        assert f"{8 - own} of 8 finished trials are not in multirun/s but in" in text
        assert str(other.log.parent / "multirun/s") in text
    written = [file for file in a.log.parent.parent.rglob("*") if file.is_file()]
    assert len(written) > 50 and not [file for file in written if server.password.encode() in file.read_bytes()]


def test_ctrl_c_while_the_database_is_away(server, url, sweep, machine):
    a = machine("a", str(REPO / "train.py"), *sweep(url, "search.n_trials=2", "search.grace_s=60"))
    try:
        wait_for(lambda: list(a.log.parent.glob("multirun/s/*/run.json")))
        server.stop()
        wait_for(lambda: "waiting up to 300 s" in a.log.read_text())
        a.send_signal(signal.SIGINT)
        text = said_by(a, 130, 60)
    finally:
        server.start()
    assert "the study could not be told of trials 0: they are run again" in text
    assert "stopped; the same command goes on with search.study=s" in text


def test_heartbeats_of_machines_in_other_time_zones(url, monkeypatch):
    """Optuna keeps them without a zone; east of the reader they would never be old, west of him always."""
    for own, others, trial_id in (("Asia/Tokyo", "America/New_York", 1), ("America/New_York", "Asia/Tokyo", 2)):
        monkeypatch.setenv("PGTZ", own)
        study = studies.open_study(url, "s", 1, "maximize", {})
        study._storage.record_heartbeat(study.ask()._trial_id)
        monkeypatch.setenv("PGTZ", others)
        reader = studies.open_study(url, "s", 1, "maximize", {})
        assert trial_id not in reader._storage._get_stale_trial_ids(study._study_id)
        wait_for(lambda r=reader, s=study, n=trial_id: n in r._storage._get_stale_trial_ids(s._study_id), 10)


def test_a_database_that_stays_away(server, url, sweep, workdir, monkeypatch, capfd):
    monkeypatch.setattr(sweeper, "_PATIENCE", 1)  # grace periods of 4 s
    command = ["train", *sweep(url, "search.n_trials=1", "search.pruner=median", "trainer.max_epochs=6")]

    def take_away():
        wait_for(lambda: Path("multirun/s/0000/run.json").is_file() and trials(url)[0].intermediate_values)
        server.stop()

    thread = threading.Thread(target=take_away)
    thread.start()
    try:
        code = main(command)
    finally:
        thread.join()
        server.start()
    out, err = capfd.readouterr()
    assert code == 2 and f"search.storage={url}: " in err and "goes on once the database answers" in err
    assert re.search("the study was not told of epoch [2-6], training goes on: ", out)
    assert "the study could not be told of trials 0: they are run again" in out
    assert "Traceback" not in out + err and server.password not in out + err
    assert main(command) == 0
    assert sorted(trial.state.name for trial in trials(url)) == ["COMPLETE", "FAIL"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"password": "wrong"}, 'password authentication failed for user "sweeper". Check the address, the password'),
        ({"password": None}, "no password supplied"),
        ({"to": ("@127.0.0.1:", "@127.0.0.2:")}, "Connection refused.*Check the address"),
        ({"to": ("@127.0.0.1:", "@nowhere.invalid:")}, "nowhere.invalid.*Check the address"),
        ({"to": ("sweeps", "none")}, 'database "none\\d+" does not exist'),
        ({"to": ("+psycopg:", "+pg8000:")}, "pg8000 is not installed; get PostgreSQL's driver with .pip install"),
    ],
)  # fmt: skip
def test_what_the_database_refuses(url, server, sweep, workdir, monkeypatch, capfd, change, says):
    if change.get("password", "") is None:
        monkeypatch.delenv("PGPASSWORD")
    elif "password" in change:
        monkeypatch.setenv("PGPASSWORD", change["password"])
    monkeypatch.setattr(database, "_TRIES_S", (0.1,))
    assert main(["train", *sweep(url.replace(*change.get("to", ("", ""))), "search.n_trials=1")]) == 2
    out, err = capfd.readouterr()
    kind = "ConfigError" if "pg8000" in says else "StorageError"
    assert re.search(says, err) and re.search(f"^{kind}: search.storage=postgresql", err, re.MULTILINE), err
    assert "Traceback" not in out + err and server.password not in out + err
    assert not list(workdir.rglob("run.json")), "nothing was begun"
