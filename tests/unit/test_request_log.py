"""The request log: the journal's lines, and the Parquet parts that they become."""

import asyncio
import datetime
import fcntl
import json
import os
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sodaops.errors import StorageError
from sodaops.request_log import journal as journals
from sodaops.request_log.journal import Journal
from sodaops.request_log.parts import write_parts
from sodaops.serving.metrics import Metrics
from tests.conftest import file_size_limit


def row(n, **changes):
    return {
        "time": 1_790_000_000_000_000 + n, "request_id": f"r{n}", "place": 0, "bundle_id": "b", "variant": "int8",
        "label": "good", "score": 0.75, "labels": ["bad", "good"], "probs": [0.25, 0.75], "latency_ms": 1.5, "n_tokens": 3,
        "text_sha256": "00", "text": None, **changes,
    }  # fmt: skip


def journal(tmp_path, metrics=None, part_s=300, part_bytes=1 << 20, max_bytes=1 << 20):
    return Journal(tmp_path / "journal", str(tmp_path / "log"), part_s, part_bytes, max_bytes, (metrics or Metrics()).journal)


def parts(folder):
    paths = sorted(Path(folder).glob("date=*/*.parquet"))
    rows = [row for path in paths for row in pq.read_table(path, partitioning=None).to_pylist()]
    return sorted(rows, key=lambda row: row["time"])


def ids(folder):
    return [row["request_id"] for row in parts(folder)]


def value(metrics, name, **labels):
    return metrics.registry.get_sample_value(name, labels) or 0


@pytest.fixture
def in_process(monkeypatch):
    """Writes parts in this process rather than in one of their own."""

    async def run(log):
        try:
            return write_parts(log._folder, log._destination), ""
        except StorageError as error:
            return None, str(error)

    monkeypatch.setattr(Journal, "_run_writer", run)


def test_rows_come_out_as_they_went_in(tmp_path):
    metrics = Metrics()
    log = journal(tmp_path, metrics)
    (segment,) = (tmp_path / "journal").iterdir()
    assert segment.stat().st_mode & 0o777 == 0o600
    texts = ['q"uote', "line\nbreak", "😀 مرحبا", None]
    assert all(log.append([row(n, text=text)]) for n, text in enumerate(texts))
    asyncio.run(log.close())
    rows = parts(tmp_path / "log")
    assert [row["text"] for row in rows] == texts and ids(tmp_path / "log") == ["r0", "r1", "r2", "r3"]
    assert rows[0]["probs"] == [0.25, 0.75] and rows[0]["labels"] == ["bad", "good"]
    assert rows[0]["time"] == datetime.datetime.fromtimestamp(1_790_000_000, datetime.UTC)
    assert list((tmp_path / "journal").iterdir()) == []
    assert value(metrics, "sodaops_request_log_rows_total") == 4
    assert value(metrics, "sodaops_request_log_parts_total", outcome="written") == 1


def test_segments_of_a_dead_process_are_taken_over_and_those_of_a_living_one_are_not(tmp_path, in_process, monkeypatch):
    dead, alive = journal(tmp_path), journal(tmp_path)
    dead.append([row(1), row(2)])
    os.close(dead._descriptor)  # as the end of a process does
    alive.append([row(3)])
    assert write_parts(tmp_path / "journal", str(tmp_path / "log")) == 1
    assert ids(tmp_path / "log") == ["r1", "r2"]
    beside = journal(tmp_path)
    monkeypatch.setattr(beside, "_run_writer", lambda: pytest.fail("a writer was started for a segment in use"))
    asyncio.run(beside._tick())
    os.close(beside._descriptor)
    asyncio.run(alive.close())
    assert ids(tmp_path / "log") == ["r1", "r2", "r3"]


def test_faults_do_not_end_the_log(tmp_path, in_process, monkeypatch):
    monkeypatch.setattr(journals, "_TICK_S", 0.01)
    sync, open_segment = os.fsync, Journal._open
    sync_faults, open_faults = [OSError(5, "Input/output error")] * 2, [ZeroDivisionError()]

    def failing_sync(descriptor):
        if sync_faults:
            raise sync_faults.pop()
        sync(descriptor)

    def failing_open(log):
        if open_faults:
            raise open_faults.pop()
        open_segment(log)

    async def scenario():
        log = journal(tmp_path, part_s=0.01)
        monkeypatch.setattr(os, "fsync", failing_sync)
        monkeypatch.setattr(Journal, "_open", failing_open)
        task = asyncio.create_task(log.run())
        async with asyncio.timeout(60):
            assert log.append([row(0)])
            while sync_faults or open_faults:
                await asyncio.sleep(0.01)
            assert log.append([row(1)])
            while len(parts(tmp_path / "log")) < 2:
                await asyncio.sleep(0.01)
        assert not task.done()
        task.cancel()
        await log.close()

    asyncio.run(scenario())


def test_doing_it_twice_leaves_one_part(tmp_path):
    (tmp_path / "journal").mkdir()
    segment = tmp_path / "journal/20261123T000000Z-a.jsonl"
    for _ in range(2):  # a process that died between writing the part and deleting the segment
        segment.write_text(json.dumps(row(1)) + "\n")
        write_parts(tmp_path / "journal", str(tmp_path / "log"))
    assert [str(path.relative_to(tmp_path / "log")) for path in (tmp_path / "log").rglob("*.parquet")] == [
        "date=2026-09-21/20261123T000000Z-a.parquet"  # the first row's day, since a segment may have waited for it
    ]
    assert ids(tmp_path / "log") == ["r1"]


def test_an_incomplete_line_is_left_out_and_a_damaged_segment_is_put_aside(tmp_path):
    folder = tmp_path / "journal"
    folder.mkdir()
    whole = json.dumps(row(1)) + "\n"
    (folder / "20261123T000000Z-a.jsonl").write_text(whole + json.dumps(row(2))[:40])
    (folder / "20261123T000000Z-b.jsonl").write_text(json.dumps(row(3))[:40])
    (folder / "20261123T000000Z-c.jsonl").write_text(whole + "{{{\n" + whole)
    with pytest.raises(StorageError, match=r"20261123T000000Z-c\.bad"):
        write_parts(folder, str(tmp_path / "log"))
    assert ids(tmp_path / "log") == ["r1"]
    assert [path.name for path in folder.iterdir()] == ["20261123T000000Z-c.bad"]


def test_a_segment_that_another_process_moves_is_left_alone(tmp_path):
    (tmp_path / "journal").mkdir()
    segment = tmp_path / "journal/20261123T000000Z-a.jsonl"
    segment.write_text(json.dumps(row(1)) + "\n")
    with segment.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert write_parts(tmp_path / "journal", str(tmp_path / "log")) == 0
    assert write_parts(tmp_path / "journal", str(tmp_path / "log")) == 1


@pytest.mark.parametrize(("settings", "expected"), [({}, 0), ({"part_s": 1}, 1), ({"part_bytes": 10}, 1)])
def test_parts_come_by_age_and_by_size(tmp_path, in_process, settings, expected):
    log = journal(tmp_path, **settings)
    log.append([row(1)])
    log._opened_at = time.monotonic() - 2
    asyncio.run(log._tick())
    assert len(parts(tmp_path / "log")) == expected
    asyncio.run(log.close())


def test_without_storage_the_journal_grows_up_to_its_limit(tmp_path, in_process):
    metrics = Metrics()
    (tmp_path / "log").write_text("in the way")
    log = journal(tmp_path, metrics, max_bytes=800)
    assert [log.append([row(n)]) for n in range(4)] == [True, True, True, False]
    asyncio.run(log.close())
    assert value(metrics, "sodaops_request_log_lost_total") == 1
    assert value(metrics, "sodaops_request_log_parts_total", outcome="failed") == 1
    (tmp_path / "log").unlink()
    asyncio.run(journal(tmp_path, metrics).close())
    assert ids(tmp_path / "log") == ["r0", "r1", "r2"]


def test_a_full_disk_leaves_no_incomplete_line(tmp_path):
    log = journal(tmp_path)
    with file_size_limit(600):  # the third row would cross it
        taken = [log.append([row(n)]) for n in range(4)]
    os.close(log._descriptor)
    (segment,) = (tmp_path / "journal").iterdir()
    assert taken == [True, True, False, False]
    assert [json.loads(line)["request_id"] for line in segment.read_text().splitlines()] == ["r0", "r1"]
