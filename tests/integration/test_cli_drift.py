"""The verbs around the request log, as a shell sees them: sodaops drift and sodaops log."""

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sodaops.bundle import layout
from sodaops.registry.registry import Registry
from tests.gcs import emulated_bucket
from tests.requests import refused_rows, write_log_part
from tests.serving import refresh_info
from tests.watching import RECENTLY, fill, replaced

OLD = datetime.now(UTC) - timedelta(days=40)


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """An address of an emulated bucket of Google Cloud Storage."""
    with emulated_bucket(tmp_path_factory.mktemp("gcs")) as address:
        yield address


def ids(log):
    return sorted(
        i for path in Path(log).glob("date=*/*.parquet") for i in pq.ParquetFile(path).read()["request_id"].to_pylist()
    )


def refused(ran, said):
    code, out, err = ran
    assert code == 2 and out == "", (code, out, err)
    assert said in err, err
    assert not Path("outputs").exists()


@pytest.mark.slow
def test_no_drift(run, referenced, logged_rows):
    fill(Path("log"), logged_rows.fresh)
    code, out, err = run("drift", referenced, "drift.request_log=log", "--fail-on-drift")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].split() == ["feature", "verdict", "p-value", "distance", "before", "now"]
    found = json.loads(Path("outputs/drift/drift.json").read_text())
    assert len(lines) == 1 + 8 + 2
    for line, feature in zip(lines[1:9], found["features"], strict=True):
        assert line[34:].split()[0] == "holds" and float(line[34:].split()[1]) == pytest.approx(feature["p"], rel=0.01)
    assert lines[9] == f"no drift, 200 requests of bundle {logged_rows.bundle_id}: as the reference"
    assert lines[10] == "report: outputs/drift/drift.html"
    assert {path.name for path in Path("outputs/drift").iterdir()} == {"drift.html", "drift.json", "evidently.html"}


def test_drift_and_who_wants_to_fail_on_it(run, referenced, logged_rows):
    fill(Path("log"), logged_rows.others)
    asked = ("drift", referenced, "serve.request_log=log", "drift.output_dir=found")
    code, out, err = run(*asked)
    assert (code, err) == (0, "")
    assert f"DRIFT, 200 requests of bundle {logged_rows.bundle_id}: other texts than those learned from (" in out
    assert "what texts of one label say       DRIFT" in out and out.endswith("report: found/drift.html\n")
    code, again, err = run(*asked, "--fail-on-drift")
    assert code == 4 and again == out
    assert err == f"AlarmError: {logged_rows.bundle_id}: drift (texts).\n"


def test_what_is_beside_the_verdict_is_printed(run, referenced, logged_rows):
    future = refused_rows(7, logged_rows.bundle_id, datetime.now(UTC) + timedelta(days=1))
    fill(Path("log"), logged_rows.fresh, replaced(logged_rows.others, "bundle_id", "b2"), future)
    bad = write_log_part(Path("log"), logged_rows.fresh, "bad")
    bad.write_bytes(b"no Parquet")
    code, out, _ = run("drift", referenced, "drift.request_log=log")
    assert code == 0 and "note: 200 requests of bundle b2 are judged apart: drift in " in out
    assert f"note: 1 part left out: {bad} (" in out
    assert "note: left out, since a clock is ahead: 7 rows of the future\n" in out
    assert f"no drift, 200 requests of bundle {logged_rows.bundle_id}" in out


def test_too_few_for_a_verdict(run, referenced, logged_rows):
    fill(Path("log"), logged_rows.fresh)
    code, out, _ = run("drift", referenced, "drift.request_log=log", "drift.last=30", "--fail-on-drift")
    assert code == 0 and out.startswith(f"no verdict, 30 requests of bundle {logged_rows.bundle_id}: too few requests to judge")
    assert not Path("outputs/drift/evidently.html").exists()


def test_a_span_of_time(run, referenced, logged_rows):
    fill(Path("log"), logged_rows.fresh, replaced(logged_rows.others, "bundle_id", "b2"))
    since, until = ((RECENTLY + timedelta(seconds=s)).isoformat() for s in (50, 150))
    code, out, _ = run("drift", referenced, "drift.request_log=log", f"drift.since='{since}'", f"drift.until='{until}'")
    assert code == 0 and "no drift, 100 requests of bundle" in out and "note: 100 requests of bundle b2" in out


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ([], "ConfigError: drift.request_log is missing; give the folder or gs:// address that serve.request_log had."),
        (["drift.request_log=none"], "StorageError: none: no such request log; serve with serve.request_log=none to make one."),
        (["drift.request_log=empty"], "DataError: empty: no request in the window. Requests come into it a part at a time"),
        (["drift.request_log=bad"], "DataError: bad: no request in the window; parts that could not be read: bad/date="),
        (["drift.request_log=log", "drift.since=2030-01-01"], "log: no request in the window (drift.since=2030-01-01)"),
        (["drift.request_log=log", "drift.until=soon"], "ConfigError: drift.until='soon': expected a time as 2026-11-25"),
        (
            ["drift.request_log=log", "drift.since=2026-01-02", "drift.until=2026-01-01"],
            "drift.since=2026-01-02 is not before drift.until=2026-01-01",
        ),
        (["drift.request_log=log", "drift.lst=5"], "ConfigError: drift.lst is not a key (did you mean last?); drift has: "),
        (["drift.request_log=log", "drift.alpha=7"], "drift.alpha"),
    ],
)
def test_what_cannot_be_done_is_said(run, referenced, logged_rows, keys, said):
    fill(Path("log"), logged_rows.fresh)
    fill(Path("bad"), logged_rows.fresh)
    next(Path("bad").glob("date=*/*.parquet")).write_bytes(b"")
    Path("empty").mkdir()
    refused(run("drift", referenced, *keys), said)


def test_a_bundle_without_a_reference(run, referenced, logged_rows):
    fill(Path("log"), logged_rows.fresh)
    shutil.copytree(referenced, "bundle")
    Path("bundle", layout.DRIFT).unlink()
    refresh_info(Path("bundle"))
    said = "BundleError: bundle: holds no reference for drift; `sodaops export` adds it to a bundle."
    refused(run("drift", "bundle", "drift.request_log=log"), said)
    refused(run("drift", "nowhere", "drift.request_log=log"), "BundleError: nowhere: no bundle.json here")
    refused(run("drift", "models@champion", "drift.request_log=log"), "RegistryError: ")


def test_a_reference_that_was_changed(run, referenced, logged_rows):
    fill(Path("log"), logged_rows.fresh)
    shutil.copytree(referenced, "bundle")
    Path("bundle", layout.DRIFT).write_bytes(b"changed")
    refused(
        run("drift", "bundle", "drift.request_log=log"), f"BundleError: bundle: damaged bundle: {layout.DRIFT} has been changed"
    )


def test_a_folder_that_holds_something_else_stays(run, referenced, logged_rows):
    fill(Path("log"), logged_rows.fresh)
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("mine")
    Path("mine/drift.json").write_text("old")
    code, out, err = run("drift", referenced, "drift.request_log=log", "drift.output_dir=mine")
    assert code == 2 and out == ""
    assert "mine: " in err and "(notes.txt)" in err
    assert {path.name: path.read_text() for path in Path("mine").iterdir()} == {"notes.txt": "mine", "drift.json": "old"}
    assert {path.name for path in Path().iterdir()} == {"log", "mine", ".mine.lock"}


def test_the_champion_of_a_registry(run, referenced, logged_rows):
    fill(Path("log"), logged_rows.others)
    registry = Registry("models")
    registry.move("champion", registry.register(str(referenced), "first", {}), None, "")
    code, out, _ = run("drift", "models@champion", "drift.request_log=log", "--fail-on-drift")
    assert code == 4 and f"DRIFT, 200 requests of bundle {logged_rows.bundle_id}" in out


@pytest.mark.slow
def test_a_bundle_and_a_log_in_a_bucket(run, bucket, referenced, logged_rows):
    fill(Path("log"), logged_rows.others, logged_rows.fresh)
    files = fsspec.core.url_to_fs(bucket, use_listings_cache=False)[0]
    files.put("log", f"{bucket}/log", recursive=True)
    files.put(str(referenced), f"{bucket}/bundle", recursive=True)
    asked = ("drift", f"{bucket}/bundle", f"drift.request_log={bucket}/log", "drift.last=400")
    code, out, err = run(*asked, "--fail-on-drift")
    assert code == 4, err
    assert f"DRIFT, 400 requests of bundle {logged_rows.bundle_id}" in out
    (part,) = files.glob(f"{bucket}/log/date=*/part0.parquet")
    files.pipe(part, files.cat(part)[:-9])
    code, out, _ = run(*asked)
    assert code == 0 and "no drift, 200 requests" in out and f"note: 1 part left out: gs://{part} (" in out
    shutil.rmtree("outputs")
    nothing = run("drift", f"{bucket}/nothing", f"drift.request_log={bucket}/log")
    refused(nothing, f"BundleError: {bucket}/nothing: ")
    refused(run("drift", f"{bucket}/bundle", f"drift.request_log={bucket}/nolog"), f"{bucket}/nolog: no such request log")


@pytest.mark.slow
def test_rows_in_a_bucket_are_deleted(run, bucket, logged_rows):
    old = logged_rows.fresh.slice(100, 20)
    old = old.set_column(0, "time", pa.array([OLD + timedelta(seconds=s) for s in range(20)], pa.timestamp("us", "UTC")))
    fill(Path("log"), logged_rows.fresh.slice(0, 100), old)
    files = fsspec.core.url_to_fs(bucket, use_listings_cache=False)[0]
    log = f"{bucket}/forgetful"
    files.put("log", log, recursive=True)
    code, out, _ = run("log", "forget", "--request-id", "r7", f"drift.request_log={log}")
    assert code == 0 and "part0.parquet: 1 rows deleted\n1 rows of 1 requests deleted\nnote: no journal was looked at" in out, (
        out
    )
    code, out, _ = run("log", "prune", "--days", 30, f"drift.request_log={log}")
    assert code == 0 and out == f"{log}/date={OLD.date()}/part1.parquet: deleted\n"
    (left,) = files.find(log)
    with files.open(left) as file:
        assert pq.ParquetFile(file).read()["request_id"].to_pylist() == [f"r{n}" for n in range(100) if n != 7]


def test_a_request_is_forgotten(run, logged_rows):
    fill(Path("log"), logged_rows.fresh.slice(0, 50), logged_rows.fresh.slice(50, 1))
    digest = logged_rows.fresh["text_sha256"][10].as_py()
    asked = ("--request-id", "r3", "--request-id", "r50", "--text-hash", digest)
    code, out, err = run("log", "forget", *asked, "drift.request_log=log")
    day = RECENTLY.date()
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"log/date={day}/part0.parquet: 2 rows deleted", f"log/date={day}/part1.parquet: 1 rows deleted",
        "3 rows of 3 requests deleted",
    ]  # fmt: skip
    assert ids("log") == sorted(f"r{n}" for n in range(50) if n not in (3, 10))
    assert not Path(f"log/date={day}/part1.parquet").exists(), "nothing was left of it"
    code, out, _ = run("log", "forget", *asked, "serve.request_log=log")
    assert (code, out) == (0, "0 rows of 0 requests deleted\n")


def test_what_is_still_in_the_journal_is_forgotten_too(run, logged_rows):
    fill(Path("log"), logged_rows.fresh.slice(0, 3))
    rows = [{"request_id": name, "text_sha256": name} for name in ("mine", "kept")]
    for folder in ("log/journal", "elsewhere"):
        Path(folder).mkdir()
        Path(folder, "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = run("log", "forget", "--request-id=mine", "serve.request_log=log", "serve.journal_dir=elsewhere")
    assert (code, out) == (0, "elsewhere/a.jsonl: 1 rows deleted\n1 rows of 1 requests deleted\n")
    code, out, _ = run("log", "forget", "--request-id=mine", "serve.request_log=log")
    assert (code, out) == (0, "log/journal/a.jsonl: 1 rows deleted\n1 rows of 1 requests deleted\n")
    for folder in ("log/journal", "elsewhere"):
        assert [json.loads(line)["request_id"] for line in Path(folder, "a.jsonl").read_text().splitlines()] == ["kept"]


def test_what_cannot_be_looked_at_is_not_forgotten(run, logged_rows):
    fill(Path("log"), logged_rows.fresh.slice(0, 3))
    bad = write_log_part(Path("log"), logged_rows.fresh.slice(3, 3), "bad")
    bad.write_bytes(bad.read_bytes()[:-9])
    code, out, err = run("log", "forget", "--request-id=r1", "drift.request_log=log")
    assert "1 rows of 1 requests deleted" in out and f"{bad}: not readable (" in out
    assert code == 2 and err == "StorageError: there may be more of it in what could not be looked at; see above.\n"
    bad.unlink()
    assert ids("log") == ["r0", "r2"]


def test_old_days_go(run, logged_rows):
    old = refused_rows(5, "b", OLD)
    fill(Path("log"), logged_rows.fresh.slice(0, 3), old)
    code, out, _ = run("log", "prune", "--days", 41, "drift.request_log=log")
    assert (code, out) == (0, "nothing is older than 41 days\n") and len(ids("log")) == 8
    code, out, _ = run("log", "prune", "serve.keep_days=30", "drift.request_log=log")
    assert (code, out) == (0, f"log/date={OLD.date()}/part1.parquet: deleted\n")
    assert ids("log") == ["r0", "r1", "r2"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["forget", "drift.request_log=log"], "ConfigError: give what to forget: --request-id ID, or --text-hash SHA256"),
        (["forget", "--request-id=a"], "ConfigError: drift.request_log is missing"),
        (["forget", "--request-id=a", "drift.request_log=none"], "StorageError: none: no such request log"),
        (["prune", "drift.request_log=log"], "ConfigError: give how many days are kept: --days N, or serve.keep_days=N."),
        (["prune", "--days=0", "drift.request_log=log"], "ConfigError: --days 0: expected a number of days, 1 to 36500."),
        (["prune", "--days=3", "drift.request_log=none"], "StorageError: none: no such request log"),
    ],
)
def test_deleting_that_cannot_be_done(run, logged_rows, argv, said):
    fill(Path("log"), logged_rows.fresh.slice(0, 3))
    refused(run("log", *argv), said)
    assert ids("log") == ["r0", "r1", "r2"]
