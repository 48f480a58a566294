"""A drift check of many requests needs bounded memory."""

import hashlib
import json
import subprocess
import sys
from datetime import timedelta

import pyarrow as pa
import pytest

from tests.requests import PART_SCHEMA, write_log_part
from tests.slow.conftest import PEAK
from tests.watching import RECENTLY

pytestmark = pytest.mark.deep
N_PARTS = 20
MAX_MB = 1200


def part(rows, first, n):
    """Repeated rows, with the request ids and hashes of distinct texts."""
    table = pa.concat_tables([rows] * (n // len(rows)))
    places = range(first, first + n)
    fresh = {
        "time": pa.array([RECENTLY + timedelta(milliseconds=i) for i in places], pa.timestamp("us", "UTC")),
        "request_id": [f"r{i}" for i in places],
        "text_sha256": [hashlib.sha256(str(i).encode()).hexdigest() for i in places],
    }
    return pa.Table.from_arrays(
        [pa.array(fresh[f.name], f.type) if f.name in fresh else table[f.name] for f in PART_SCHEMA], schema=PART_SCHEMA
    )


@pytest.mark.parametrize(
    ("n_rows", "key"),
    [(20_000, "drift.since=2020-01-01"), (100_000, "drift.last=100000")],
)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_many_requests(drift_bundle, logged_rows, tmp_path, n_rows, key):
    size = n_rows // N_PARTS
    for n in range(N_PARTS):
        write_log_part(tmp_path / "log", part(logged_rows.fresh, n * size, size), f"part{n:02}")
    command = [
        sys.executable, "-c", PEAK, "drift", str(drift_bundle), f"drift.request_log={tmp_path / 'log'}",
        f"drift.output_dir={tmp_path / 'out'}", key,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out/drift.json").read_text())
    assert (result["n_rows"], result["n_texts"], result["n_found"]) == (n_rows, n_rows, n_rows) and result["judged"]
    peak_mb = int(done.stdout.split("peak kB")[1]) / 1024
    assert 100 < peak_mb < MAX_MB, f"peak: {peak_mb:.0f} MB"
