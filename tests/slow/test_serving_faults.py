"""The predictor as a process of its own, under load, while things around it go wrong."""

import json
import os
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
from tests.conftest import wait_until
from tests.serving import Load, Server, copy_bundle, swap_bundle

# The load's clients are cut off in the middle of things, and leave sockets to the collector.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"),
]


def logged_ids(folder):
    """Request id -> number of its rows in the parts."""
    tables = [pq.read_table(path, partitioning=None) for path in Path(folder).glob("date=*/*.parquet")]
    return Counter(request_id for table in tables for request_id in table["request_id"].to_pylist())


def connect(server):
    return socket.create_connection(httpx.URL(server.url).netloc.decode().split(":"), timeout=120)


def metric(client, name):
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(name)]
    return sum(float(line.split(" ")[1]) for line in lines)


def test_kill_9_under_load_loses_no_answered_request(bundle, tmp_path):
    log = tmp_path / "log"
    server = Server(bundle, request_log=log, part_s=0.7, deadline_s=60)
    load = Load(server.url)
    wait_until(lambda: len(load.acknowledged()) > 100 and logged_ids(log))
    server.signal(signal.SIGKILL)
    load.stop()
    assert set(load.statuses.values()) == {200}
    with Server(bundle, request_log=log) as server, server.client() as client:
        wait_until(lambda: load.acknowledged() <= logged_ids(log).keys())
        assert client.get("/readyz").json()["ready"]
    assert set(logged_ids(log).values()) == {1}


def test_sigterm_under_load_answers_what_was_received(bundle, tmp_path):
    log = tmp_path / "log"
    server = Server(bundle, request_log=log, deadline_s=60)
    load = Load(server.url, n_texts=4)
    body = json.dumps({"texts": ["in flight " * 30] * 128}).encode()
    head = b"POST /predict/batch HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nx-request-id: in-flight\r\n"
    with connect(server) as client:
        client.sendall(head + b"expect: 100-continue\r\ncontent-length: %d\r\n\r\n" % len(body))
        assert client.recv(65536).startswith(b"HTTP/1.1 100")  # the application waits for the body
        wait_until(lambda: len(load.acknowledged()) > 20)
        server.process.send_signal(signal.SIGTERM)
        client.sendall(body)
        response = b"".join(iter(lambda: client.recv(65536), b""))
    assert server.signal(0) == -signal.SIGTERM  # uvicorn ends by the signal, when all is done
    load.stop()
    assert response.startswith(b"HTTP/1.1 200") and response.count(b'"label"') == 128
    assert set(load.statuses.values()) == {200}
    ids = logged_ids(log)
    assert ids.keys() >= load.acknowledged() | {"in-flight"} and ids["in-flight"] == 128
    assert list((log / "journal").iterdir()) == []


def test_reload_under_load_fails_no_request(bundle, tmp_path):
    versions = [layout.read_info(bundle).bundle_id]
    with Server(bundle, reload_s=0.1, deadline_s=60) as server, server.client() as client:
        load = Load(server.url)
        for n in range(3):
            fresh = copy_bundle(bundle, tmp_path / f"fresh{n}", f"number {n}")
            versions.append(layout.read_info(fresh).bundle_id)
            swap_bundle(bundle, fresh)
            wait_until(lambda: versions[-1] in load.versions)
        damaged = copy_bundle(bundle, tmp_path / "damaged", "damaged")
        (damaged / "tokenizer.json").write_text("{}")
        tried = metric(client, 'sodaops_bundle_loads_total{outcome="refused"}')
        swap_bundle(bundle, damaged)  # a look in the middle of it finds no bundle, which is logged too
        wait_until(lambda: metric(client, 'sodaops_bundle_loads_total{outcome="refused"}') >= tried + 4)
        load.stop()
        assert load.broken == 0 and set(load.statuses.values()) == {200} and load.versions == set(versions)
        assert client.get("/readyz").json()["bundle_version"] == versions[-1]
    reasons = [record["reason"] for record in server.records() if "reason" in record]
    assert sum("tokenizer.json" in reason for reason in reasons) == 1, "logged at each try"


def test_storage_is_missing_for_a_while(bundle, tmp_path):
    log, journal = tmp_path / "log", tmp_path / "journal"
    log.write_text("in the way")
    settings = {"request_log": log, "journal_dir": journal, "part_s": 0.5, "deadline_s": 60}
    with Server(bundle, **settings) as server, server.client() as client:
        load = Load(server.url, n_clients=2)
        wait_until(lambda: metric(client, 'sodaops_request_log_parts_total{outcome="failed"}') >= 1)
        assert metric(client, "sodaops_request_log_journal_bytes") > 0
        log.unlink()
        load.stop()
        wait_until(lambda: load.acknowledged() <= logged_ids(log).keys())
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
        with Server(bundle, request_log=disk / "log", deadline_s=60) as server, server.client() as client:
            load = Load(server.url, n_clients=4, n_texts=8)
            wait_until(lambda: metric(client, "sodaops_request_log_lost_total") >= 50)
            load.stop()
            assert load.broken == 0 and set(load.statuses.values()) == {200}
            kept, lost = (metric(client, f"sodaops_request_log_{name}_total") for name in ("rows", "lost"))
            assert kept + lost == 8 * len(load.statuses)
        lines = [json.loads(line) for path in (disk / "log/journal").iterdir() for line in path.read_text().splitlines()]
        assert len(lines) == kept
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_clients_that_disconnect_leave_nothing_behind(bundle):
    with Server(bundle, n_workers=1, max_batch_tokens=32, deadline_s=60) as server, server.client() as client:
        body = json.dumps({"texts": ["a text that is long enough to be slow " * 4] * 100}).encode()
        head = b"POST /predict/batch HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        for cut in (len(body) // 2, len(body)):  # in the middle of the request, and after it
            for _ in range(20):
                with connect(server) as connection:
                    connection.sendall(head % len(body) + body[:cut])
        wait_until(lambda: not metric(client, "sodaops_queue_texts") and metric(client, "sodaops_requests_in_flight") == 1)
        assert client.get("/predict", params={"text": "x"}).status_code == 200
    assert not [record for record in server.records() if record["level"] == "error"]


def overload(bundle, seconds):
    """Sends more than the predictor can do; gives its memory in MB, some time after the start and at the end."""

    def rss_mb():
        with open(f"/proc/{server.process.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6

    with Server(bundle, max_queue=64, deadline_s=60) as server, server.client() as client:
        load = Load(server.url, n_clients=16, n_texts=32)
        wait_until(lambda: all(list(load.statuses.values()).count(status) > 50 for status in (200, 429)))
        early = rss_mb()
        time.sleep(seconds)
        late = rss_mb()
        load.stop()
        assert set(load.statuses.values()) == {200, 429} and load.broken == 0
        assert client.get("/predict", params={"text": "x"}).status_code == 200
    return early, late


def test_overload_gives_429(bundle):
    overload(bundle, 0)


@pytest.mark.deep
def test_overload_does_not_grow(bundle):
    """For half a minute; `make load PROFILE=overload` does so for ten minutes."""
    early, late = overload(bundle, 30)
    assert late < 1.1 * early + 10


def test_google_cloud_storage(bundle, tmp_path, bucket, cloud):
    def put(folder):
        for path in sorted(folder.iterdir(), reverse=True):  # bundle.json not last, though it should be: a reload must cope
            cloud.put_file(str(path), f"bucket/models/{path.name}")

    put(bundle)
    settings = {"request_log": f"{bucket}/log", "journal_dir": tmp_path / "journal", "part_s": 0.5, "reload_s": 0.2}
    with Server(f"{bucket}/models", **settings) as server, server.client() as client:
        first = client.get("/predict", params={"text": "x"}, headers={"x-request-id": "first"}).json()["bundle_version"]
        put(copy_bundle(bundle, tmp_path / "second"))
        wait_until(lambda: client.get("/readyz").json()["bundle_version"] != first)
    paths = cloud.glob("bucket/log/date=*/*.parquet")
    rows = [row for path in paths for row in pq.read_table(cloud.open(path)).to_pylist()]
    assert [row["request_id"] for row in rows] == ["first"] and rows[0]["bundle_id"] == first
