"""What is deleted from the request log, and what is taken out of a text before it is logged."""

import asyncio
import json
import runpy
import sys
from datetime import UTC, date, datetime, timedelta

import pyarrow.parquet as pq
import pytest

from sodaops.errors import StorageError
from sodaops.request_log import journal as journals
from sodaops.request_log.parts import write_parts
from sodaops.request_log.retention import forget, prune
from sodaops.text.redaction import redact
from tests.unit.test_request_log import ids, journal, parts, row


def microseconds(when):
    return int(when.timestamp() * 1e6)


@pytest.fixture
def log(tmp_path):
    """A log of ten days with two rows each."""
    (tmp_path / "journal").mkdir()
    for n in range(10):
        when = microseconds(datetime(2026, 11, 1 + n, 12, tzinfo=UTC))
        rows = [row(0, time=when, request_id=f"r{n}", text_sha256=f"{n % 3:02}", place=place) for place in range(2)]
        (tmp_path / f"journal/{n}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert write_parts(tmp_path / "journal", str(tmp_path / "log")) == 10
    return tmp_path / "log"


@pytest.fixture
def write_and_prune(log, tmp_path, monkeypatch, capsys):
    """Runs the module as the service does, on a journal with a row of today; gives what it printed, or its last words."""

    def run(n_rows=1):
        rows = [json.dumps(row(0, time=microseconds(datetime.now(UTC)))) + "\n"] * n_rows
        (tmp_path / "journal/20261101T000000Z-z.jsonl").write_text("".join(rows))
        monkeypatch.setattr(sys, "argv", ["request_log", str(tmp_path / "journal"), str(log), "1"])
        monkeypatch.delitem(sys.modules, "sodaops.request_log.__main__", raising=False)
        try:
            runpy.run_module("sodaops.request_log", run_name="__main__")
        except SystemExit as error:
            return capsys.readouterr().out, str(error.code)
        return capsys.readouterr().out, None

    return run


def test_old_days_go_and_the_others_stay(log):
    deleted = prune(str(log), 4, today=date(2026, 11, 10))
    assert len(deleted) == 5 and all(f"date=2026-11-0{n}" in path for n, path in enumerate(deleted, 1))
    assert set(ids(log)) == {f"r{n}" for n in range(5, 10)}
    assert prune(str(log), 4, today=date(2026, 11, 10)) == []


def test_the_service_keeps_the_days_that_are_configured(log, write_and_prune):
    assert write_and_prune() == ("1\n", None)
    days = {date.fromisoformat(path.parent.name[5:]) for path in log.glob("date=*/*.parquet")}
    today = datetime.now(UTC).date()
    assert today in days and min(days) >= today - timedelta(days=1)


def test_a_day_that_cannot_be_deleted_is_reported_and_the_new_part_counts(log, write_and_prune):
    (log / "date=2020-01-01/a.parquet").mkdir(parents=True)  # a folder cannot be unlinked
    printed, error = write_and_prune()
    assert printed == "1\n" and "date=2020-01-01/a.parquet" in error
    assert write_and_prune(0) == ("0\n", None)  # nothing new, and so nothing is deleted


def test_the_journal_counts_a_part_whose_pruning_failed(log, tmp_path, monkeypatch):
    journal_, reasons = journal(tmp_path), []
    monkeypatch.setattr(journals.log, "error", lambda message, extra: reasons.append(extra["reason"]))

    async def run():
        return 1, "StorageError: stuck"

    monkeypatch.setattr(journal_, "_run_writer", run)
    journal_.append([row(1)])
    asyncio.run(journal_.close())
    counts = [journal_._metrics.parts.labels(outcome)._value.get() for outcome in ("written", "failed")]
    assert counts == [1, 0] and reasons == ["StorageError: stuck"]


def test_a_request_is_forgotten_everywhere_and_nothing_else(log, tmp_path):
    in_use = journal(tmp_path)  # a segment that a process holds
    in_use.append([row(1, request_id="r3"), row(2, request_id="other")])
    (in_use_path,) = (tmp_path / "journal").iterdir()
    closed = tmp_path / "journal/20261101T000000Z-b.jsonl"
    closed.write_text(json.dumps(row(3, request_id="r3")) + "\n" + json.dumps(row(4, request_id="kept")) + "\n" + '{"half')
    deletion = forget(str(log), str(tmp_path / "journal"), ["r3"], [])
    assert sorted(deletion.rows.values()) == [1, 2] and deletion.request_ids == {"r3"}
    assert deletion.held == [str(in_use_path)] and str(in_use_path) in deletion.summary()
    assert f"{closed}: 1 " in deletion.summary() and "3 rows of 1 " in deletion.summary()
    assert [json.loads(line)["request_id"] for line in closed.read_text().splitlines()] == ["kept"]
    asyncio.run(in_use.close())
    again = forget(str(log), str(tmp_path / "journal"), ["r3"], [])
    assert list(again.rows.values()) == [1] and not again.held
    assert set(ids(log)) == {f"r{n}" for n in range(10) if n != 3} | {"other", "kept"}


def test_a_text_is_forgotten_by_its_hash(log):
    deletion = forget(str(log), None, [], ["01", "none"])
    assert deletion.request_ids == {"r1", "r4", "r7"} and sum(deletion.rows.values()) == 6
    assert not any("2026-11-02" in str(path) for path in log.glob("date=*/*.parquet"))  # nothing was left of that part
    assert len(parts(log)) == 14


def test_files_that_cannot_be_read_are_named_and_parts_are_private(log, tmp_path):
    part = log / "date=2026-11-01/x.parquet"
    part.write_bytes(b"PAR1")
    segment = tmp_path / "journal/x.bad"
    segment.write_text("{{{")
    deletion = forget(str(log), str(tmp_path / "journal"), ["r0"], [])
    assert sum(deletion.rows.values()) == 2 and deletion.unread.keys() == {str(part), str(segment)}
    assert str(part) in deletion.summary() and str(segment) in deletion.summary()
    other = next(log.glob("date=2026-11-02/*.parquet"))
    assert pq.read_table(other, partitioning=None).num_rows == 2 and other.stat().st_mode & 0o777 == 0o600


def test_no_log(tmp_path):
    for call in (lambda: prune(str(tmp_path / "none"), 3), lambda: forget(str(tmp_path / "none"), None, ["a"], [])):
        with pytest.raises(StorageError, match=str(tmp_path / "none")):
            call()


@pytest.mark.parametrize(("kinds", "text", "expected"), [
    (["email"], "write to A.b-c+d@mail.example.co.uk, not @ann", "write to <email>, not @ann"),
    (["phone"], "call 555-867-5309 or +1 (212) 555 0199 at 10:30", "call <phone> or <phone> at 10:30"),
    (["phone"], "it cost 1,299.99 in 2024, order 12345", "it cost 1,299.99 in 2024, order 12345"),
    (["handle"], "@ann thanks @bob_1! mail a@b.example", "<handle> thanks <handle>! mail a@b.example"),
    ([], "@ann 555-867-5309 a@b.example", "@ann 555-867-5309 a@b.example"),
    (["handle", "phone", "email"], "a@b.example @ann 5558675309", "<email> <handle> <phone>"),
])  # fmt: skip
def test_redaction(kinds, text, expected):
    assert redact(text, kinds) == expected


def test_redaction_of_long_texts_ends():
    for text in ("1 " * 50_000, "a" * 100_000, "a.b-" * 25_000 + "@", "(" * 100_000, "@" * 100_000):
        redact(text, ["email", "phone", "handle"])  # quadratic time would exceed the suite's time limit
