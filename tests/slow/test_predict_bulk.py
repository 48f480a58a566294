"""A prediction of a table in a process of its own: killed, interrupted, and measured."""

import re
import signal
import subprocess
import sys

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from sodaops.inference.table import bulk_predictor, predict_table
from tests.conftest import TWEETS

pytestmark = pytest.mark.slow
CHUNK_ROWS = 64
N_ROWS = 8 * CHUNK_ROWS
MAX_GROWTH_MB = 90  # Arrow's buffers fill up to about 60 MB

# `sodaops predict` in small chunks, which stops for good when it has written a number of parts.
STOPPING = """
import sys, time
from functools import partial
from sodaops.cli import main
from sodaops.inference import bulk, table

chunk_rows, n_parts = map(int, sys.argv[1:3])
table.predict_table = partial(table.predict_table, chunk_rows=chunk_rows)
write = bulk.PredictionParts.write

def write_and_stop(parts, first, probs):
    write(parts, first, probs)
    if parts.n_rows >= n_parts * chunk_rows:
        print("stopping", flush=True)
        time.sleep(600)

bulk.PredictionParts.write = write_and_stop
sys.exit(main(["predict", *sys.argv[3:]]))
"""

# `sodaops predict` of two tables; prints the peak memory after each, in kB.
PEAKS = """
import sys
from sodaops.cli import main
bundle, *paths = sys.argv[1:]
for path, output in zip(paths[::2], paths[1::2]):
    assert main(["predict", bundle, "--file", path, "--output", output]) == 0
    print("peak", next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.fixture
def table(tmp_path):
    """Distinct texts in one row group."""
    tweets = pa.csv.read_csv(TWEETS)["text"].to_pylist()
    texts = [f"{tweets[i % len(tweets)]} {i}" for i in range(N_ROWS)]
    pq.write_table(pa.table({"id": range(N_ROWS), "text": texts}), tmp_path / "t.parquet")
    return str(tmp_path / "t.parquet")


@pytest.fixture
def stop_after(trained, table, tmp_path):
    """Starts the command, and sends it a signal when it has written a number of parts; returns exit code and stderr."""

    def stop(n_parts, number):
        command = [sys.executable, "-c", STOPPING, str(CHUNK_ROWS), str(n_parts), str(trained / "run/bundle")]
        command += ["--file", table, "--output", str(tmp_path / "out.parquet")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout.readline() == "stopping\n", process.communicate()[1]
                process.send_signal(number)
                return process.wait(120), process.stderr.read()
            finally:
                process.kill()

    return stop


def test_a_killed_prediction_resumes(trained, table, tmp_path, stop_after):
    predictor, output = bulk_predictor(trained / "run/bundle"), tmp_path / "out.parquet"
    for n_parts in (1, 3):
        assert stop_after(n_parts, signal.SIGKILL)[0] == -signal.SIGKILL and not output.exists()
    assert predict_table(predictor, table, "text", str(output), CHUNK_ROWS) == (N_ROWS, 3 * CHUNK_ROWS)
    assert predict_table(predictor, table, "text", str(tmp_path / "whole.parquet"), CHUNK_ROWS) == (N_ROWS, 0)
    assert output.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.parquet", "t.parquet", "whole.parquet"]
    rows = pq.read_table(output)
    assert rows["id"].to_pylist() == list(range(N_ROWS)) and rows["label"].null_count == 0


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_an_interrupted_prediction_resumes(trained, table, tmp_path, stop_after):
    code, error = stop_after(2, signal.SIGINT)
    assert code == 130 and "Traceback" not in error
    assert re.findall(r"[\d,]+", error.splitlines()[-1]) == [f"{2 * CHUNK_ROWS}", f"{N_ROWS}"]
    output = str(tmp_path / "out.parquet")
    assert predict_table(bulk_predictor(trained / "run/bundle"), table, "text", output, CHUNK_ROWS) == (N_ROWS, 2 * CHUNK_ROWS)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["parquet", *(pytest.param(kind, marks=pytest.mark.deep) for kind in ("csv", "jsonl"))])
def test_memory_does_not_grow_with_the_rows(trained, tmp_path, kind):
    """140 MB of rows more; most texts are empty, so that they are read and written but not computed."""
    paths = []
    for n_rows in (60_000, 340_000):
        texts = [f"text {i}" if i % 100 == 0 else "" for i in range(n_rows)]
        rows = pa.table({"text": texts, "other": [f"{i:0500}" for i in range(n_rows)]})
        path = tmp_path / f"t{n_rows}.{kind}"
        if kind == "parquet":
            pq.write_table(rows, path)
        elif kind == "csv":
            pa.csv.write_csv(rows, path)
        else:
            path.write_text("".join(f'{{"text": "{text}", "other": "{i:0500}"}}\n' for i, text in enumerate(texts)))
        paths += [str(path), str(tmp_path / f"out{n_rows}.{kind}")]
    done = subprocess.run(
        [sys.executable, "-c", PEAKS, str(trained / "run/bundle"), *paths], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    small_mb, large_mb = (int(kb) / 1024 for kb in re.findall(r"peak (\d+)", done.stdout))
    print(f"peaks: {small_mb:.0f} and {large_mb:.0f} MB")
    assert small_mb > 50 and large_mb - small_mb < MAX_GROWTH_MB
