"""A large table is preprocessed in bounded memory, and a killed run continues from its finished parts."""

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from sodaops.data import parts, workers
from sodaops.data.preprocess import preprocess, read_manifest
from sodaops.data.splits import SPLITS
from tests.conftest import REPO, TWEETS, configured, make_rows, table

pytestmark = pytest.mark.slow
CLI = "import sys; from sodaops.cli import main; sys.exit(main(sys.argv[1:]))"
# Starts the pool after the first part, and waits for ever when it has made four more.
STUCK = """
import sys, time
from sodaops.data import parts, workers
def wait(pending, wait=workers._wait, made=[]):
    made.append(wait(pending))
    if len(made) == 4:
        print("four parts", flush=True)
        time.sleep(600)
    return made[-1]
workers._wait, workers.LOCAL_ROWS, workers._n_workers, parts.PART_ROWS = wait, 1, lambda: 2, 50
"""
MAX_MB = 700


def large_table(path, n_rows):
    """Real tweets again and again, each made a text of its own by a number."""
    with open(TWEETS, encoding="utf-8", newline="") as file:
        rows = [(row["text"], row["sentiment"]) for row in csv.DictReader(file)]
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows((f"{rows[i % len(rows)][0]} {i}", rows[i % len(rows)][1]) for i in range(n_rows))


def start(code):
    command = [sys.executable, "-c", code, "preprocess", "data=csv", "data.path=t.csv", "evaluate.splits_dir=splits"]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(REPO)}, stdout=subprocess.PIPE, text=True)


def family(pid):
    """A process and its descendants, as far as they still run."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def resident_mb(processes):
    total = 0
    for process in processes:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total / 2**20


@pytest.mark.parametrize("n_rows", [workers.LOCAL_ROWS + 100_000, pytest.param(1_000_000, marks=pytest.mark.deep)])
def test_a_large_table_stays_within_its_memory(workdir, n_rows):
    large_table("t.csv", n_rows)
    running, peak_mb, most = start(CLI), 0.0, 0
    while running.poll() is None:
        processes = family(running.pid)
        peak_mb, most = max(peak_mb, resident_mb(processes)), max(most, len(processes))
        time.sleep(0.02)
    running.communicate()
    assert running.returncode == 0
    manifest = read_manifest("splits")
    assert manifest["n_read"] == manifest["n_kept"] == n_rows
    assert 100 < peak_mb < MAX_MB
    assert workers.n_cores() == 1 or most >= 3
    assert sorted(os.listdir()) == ["splits", "t.csv"]


def test_a_killed_run_continues(write, monkeypatch):
    write("t.csv", table(make_rows(3000)))
    running = start(STUCK + CLI)
    assert running.stdout.readline() == "four parts\n"
    processes = family(running.pid)
    running.kill()
    running.communicate()
    psutil.wait_procs(processes, timeout=60)
    assert not [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    finished = {path.name for path in Path().glob(".splits.work.*/[0-9]*.arrow")}
    assert 5 <= len(finished) < 60 and not Path("splits").exists()

    made = []

    def write_part(path, rows, write_part=workers.write_part):
        made.append(path.name)
        write_part(path, rows)

    monkeypatch.setattr(workers, "write_part", write_part)
    monkeypatch.setattr(parts, "PART_ROWS", 50)
    config = configured("data=csv", "data.path=t.csv").data
    preprocess(config, "splits")
    assert len(made) == 60 - len(finished) and not finished & set(made)
    unbroken = preprocess(config, "unbroken")
    hashes = [read_manifest("splits")["splits"][split]["sha256"] for split in SPLITS]
    assert hashes == [unbroken["splits"][split]["sha256"] for split in SPLITS]
    assert sorted(os.listdir()) == ["splits", "t.csv", "unbroken"]
