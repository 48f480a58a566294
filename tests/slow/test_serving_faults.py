"""The service as a process of its own, under load, while things go wrong around it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter
from pathlib import Path

import httpx
import pyarrow.parquet as pq
import pytest

from sodaops.bundle import layout
from tests.gcs import emulated
from tests.serving import Load, Server, copy_bundle, swap_bundle

# The load's clients are cut off in the middle of things, and leave sockets to the collector.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def bundle(trained, tmp_path):
    return Path(shutil.copytree(trained / "run/bundle", tmp_path / "bundle"))


def logged(folder):
    """How often each request id is in the parts."""
    tables = [pq.read_table(path, partitioning=None) for path in Path(folder).glob("date=*/*.parquet")]
    return Counter(request_id for table in tables for request_id in table["request_id"].to_pylist())


def connect(server):
    return socket.create_connection(httpx.URL(server.url).netloc.decode().split(":"))


def rss_mb(server):
    with open(f"/proc/{server.process.pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


def metric(client, name):
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(name)]
    return sum(float(line.split(" ")[1]) for line in lines)


def test_kill_9_under_load_loses_no_answered_request(bundle, tmp_path):
    log = tmp_path / "log"
    server = Server(bundle, request_log=log, part_s=0.7)
    load = Load(server.url)
    time.sleep(3)
    server.signal(signal.SIGKILL)
    load.stop()
    assert len(load.acknowledged()) > 100 and set(load.statuses.values()) == {200}
    with Server(bundle, request_log=log) as again:
        until = time.monotonic() + 20
        while not (load.acknowledged() <= logged(log).keys()):
            assert time.monotonic() < until, load.acknowledged() - logged(log).keys()
            time.sleep(0.2)
        assert again.client().get("/readyz").json()["ready"]
    assert set(logged(log).values()) == {1}


def test_sigterm_under_load_answers_what_was_asked(bundle, tmp_path):
    log = tmp_path / "log"
    server = Server(bundle, request_log=log)
    slow = connect(server)
    load = Load(server.url, n_texts=4)
    time.sleep(2)
    body = json.dumps({"texts": ["in flight " * 30] * 128}).encode()
    slow.sendall(b"POST /predict/batch HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nx-request-id: flying\r\n")
    slow.sendall(b"content-length: %d\r\n\r\n%s" % (len(body), body))
    time.sleep(0.02)
    assert server.signal(signal.SIGTERM) == -signal.SIGTERM  # uvicorn ends by the signal, when all is done
    load.stop()
    answer = b""
    with slow:
        while received := slow.recv(65536):
            answer += received
    assert answer.startswith(b"HTTP/1.1 200") and answer.count(b'"label"') == 128
    assert set(load.statuses.values()) == {200}
    found = logged(log)
    assert found.keys() >= load.acknowledged() | {"flying"} and found["flying"] == 128
    assert list((log / "journal").iterdir()) == []


def test_reload_under_load_fails_no_request(bundle, tmp_path):
    versions = [layout.read_info(bundle).bundle_id]
    with Server(bundle, reload_s=0.1) as server:
        load = Load(server.url)
        for n in range(4):
            fresh = copy_bundle(bundle, tmp_path / f"fresh{n}", f"number {n}")
            versions.append(layout.read_info(fresh).bundle_id)
            swap_bundle(bundle, fresh)
            until = time.monotonic() + 10
            while versions[-1] not in load.versions:
                assert time.monotonic() < until
                time.sleep(0.05)
        (bundle / "tokenizer.json").write_text("{}")
        info = json.loads((bundle / "bundle.json").read_text())
        (bundle / "bundle.json").write_text(json.dumps({**info, "bundle_id": "0" * 12}))
        time.sleep(0.5)
        load.stop()
        assert load.broken == 0 and set(load.statuses.values()) == {200} and load.versions == set(versions)
        with server.client() as client:
            assert client.get("/readyz").json()["bundle_version"] == versions[-1]
    refusals = [record for record in server.records() if "refused" in record["message"]]
    assert len(refusals) == 1 and "has been changed" in refusals[0]["reason"]


def test_storage_gone_for_a_while(bundle, tmp_path):
    log, journal = tmp_path / "log", tmp_path / "journal"
    log.write_text("in the way")
    with Server(bundle, request_log=log, journal_dir=journal, part_s=0.5) as server, server.client() as client:
        load = Load(server.url, n_clients=2)
        until = time.monotonic() + 20
        while metric(client, 'sodaops_request_log_parts_total{outcome="failed"}') < 2:
            assert time.monotonic() < until
            time.sleep(0.2)
        assert metric(client, "sodaops_request_log_journal_bytes") > 0
        log.unlink()
        load.stop()
        while not (load.acknowledged() <= logged(log).keys()):
            assert time.monotonic() < until + 20
            time.sleep(0.2)
        assert metric(client, "sodaops_request_log_lost_total") == 0
        assert load.broken == 0 and set(load.statuses.values()) == {200}


def test_a_full_disk_answers_all_the_same_and_counts(bundle, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small disk")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "none", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting is not allowed here: {mounted.stderr.decode().strip()}")
    try:
        with Server(bundle, request_log=disk / "log") as server, server.client() as client:
            load = Load(server.url, n_clients=4, n_texts=8)
            until = time.monotonic() + 20
            while metric(client, "sodaops_request_log_lost_total") < 50:
                assert time.monotonic() < until
                time.sleep(0.1)
            load.stop()
            assert load.broken == 0 and set(load.statuses.values()) == {200}
            kept, lost = (metric(client, f"sodaops_request_log_{name}_total") for name in ("rows", "lost"))
            assert kept + lost == 8 * len(load.statuses)
        lines = [json.loads(line) for path in (disk / "log/journal").iterdir() for line in path.read_text().splitlines()]
        assert len(lines) == kept
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_clients_that_go_away_leave_nothing_behind(bundle):
    with Server(bundle, n_workers=1, max_batch_tokens=32) as server, server.client() as client:
        body = json.dumps({"texts": ["a text that is long enough to be slow " * 4] * 100}).encode()
        head = b"POST /predict/batch HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        for cut in (len(body) // 2, len(body)):  # in the middle of the request, and after it
            for _ in range(20):
                gone = connect(server)
                gone.sendall(head % len(body) + body[:cut])
                time.sleep(0.005)
                gone.close()
        until = time.monotonic() + 10
        while metric(client, "sodaops_queue_texts") or metric(client, "sodaops_requests_in_flight") > 1:
            assert time.monotonic() < until
            time.sleep(0.05)
        assert client.get("/predict", params={"text": "x"}).status_code == 200
        assert metric(client, "sodaops_predictions_total") < 2000, "texts of clients that had gone were computed"
    assert not [record for record in server.records() if record["level"] == "error"]


def test_a_body_that_does_not_arrive(bundle):
    with Server(bundle, deadline_s=0.5) as server, connect(server) as slow:
        slow.sendall(b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 50\r\n\r\n{")
        assert slow.recv(65536).startswith(b"HTTP/1.1 408")


def test_overload_gives_429_and_does_not_grow(bundle):
    """More than it can do, for 12 seconds; `make load PROFILE=overload` does so for ten minutes."""
    with Server(bundle, max_queue=64) as server, server.client() as client:
        load = Load(server.url, n_clients=16, n_texts=32)
        time.sleep(4)
        early = rss_mb(server)
        time.sleep(8)
        late = rss_mb(server)
        load.stop()
        counts = Counter(load.statuses.values())
        assert set(counts) == {200, 429} and load.broken == 0 and counts[429] > 100 and counts[200] > 50
        assert late < 1.1 * early + 10
        assert client.get("/predict", params={"text": "x"}).status_code == 200


@pytest.fixture
def bucket(tmp_path):
    """A bucket of a Google Cloud Storage emulator on loopback."""
    start = ["gcp-storage-emulator", "-d", str(tmp_path / "gcs"), "start", "--host", "127.0.0.1", "--default-bucket", "bucket"]
    with emulated(lambda port: [*start, "--port", str(port)]):
        yield "gs://bucket"


def test_google_cloud_storage(bundle, tmp_path, bucket):
    import gcsfs

    files = gcsfs.GCSFileSystem(token="anon", endpoint_url=os.environ["STORAGE_EMULATOR_HOST"])

    def put(folder):
        for path in sorted(folder.iterdir(), reverse=True):  # bundle.json last would be kinder; a reload must cope
            files.put_file(str(path), f"bucket/models/{path.name}")

    put(bundle)
    settings = {"request_log": f"{bucket}/log", "journal_dir": tmp_path / "journal", "part_s": 0.5, "reload_s": 0.2}
    with Server(f"{bucket}/models", **settings) as server, server.client() as client:
        first = client.get("/predict", params={"text": "x"}, headers={"x-request-id": "first"}).json()["bundle_version"]
        put(copy_bundle(bundle, tmp_path / "second"))
        until = time.monotonic() + 30
        while client.get("/readyz").json()["bundle_version"] == first:
            assert time.monotonic() < until
            time.sleep(0.1)
    found = files.glob("bucket/log/date=*/*.parquet")
    rows = [row for path in found for row in pq.read_table(files.open(path)).to_pylist()]
    assert [row["request_id"] for row in rows] == ["first"] and rows[0]["bundle_id"] == first


def test_storage_that_cannot_be_reached(tmp_path, monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    server = Server("gs://bucket/models", wait=False)
    assert server.signal(0) == 2
    assert "StorageError: gs://bucket/models/bundle.json: could not be read" in "".join(server.lines)
