"""The commands `sodaops drift` and `sodaops log`."""

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sodaops.bundle import layout
from sodaops.registry.registry import Registry
from tests.requests import refused_rows, write_log_part
from tests.serving import refresh_info
from tests.watching import RECENTLY, fill, replaced

OLD = datetime.now(UTC) - timedelta(days=40)


def ids(log):
    return sorted(
        i for path in Path(log).glob("date=*/*.parquet") for i in pq.ParquetFile(path).read()["request_id"].to_pylist()
    )


def refused(outcome, *parts):
    """Asserts exit code 2, and an error that names these parts: its class, and the key or file."""
    code, out, err = outcome
    assert code == 2 and out == "", (code, out, err)
    assert all(part in err for part in parts), err
    assert not Path("outputs").exists()


def test_no_drift(run, drift_bundle, logged_rows):
    fill(Path("log"), logged_rows.fresh)
    code, out, err = run("drift", drift_bundle, "drift.request_log=log", "--fail-on-drift")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    result = json.loads(Path("outputs/drift/drift.json").read_text())
    assert len(lines) == 1 + 8 + 3 and lines[9].startswith("estimated quality: accuracy 0.")
    for line, feature in zip(lines[1:9], result["features"], strict=True):
        verdict, drifted, p = line[34:].split()[:3]
        assert (verdict, drifted) == ("no", "drift") and float(p) == pytest.approx(feature["p"], rel=0.01)
    assert lines[10].startswith(f"no drift, 200 requests of bundle {logged_rows.bundle_id}")
    assert lines[11] == "report: outputs/drift/drift.html"
    assert {path.name for path in Path("outputs/drift").iterdir()} == {"drift.html", "drift.json", "evidently.html"}


def test_drift_with_the_champion_of_a_registry(run, drift_bundle, logged_rows):
    fill(Path("log"), logged_rows.others)
    registry = Registry("models")
    registry.move("champion", registry.register(str(drift_bundle), "first", {}), None, "")
    arguments = ("drift", "models@champion", "serve.request_log=log", "drift.output_dir=found")
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    assert f"DRIFT, 200 requests of bundle {logged_rows.bundle_id}" in out and out.endswith("report: found/drift.html\n")
    code, again, err = run(*arguments, "--fail-on-drift")
    assert code == 4 and again == out
    assert err.startswith("AlarmError: ") and logged_rows.bundle_id in err and "texts" in err


def test_notes_beside_the_verdict(run, drift_bundle, logged_rows):
    future = refused_rows(7, logged_rows.bundle_id, datetime.now(UTC) + timedelta(days=1))
    fill(Path("log"), logged_rows.fresh.slice(0, 30), replaced(logged_rows.others, "bundle_id", "b2"), future)
    damaged = write_log_part(Path("log"), logged_rows.fresh, "damaged")
    damaged.write_bytes(b"no Parquet")
    code, out, _ = run("drift", drift_bundle, "drift.request_log=log", "--fail-on-drift")
    notes = [line for line in out.splitlines() if line.startswith("note: ")]
    assert code == 0 and len(notes) == 3
    assert "200" in notes[0] and "b2" in notes[0] and str(damaged) in notes[1] and "7" in notes[2]
    assert f"no verdict, 30 requests of bundle {logged_rows.bundle_id}" in out
    assert not Path("outputs/drift/evidently.html").exists()


def test_a_span_of_time(run, drift_bundle, logged_rows):
    fill(Path("log"), logged_rows.fresh, replaced(logged_rows.others, "bundle_id", "b2"))
    since, until = ((RECENTLY + timedelta(seconds=s)).isoformat() for s in (50, 70))
    code, out, _ = run("drift", drift_bundle, "drift.request_log=log", f"drift.since='{since}'", f"drift.until='{until}'")
    assert code == 0 and "no verdict, 20 requests of bundle" in out and "note: 20 requests of bundle b2" in out


@pytest.mark.parametrize(("keys", "parts"), [
    ([], ["ConfigError", "drift.request_log"]),
    (["drift.request_log=none"], ["StorageError: none:"]),
    (["drift.request_log=empty"], ["DataError: empty:"]),
    (["drift.request_log=bad"], ["DataError: bad:", "bad/date="]),
    (["drift.request_log=log", "drift.since=2030-01-01"], ["DataError: log:", "drift.since=2030-01-01"]),
    (["drift.request_log=log", "drift.until=soon"], ["ConfigError: drift.until='soon'"]),
    (
        ["drift.request_log=log", "drift.since=2026-01-02", "drift.until=2026-01-01"],
        ["ConfigError", "drift.since=2026-01-02", "drift.until=2026-01-01"],
    ),
    (["drift.request_log=log", "drift.lst=5"], ["ConfigError: drift.lst", "did you mean last?"]),
    (["drift.request_log=log", "drift.alpha=7"], ["ConfigError", "drift.alpha"]),
])  # fmt: skip
def test_refused_arguments(run, drift_bundle, logged_rows, keys, parts):
    fill(Path("log"), logged_rows.fresh.slice(0, 1))
    fill(Path("bad"), logged_rows.fresh.slice(0, 1))
    next(Path("bad").glob("date=*/*.parquet")).write_bytes(b"")
    Path("empty").mkdir()
    refused(run("drift", drift_bundle, *keys), *parts)


def test_refused_bundles(run, drift_bundle, logged_rows):
    fill(Path("log"), logged_rows.fresh.slice(0, 1))
    shutil.copytree(drift_bundle, "bundle")
    Path("bundle", layout.DRIFT).write_bytes(b"changed")
    refused(run("drift", "bundle", "drift.request_log=log"), "BundleError: bundle:", layout.DRIFT)
    Path("bundle", layout.DRIFT).unlink()
    refresh_info(Path("bundle"))
    refused(run("drift", "bundle", "drift.request_log=log"), "BundleError: bundle:", layout.DRIFT, "sodaops export")
    refused(run("drift", "nowhere", "drift.request_log=log"), "BundleError: nowhere:")
    refused(run("drift", "models@champion", "drift.request_log=log"), "RegistryError: ")


def test_a_folder_with_other_files_stays(run, drift_bundle, logged_rows):
    fill(Path("log"), logged_rows.fresh.slice(0, 30))
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("mine")
    Path("mine/drift.json").write_text("old")
    code, out, err = run("drift", drift_bundle, "drift.request_log=log", "drift.output_dir=mine")
    assert code == 2 and out == "" and "mine: " in err and "notes.txt" in err
    assert {path.name: path.read_text() for path in Path("mine").iterdir()} == {"notes.txt": "mine", "drift.json": "old"}
    assert {path.name for path in Path().iterdir()} == {"log", "mine", ".mine.lock"}


def test_a_bundle_and_a_log_in_a_bucket(run, bucket, cloud, drift_bundle, logged_rows):
    fill(Path("log"), logged_rows.others, logged_rows.fresh)
    cloud.put("log", f"{bucket}/log", recursive=True)
    cloud.put(str(drift_bundle), f"{bucket}/bundle", recursive=True)
    asked = ("drift", f"{bucket}/bundle", f"drift.request_log={bucket}/log", "drift.last=400")
    code, out, err = run(*asked, "--fail-on-drift")
    assert code == 4, err
    assert f"DRIFT, 400 requests of bundle {logged_rows.bundle_id}" in out
    (part,) = cloud.glob(f"{bucket}/log/date=*/part0.parquet")
    cloud.pipe(part, cloud.cat(part)[:-9])
    code, out, _ = run(*asked)
    assert code == 0 and "no drift, 200 requests" in out and f"gs://{part}" in out
    shutil.rmtree("outputs")
    nothing = run("drift", f"{bucket}/nothing", f"drift.request_log={bucket}/log")
    refused(nothing, f"BundleError: {bucket}/nothing:")
    refused(run("drift", f"{bucket}/bundle", f"drift.request_log={bucket}/nolog"), f"StorageError: {bucket}/nolog:")


def test_rows_in_a_bucket_are_deleted(run, bucket, cloud, logged_rows):
    old = logged_rows.fresh.slice(100, 20)
    old = old.set_column(0, "time", pa.array([OLD + timedelta(seconds=s) for s in range(20)], pa.timestamp("us", "UTC")))
    fill(Path("log"), logged_rows.fresh.slice(0, 100), old)
    log = f"{bucket}/forgetful"
    cloud.put("log", log, recursive=True)
    code, out, _ = run("log", "forget", "--request-id", "r7", f"drift.request_log={log}")
    assert code == 0 and "part0.parquet: 1 rows deleted\n1 rows of 1 requests deleted\nnote: " in out
    code, out, _ = run("log", "prune", "--days", 30, f"drift.request_log={log}")
    assert code == 0 and out == f"{log}/date={OLD.date()}/part1.parquet: deleted\n"
    (left,) = cloud.find(log)
    with cloud.open(left) as file:
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
    assert not Path(f"log/date={day}/part1.parquet").exists(), "a part without rows is deleted"
    code, out, _ = run("log", "forget", *asked, "serve.request_log=log")
    assert (code, out) == (0, "0 rows of 0 requests deleted\n")


def test_rows_of_the_journal_are_forgotten(run, logged_rows):
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


def test_a_damaged_part_is_not_forgotten(run, logged_rows):
    fill(Path("log"), logged_rows.fresh.slice(0, 3))
    bad = write_log_part(Path("log"), logged_rows.fresh.slice(3, 3), "bad")
    bad.write_bytes(bad.read_bytes()[:-9])
    code, out, err = run("log", "forget", "--request-id=r1", "drift.request_log=log")
    assert "1 rows of 1 requests deleted" in out and f"{bad}: " in out
    assert code == 2 and err.startswith("StorageError: ")
    bad.unlink()
    assert ids("log") == ["r0", "r2"]


def test_old_parts_are_pruned(run, logged_rows):
    old = refused_rows(5, "b", OLD)
    fill(Path("log"), logged_rows.fresh.slice(0, 3), old)
    code, out, _ = run("log", "prune", "--days", 41, "drift.request_log=log")
    assert code == 0 and "deleted" not in out and len(ids("log")) == 8
    code, out, _ = run("log", "prune", "serve.keep_days=30", "drift.request_log=log")
    assert (code, out) == (0, f"log/date={OLD.date()}/part1.parquet: deleted\n")
    assert ids("log") == ["r0", "r1", "r2"]


@pytest.mark.parametrize(("argv", "parts"), [
    (["forget", "drift.request_log=log"], ["ConfigError", "--request-id", "--text-hash"]),
    (["forget", "--request-id=a"], ["ConfigError", "drift.request_log"]),
    (["forget", "--request-id=a", "drift.request_log=none"], ["StorageError: none:"]),
    (["prune", "drift.request_log=log"], ["ConfigError", "--days", "serve.keep_days"]),
    (["prune", "--days=0", "drift.request_log=log"], ["ConfigError: --days 0"]),
    (["prune", "--days=3", "drift.request_log=none"], ["StorageError: none:"]),
])  # fmt: skip
def test_refused_deletions(run, logged_rows, argv, parts):
    fill(Path("log"), logged_rows.fresh.slice(0, 3))
    refused(run("log", *argv), *parts)
    assert ids("log") == ["r0", "r1", "r2"]
