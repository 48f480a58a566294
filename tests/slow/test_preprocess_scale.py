"""A large table is preprocessed in bounded memory, and goes on after a kill where it stopped."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from sodaops.data import workers
from sodaops.data.preprocess import preprocess, read_manifest
from sodaops.data.splits import SPLITS
from tests.conftest import REPO, TWEETS, configured

pytestmark = pytest.mark.slow
CODE = "import sys; from sodaops.cli import main; sys.exit(main(sys.argv[1:]))"
MAX_MB = 700


def large_table(path, n_rows):
    """Real tweets again and again, each a text of its own."""
    with open(TWEETS, encoding="utf-8", newline="") as file:
        rows = [(row["text"], row["sentiment"]) for row in csv.DictReader(file)]
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(n_rows):
            text, label = rows[i % len(rows)]
            writer.writerow([f"{text} {i}", label])


def start():
    command = [sys.executable, "-c", CODE, "preprocess", "data=csv", "data.path=t.csv", "evaluate.splits_dir=splits"]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(REPO)}, stdout=subprocess.PIPE, text=True)


def family(pid):
    """A process and all that it began, those that are still there."""
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


def test_a_million_rows_stay_within_their_memory(workdir):
    large_table("t.csv", 1_000_000)
    running, peak_mb, most = start(), 0.0, 0
    while running.poll() is None:
        processes = family(running.pid)
        peak_mb, most = max(peak_mb, resident_mb(processes)), max(most, len(processes))
        time.sleep(0.02)
    print(f"peak: {peak_mb:.0f} MB of {most} processes")
    assert running.returncode == 0 and "1,000,000 rows read; train " in running.communicate()[0]
    assert 100 < peak_mb < MAX_MB
    assert len(os.sched_getaffinity(0)) == 1 or most >= 3
    assert sorted(os.listdir()) == ["splits", "t.csv"]


def test_after_a_kill_it_goes_on(workdir, monkeypatch):
    large_table("t.csv", 600_000)
    running = start()
    while len(finished := list(Path().glob(".splits.work.*/[0-9]*.arrow"))) < 5:
        assert running.poll() is None
        time.sleep(0.005)
    processes = family(running.pid)
    os.kill(running.pid, signal.SIGKILL)
    running.communicate()
    psutil.wait_procs(processes, timeout=10)
    assert not [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    finished = {path.name for path in Path().glob(".splits.work.*/[0-9]*.arrow")}
    assert len(finished) >= 5 and not Path("splits").exists()

    made = []

    def write_part(path, rows):
        made.append(path.name)
        real(path, rows)

    real = workers.write_part
    monkeypatch.setattr(workers, "write_part", write_part)
    monkeypatch.setattr(workers, "ROWS_HERE", 10**9)
    config = configured("data=csv", "data.path=t.csv").data
    preprocess(config, "splits")
    assert made and not finished & set(made)
    made.clear()
    unbroken = preprocess(config, "unbroken")
    assert finished < set(made)
    assert [read_manifest("splits")["splits"][split]["sha256"] for split in SPLITS] == [
        unbroken["splits"][split]["sha256"] for split in SPLITS
    ]
    assert sorted(os.listdir()) == ["splits", "t.csv", "unbroken"]
