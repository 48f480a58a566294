"""What is deleted from the request log, and what is taken out of a text before it is logged."""

import asyncio
import json
import subprocess
import sys
from datetime import UTC, date, datetime, timedelta

import pyarrow.parquet as pq
import pytest

from sodaops.errors import StorageError
from sodaops.request_log.journal import Journal
from sodaops.request_log.parts import write_parts
from sodaops.request_log.retention import forget, prune
from sodaops.serving.metrics import Metrics
from sodaops.text.redaction import redact
from tests.unit.test_request_log import journal, parts, row

PARTS = [sys.executable, "-m", "sodaops.request_log"]


def day(n):
    return int(datetime(2026, 11, 1 + n, 12, tzinfo=UTC).timestamp() * 1e6)


def filled(tmp_path):
    """A log of ten days with two rows each."""
    (tmp_path / "journal").mkdir()
    for n in range(10):
        rows = [row(0, time=day(n), request_id=f"r{n}", text_sha256=f"{n % 3:02}", place=place) for place in range(2)]
        (tmp_path / f"journal/{n}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert write_parts(tmp_path / "journal", str(tmp_path / "log")) == 10
    return tmp_path / "log"


def test_old_days_go_and_the_others_stay(tmp_path):
    log = filled(tmp_path)
    gone = prune(str(log), 4, today=date(2026, 11, 10))
    assert len(gone) == 5 and all(f"date=2026-11-0{n}" in path for n, path in enumerate(gone, 1))
    assert {found["request_id"] for found in parts(log)} == {f"r{n}" for n in range(5, 10)}
    assert prune(str(log), 4, today=date(2026, 11, 10)) == []


def test_the_service_keeps_as_many_days_as_it_is_told(tmp_path):
    log = filled(tmp_path)
    today = datetime.now(UTC)
    (tmp_path / "journal/20261101T000000Z-z.jsonl").write_text(json.dumps(row(0, time=int(today.timestamp() * 1e6))) + "\n")
    done = subprocess.run([*PARTS, tmp_path / "journal", log, "1"], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n" and not done.stderr
    kept = {str(path.parent.name) for path in log.glob("date=*/*.parquet")}
    assert f"date={today.date()}" in kept and f"date={today.date() - timedelta(days=40)}" not in kept
    assert all(date.fromisoformat(name[5:]) >= today.date() - timedelta(days=1) for name in kept)


def test_old_days_that_cannot_be_deleted_are_told_and_the_new_part_counts(tmp_path, caplog):
    log = filled(tmp_path)
    stuck = log / "date=2020-01-01/a.parquet"
    stuck.mkdir(parents=True)  # a folder where a part should be: nobody can unlink it
    metrics = Metrics()
    open_log = Journal(tmp_path / "journal", str(log), 900, 2**20, 2**20, metrics.journal, keep_days=1)
    open_log.append([row(1, time=int(datetime.now(UTC).timestamp() * 1e6))])
    asyncio.run(open_log.close())
    counted = {kind: metrics.journal.parts.labels(kind)._value.get() for kind in ("written", "failed")}
    assert "old parts not deleted" in caplog.text
    assert counted == {"written": 1, "failed": 0} and not list((tmp_path / "journal").glob("*.jsonl"))
    done = subprocess.run([*PARTS, tmp_path / "journal", log, "1"], capture_output=True, text=True)
    assert done.stdout == "0\n" and not done.returncode  # nothing new, and so nothing is tried


def test_a_request_is_forgotten_everywhere_and_nothing_else(tmp_path):
    log = filled(tmp_path)
    open_log = journal(tmp_path)  # a living process, with rows in its journal
    open_log.append([row(1, request_id="r3"), row(2, request_id="other")])
    closed = tmp_path / "journal/20261101T000000Z-b.jsonl"
    closed.write_text(json.dumps(row(3, request_id="r3")) + "\n" + json.dumps(row(4, request_id="kept")) + "\n" + '{"half')
    found = forget(str(log), str(tmp_path / "journal"), ["r3"], [])
    assert sorted(found.rows.values()) == [1, 2] and found.request_ids == {"r3"}
    assert len(found.held) == 1 and "a service has it in hand; run this again" in found.summary()
    assert "3 rows of 1 requests deleted" in found.summary()
    assert [json.loads(line)["request_id"] for line in closed.read_text().splitlines()] == ["kept"]
    asyncio.run(open_log.close())
    again = forget(str(log), str(tmp_path / "journal"), ["r3"], [])
    assert list(again.rows.values()) == [1] and not again.held
    left = {found["request_id"] for found in parts(log)}
    assert left == {f"r{n}" for n in range(10) if n != 3} | {"other", "kept"}


def test_a_text_is_forgotten_by_its_hash(tmp_path):
    log = filled(tmp_path)
    found = forget(str(log), None, [], ["01", "none"])
    assert found.request_ids == {"r1", "r4", "r7"} and sum(found.rows.values()) == 6
    assert not any("2026-11-02" in str(path) for path in log.glob("date=*/*.parquet"))  # nothing was left of that part
    assert len(parts(log)) == 14


def test_a_part_that_cannot_be_read_is_named(tmp_path):
    log = filled(tmp_path)
    bad = log / "date=2026-11-01/x.parquet"
    bad.write_bytes(b"PAR1")
    found = forget(str(log), None, ["r0"], [])
    assert sum(found.rows.values()) == 2 and str(bad) in found.unread and "not readable" in found.summary()
    assert pq.read_table(next(log.glob("date=2026-11-02/*.parquet")), partitioning=None).num_rows == 2


def test_no_log(tmp_path):
    for call in (lambda: prune(str(tmp_path / "none"), 3), lambda: forget(str(tmp_path / "none"), None, ["a"], [])):
        with pytest.raises(StorageError, match="none: no such request log"):
            call()


@pytest.mark.parametrize(
    ("kinds", "text", "expected"),
    [
        (["email"], "write to A.b-c+d@mail.example.co.uk, not @ann", "write to <email>, not @ann"),
        (["phone"], "call 555-867-5309 or +1 (212) 555 0199 at 10:30", "call <phone> or <phone> at 10:30"),
        (["phone"], "it cost 1,299.99 in 2024, order 12345", "it cost 1,299.99 in 2024, order 12345"),
        (["handle"], "@ann thanks @bob_1! mail a@b.example", "<handle> thanks <handle>! mail a@b.example"),
        ([], "@ann 555-867-5309 a@b.example", "@ann 555-867-5309 a@b.example"),
        (["handle", "phone", "email"], "a@b.example @ann 5558675309", "<email> <handle> <phone>"),
    ],
)
def test_redaction(kinds, text, expected):
    assert redact(text, kinds) == expected


def test_redaction_of_long_texts_is_quick():
    for text in ("1 " * 50_000, "a" * 100_000, "a.b-" * 25_000 + "@", "(" * 100_000, "@" * 100_000):
        redact(text, ["email", "phone", "handle"])  # the suite's time limit is the assertion's other half


def test_segments_that_were_put_aside_are_named_and_parts_are_private(tmp_path):
    log = filled(tmp_path)
    (tmp_path / "journal/x.bad").write_text("{{{")
    found = forget(str(log), str(tmp_path / "journal"), ["none"], [])
    assert list(found.unread) == [str(tmp_path / "journal/x.bad")] and not found.rows
    assert {path.stat().st_mode & 0o777 for path in log.glob("date=*/*.parquet")} == {0o600}
