"""A long prediction, killed, interrupted, disturbed and measured, as a process of its own."""

import os
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from sodaops.inference.table import CHUNK_ROWS
from tests.conftest import TWEETS
from tests.slow.conftest import PEAK

pytestmark = pytest.mark.slow
N_ROWS = 8 * CHUNK_ROWS
MAX_GROWTH_MB = 60


def write_table(path, n_rows):
    """Distinct texts, the tweets again and again, one row group."""
    tweets = pa.csv.read_csv(TWEETS)["text"].to_pylist()
    texts = [f"{tweets[i % len(tweets)]} {i}" for i in range(n_rows)]
    pq.write_table(pa.table({"id": range(n_rows), "text": texts}), path)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "t.parquet"
    write_table(path, N_ROWS)
    return path


class Run:
    """``sodaops predict`` of a table to ``out.parquet`` beside ``folder``'s other files."""

    def __init__(self, trained, table, folder):
        self.output = folder / "out.parquet"
        self.command = [sys.executable, "-c", PEAK, "predict", str(trained / "run/bundle"), "--file", str(table)]
        self.command += ["--output", str(self.output)]

    def begin(self):
        return subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def parts(self):
        return sorted(self.output.parent.glob(".out.parquet.work.*/*.parquet"))

    def begin_and_wait_for(self, n_parts):
        """A run that is at work, and has finished as many parts."""
        running = self.begin()
        while len(self.parts()) < n_parts:
            assert running.poll() is None, running.communicate()
            time.sleep(0.005)
        return running

    def finish(self):
        done = subprocess.run(self.command, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def run(trained, table, tmp_path):
    return Run(trained, table, tmp_path)


def left(run):
    return sorted(path.name for path in run.output.parent.iterdir())


def test_killed_again_and_again(run, trained, table, tmp_path_factory):
    whole = Run(trained, table, tmp_path_factory.mktemp("whole"))
    assert "earlier run" not in whole.finish()
    for n_parts in (1, 3, 5):
        running = run.begin_and_wait_for(n_parts)
        running.send_signal(signal.SIGKILL)
        running.communicate()
        assert not run.output.exists()
    n_kept = len(run.parts()) * CHUNK_ROWS
    assert 5 * CHUNK_ROWS <= n_kept < N_ROWS
    assert f"{run.output}: {N_ROWS:,} rows, {n_kept:,} of them answered by an earlier run\n" in run.finish()
    assert run.output.read_bytes() == whole.output.read_bytes() and left(run) == ["out.parquet"]
    found = pq.read_table(run.output)
    assert found["id"].to_pylist() == [str(i) for i in range(N_ROWS)] and found["label"].null_count == 0


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c(run):
    running = run.begin_and_wait_for(2)
    running.send_signal(signal.SIGINT)
    _, error = running.communicate(timeout=60)
    assert running.returncode == 130 and "Traceback" not in error
    n_kept = len(run.parts()) * CHUNK_ROWS
    assert error.splitlines()[-1] == f"stopped; the same command goes on after {n_kept:,} of {N_ROWS:,} rows"
    assert f"{n_kept:,} of them answered" in run.finish()


def test_a_table_that_changes(trained, tmp_path):
    table = tmp_path / "t.parquet"
    write_table(table, 4 * CHUNK_ROWS)
    run = Run(trained, table, tmp_path)
    running = run.begin_and_wait_for(1)
    os.utime(table)
    _, error = running.communicate(timeout=120)
    assert running.returncode == 2 and "t.parquet: was changed while it was read; run it again." in error
    assert not run.output.exists()
    running = run.begin_and_wait_for(1)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    write_table(table, 2 * CHUNK_ROWS)  # between the kill and the next run
    assert f"{2 * CHUNK_ROWS:,} rows\n" in run.finish()
    assert pq.read_metadata(run.output).num_rows == 2 * CHUNK_ROWS and left(run) == ["out.parquet", "t.parquet"]


def test_two_at_once(run):
    first = run.begin_and_wait_for(1)
    second = subprocess.run(run.command, capture_output=True, text=True, timeout=120)
    assert second.returncode == 2 and "another process is writing it" in second.stderr and "Traceback" not in second.stderr
    _, error = first.communicate(timeout=300)
    assert first.returncode == 0, error
    assert pq.read_metadata(run.output).num_rows == N_ROWS and left(run) == ["out.parquet"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_memory_does_not_grow_with_the_rows(trained, tmp_path, kind):
    """Four times as many rows, mostly of texts that are nothing, which are read and written but cost no computing."""
    peaks_mb = []
    for n_rows in (200_000, 800_000):
        texts = [f"text {i}" if i % 100 == 0 else "" for i in range(n_rows)]
        rows = pa.table({"text": texts, "other": [f"{i:064}" for i in range(n_rows)]})
        path = tmp_path / f"t{n_rows}.{kind}"
        if kind == "parquet":
            pq.write_table(rows, path)
        elif kind == "csv":
            pa.csv.write_csv(rows, path)
        else:
            path.write_text("".join(f'{{"text": "{text}", "other": "{i:064}"}}\n' for i, text in enumerate(texts)))
        command = [sys.executable, "-c", PEAK, "predict", str(trained / "run/bundle"), "--file", str(path)]
        done = subprocess.run(
            [*command, "--output", str(tmp_path / f"out.{kind}")], capture_output=True, text=True, timeout=500
        )
        assert done.returncode == 0, done.stderr
        peaks_mb.append(int(done.stdout.split("peak kB")[1]) / 1024)
    print(f"peaks: {peaks_mb}")
    assert peaks_mb[0] > 50 and peaks_mb[1] - peaks_mb[0] < MAX_GROWTH_MB
