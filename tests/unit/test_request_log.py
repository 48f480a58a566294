"""The request log: the journal's lines, and the Parquet parts that they become."""

import asyncio
import datetime
import fcntl
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sodaops.errors import StorageError
from sodaops.request_log import journal as journals
from sodaops.request_log.journal import Journal
from sodaops.request_log.parts import write_parts
from sodaops.serving.metrics import Metrics
from tests.conftest import REPO


def row(n, **changes):
    return {
        "time": 1_790_000_000_000_000 + n, "request_id": f"r{n}", "place": 0, "bundle_id": "b", "variant": "int8",
        "label": "good",        "score": 0.75, "labels": ["bad", "good"], "probs": [0.25, 0.75],
        "latency_ms": 1.5, "n_tokens": 3, "text_sha256": "00",
        "text": None, **changes,
    }  # fmt: skip


def journal(tmp_path, metrics=None, destination=None, part_s=300, part_bytes=1 << 20, max_bytes=1 << 20):
    there = destination or str(tmp_path / "log")
    return Journal(tmp_path / "journal", there, part_s, part_bytes, max_bytes, (metrics or Metrics()).journal)


def parts(folder):
    rows = [
        found
        for path in sorted(Path(folder).glob("date=*/*.parquet"))
        for found in pq.read_table(path, partitioning=None).to_pylist()
    ]
    return sorted(rows, key=lambda found: found["time"])


def value(metrics, name, **labels):
    return metrics.registry.get_sample_value(name, labels) or 0


def test_rows_come_out_as_they_went_in(tmp_path):
    metrics = Metrics()
    log = journal(tmp_path, metrics)
    texts = ['q"uote', "line\nbreak", "😀 مرحبا", None]
    assert all(log.append([row(n, text=text)]) for n, text in enumerate(texts))
    asyncio.run(log.close())
    found = parts(tmp_path / "log")
    assert [one["text"] for one in found] == texts and [one["request_id"] for one in found] == ["r0", "r1", "r2", "r3"]
    assert found[0]["probs"] == [0.25, 0.75] and found[0]["labels"] == ["bad", "good"]
    assert found[0]["time"] == datetime.datetime.fromtimestamp(1_790_000_000, datetime.UTC)
    assert list((tmp_path / "journal").iterdir()) == []
    assert value(metrics, "sodaops_request_log_rows_total") == 4
    assert value(metrics, "sodaops_request_log_parts_total", outcome="written") == 1


def test_what_a_dead_process_left_is_moved_by_the_next_and_a_living_one_is_left_alone(tmp_path):
    code = (
        "import os, sys; from tests.unit.test_request_log import journal, row; from pathlib import Path;"
        f"log = journal(Path({str(tmp_path)!r})); log.append([row(1), row(2)]); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == -9
    assert parts(tmp_path / "log") == []
    alive = journal(tmp_path)
    alive.append([row(3)])
    assert write_parts(tmp_path / "journal", str(tmp_path / "log")) == 1
    assert [one["request_id"] for one in parts(tmp_path / "log")] == ["r1", "r2"]
    asyncio.run(alive.close())
    assert [one["request_id"] for one in parts(tmp_path / "log")] == ["r1", "r2", "r3"]


def test_faults_do_not_end_the_log(tmp_path, monkeypatch):
    monkeypatch.setattr(journals, "_TICK_S", 0.05)
    sync, n_faults = os.fsync, 0

    def faulty(descriptor):
        nonlocal n_faults
        n_faults += 1
        if n_faults <= 2:
            raise OSError(5, "Input/output error")
        sync(descriptor)

    async def scenario():
        log = journal(tmp_path, part_s=0.1)
        task = asyncio.create_task(log.run())
        monkeypatch.setattr(os, "fsync", faulty)
        monkeypatch.setattr(log, "_open", lambda whole=log._open, left=[1]: whole() if not left else left.pop() / 0)
        for n in range(3):
            assert log.append([row(n)])
            await asyncio.sleep(0.3)
        async with asyncio.timeout(30):
            while len(parts(tmp_path / "log")) < 3:
                await asyncio.sleep(0.1)
        assert not task.done()
        task.cancel()
        await log.close()

    asyncio.run(scenario())


def test_beside_a_living_process_nothing_is_moved_and_nothing_started(tmp_path, monkeypatch):
    monkeypatch.setattr(journals, "_TICK_S", 0.02)
    started = []

    async def scenario():
        one, two = journal(tmp_path), journal(tmp_path)
        monkeypatch.setattr(two, "_run_parts", lambda: started.append(1))
        one.append([row(1)])
        task = asyncio.create_task(two.run())
        await asyncio.sleep(0.3)
        task.cancel()
        os.close(two._descriptor)
        await one.close()

    asyncio.run(scenario())
    assert started == [] and len(parts(tmp_path / "log")) == 1


def test_doing_it_twice_leaves_one_part(tmp_path):
    (tmp_path / "journal").mkdir()
    segment = tmp_path / "journal/20261123T000000Z-a.jsonl"
    lines = json.dumps(row(1)) + "\n"
    for _ in range(2):  # a process that died between writing the part and deleting the segment
        segment.write_text(lines)
        write_parts(tmp_path / "journal", str(tmp_path / "log"))
    assert [str(path.relative_to(tmp_path / "log")) for path in (tmp_path / "log").rglob("*.parquet")] == [
        "date=2026-09-21/20261123T000000Z-a.parquet"  # the first row's day, since a segment may have waited for it
    ]
    assert len(parts(tmp_path / "log")) == 1


def test_a_line_that_was_cut_off_is_left_out_and_damage_is_put_aside(tmp_path):
    folder = tmp_path / "journal"
    folder.mkdir()
    whole = json.dumps(row(1)) + "\n"
    (folder / "20261123T000000Z-a.jsonl").write_text(whole + json.dumps(row(2))[:40])
    (folder / "20261123T000000Z-b.jsonl").write_text(json.dumps(row(3))[:40])
    (folder / "20261123T000000Z-c.jsonl").write_text(whole + "{{{\n" + whole)
    with pytest.raises(StorageError, match=r"-c.bad: not readable as JSON lines, and put aside"):
        write_parts(folder, str(tmp_path / "log"))
    assert [one["request_id"] for one in parts(tmp_path / "log")] == ["r1"]
    assert [path.name for path in folder.iterdir()] == ["20261123T000000Z-c.bad"]


def test_a_segment_that_another_process_moves_is_left_alone(tmp_path):
    (tmp_path / "journal").mkdir()
    segment = tmp_path / "journal/20261123T000000Z-a.jsonl"
    segment.write_text(json.dumps(row(1)) + "\n")
    with segment.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert write_parts(tmp_path / "journal", str(tmp_path / "log")) == 0
    assert write_parts(tmp_path / "journal", str(tmp_path / "log")) == 1


@pytest.mark.slow
def test_parts_come_by_size_and_by_time(tmp_path):
    async def scenario(**settings):
        log = journal(tmp_path, **settings)
        running = asyncio.create_task(log.run())
        log.append([row(1)])
        for _ in range(60):
            await asyncio.sleep(0.1)
            if parts(tmp_path / "log"):
                break
        running.cancel()
        found = parts(tmp_path / "log")
        await log.close()
        return found

    for settings in ({"part_s": 1}, {"part_bytes": 10}):
        assert len(asyncio.run(scenario(**settings))) == 1
        for path in (tmp_path / "log").rglob("*.parquet"):
            path.unlink()


def test_storage_that_is_gone_spools_up_to_a_bound(tmp_path):
    metrics = Metrics()
    (tmp_path / "log").write_text("in the way")
    log = journal(tmp_path, metrics, max_bytes=800)
    assert [log.append([row(n)]) for n in range(4)] == [True, True, True, False]
    asyncio.run(log.close())
    assert value(metrics, "sodaops_request_log_lost_total") == 1
    assert value(metrics, "sodaops_request_log_parts_total", outcome="failed") == 1
    (tmp_path / "log").unlink()
    again = journal(tmp_path, metrics)
    asyncio.run(again.close())
    assert [one["request_id"] for one in parts(tmp_path / "log")] == ["r0", "r1", "r2"]


def test_a_full_disk_loses_no_line_that_was_taken(tmp_path):
    """A process that may write no more than 600 bytes to a file, as on a disk that is full there."""
    code = (
        "import os, signal, resource; from tests.unit.test_request_log import journal, row; from pathlib import Path;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600));"
        f"log = journal(Path({str(tmp_path)!r}));"
        "print([log.append([row(n)]) for n in range(4)]); log._sync(); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.stdout == "[True, True, False, False]\n", done.stderr
    (segment,) = (tmp_path / "journal").iterdir()
    assert [json.loads(line)["request_id"] for line in segment.read_text().splitlines()] == ["r0", "r1"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_the_journal_is_for_its_owner_alone(tmp_path):
    log = journal(tmp_path)
    (segment,) = (tmp_path / "journal").iterdir()
    assert segment.stat().st_mode & 0o777 == 0o600
    os.close(log._descriptor)
