"""The drift service in a process of its own, over request logs as the predictor writes them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from sodaops.drift.check import EVIDENTLY, NUMBERS, PAGE
from sodaops.drift.settings import WatchSettings
from sodaops.errors import ConfigError
from sodaops.request_log.parts import part_addresses
from tests.conftest import REPO, free_port
from tests.integration.test_alert_sinks import Receiver
from tests.requests import refused_rows, write_log_part
from tests.serving import DRIFT, Server, copy_bundle
from tests.unit.test_alerts import RULES, built
from tests.watching import RECENTLY, fill, metrics, replaced, reviews

DETECTED = "sodaops_drift_detected{{bundle_id={}}}"


@pytest.fixture(scope="module")
def watched(referenced, logged_rows, tmp_path_factory):
    """A drift service that looks once, and then when it is asked to; and what it looks at."""
    folder = tmp_path_factory.mktemp("watched")
    bundle = shutil.copytree(referenced, folder / "bundle")
    fill(folder / "log")
    settings = {"request_log": folder / "log", "output_dir": folder / "out", "every_s": 9999}
    with Server(bundle, prefix=DRIFT, **settings) as server, server.client() as client:
        while client.get("/healthz").json()["last_look"] == "it has not looked yet":
            time.sleep(0.02)
        yield SimpleNamespace(
            server=server, client=client, bundle=bundle, log=folder / "log", out=folder / "out",
            detected=DETECTED.format(logged_rows.bundle_id),
        )  # fmt: skip


def look(watched, *tables):
    """What a look at these rows says."""
    fill(watched.log, *tables)
    answer = watched.client.post("/look")
    assert answer.status_code == 200, answer.text
    return answer.json()


def detail(answer, status):
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    return answer.json()["detail"]


def labelled(found, prefix):
    return {name.removeprefix(prefix)[:-1]: value for name, value in found.items() if name.startswith(prefix)}


def runs(client):
    return labelled(metrics(client), "sodaops_drift_runs_total{outcome=")


def test_a_deployment_of_it_passes_its_smoke_test(watched, monkeypatch):
    monkeypatch.syspath_prepend(str(REPO / "cloudbuild"))
    import smoke

    url = str(watched.client.base_url)
    smoke.drift_answers(smoke.Smoke(url, url, 5))
    with pytest.raises(smoke.StepError, match="status 404"):
        smoke.predictor_answers(smoke.Smoke(url, url, 0.2), "a version")


@pytest.mark.slow
def test_nobody_asked_anything(watched, logged_rows):
    fill(watched.log)
    said = f"{watched.log}: no request in the window. Requests come into it a part at a time, every serve.part_s seconds."
    assert detail(watched.client.post("/look"), 503) == said
    for path in ("/report", "/report/evidently", "/drift.json"):
        assert detail(watched.client.get(path), 503) == said
    assert watched.client.get("/healthz").json() == {"status": "ok", "last_look": said}
    found = metrics(watched.client)
    assert watched.detected not in found and found["sodaops_drift_window_rows"] == 0
    assert not any(name.startswith(("sodaops_drift_p_value{", "sodaops_drift_effect{")) for name in found)
    assert found["sodaops_drift_runs_total{outcome=no_data}"] >= 1
    assert look(watched, logged_rows.fresh) == {"drifted": False, "judged": True, "said": "as the reference", "n_rows": 200}
    assert watched.client.get("/healthz").json() == {"status": "ok", "last_look": "ok"}
    assert watched.client.get("/report").status_code == 200


def test_what_is_as_the_reference(watched, logged_rows):
    before = time.time()
    look(watched, logged_rows.fresh)
    found = metrics(watched.client)
    assert found[watched.detected] == 0 and found["sodaops_drift_window_rows"] == 200
    assert before <= found["sodaops_drift_last_run_timestamp_seconds"] <= time.time()
    created = datetime.fromisoformat(json.loads((watched.bundle / "bundle.json").read_text())["created"])
    age_s = (datetime.now(UTC) - created).total_seconds()
    assert found["sodaops_drift_reference_age_seconds"] == pytest.approx(age_s, abs=500)  # told in hundredths of a day
    p = labelled(found, "sodaops_drift_p_value{feature=")
    assert p.keys() == {"n_chars", "letters", "non_ascii", "pieces_per_word", "unknown", "label", "score", "embedding"}
    assert min(p.values()) > 0.01 / 8
    assert not any(name.startswith("sodaops_drift_cause{") for name in found)


def test_what_has_drifted(watched, logged_rows):
    before = runs(watched.client).get("drift", 0)
    said = look(watched, logged_rows.others)
    assert said["drifted"] and said["said"].startswith("other texts than those learned from")
    found = metrics(watched.client)
    assert found[watched.detected] == 1 and found["sodaops_drift_cause{cause=texts}"] == 1
    assert runs(watched.client)["drift"] == before + 1
    numbers = watched.client.get("/drift.json")
    assert numbers.headers["content-type"] == "application/json"
    told = numbers.json()
    assert told["drifted"] and told["bundle_id"] == logged_rows.bundle_id and told["n_rows"] == 200
    assert told["causes"] == [{"name": "texts", "said": said["said"]}]
    for feature in told["features"]:
        assert found[f"sodaops_drift_p_value{{feature={feature['name']}}}"] == pytest.approx(feature["p"])
        if feature["effect"] is not None:
            assert found[f"sodaops_drift_effect{{feature={feature['name']}}}"] == pytest.approx(feature["effect"])
    asked = set(logged_rows.others["text"].to_pylist())
    assert told["examples"] and all(example["text"] in asked for example in told["examples"])


def test_the_pages(watched, logged_rows):
    look(watched, logged_rows.others)
    first = watched.client.get("/")
    assert first.status_code == 307 and first.headers["location"] == "report"
    page, evidently = watched.client.get("/report"), watched.client.get("/report/evidently")
    assert "<h1>Drift: texts</h1>" in page.text and logged_rows.bundle_id in page.text
    assert "<html" in evidently.text and "plotly" in evidently.text.lower()
    for answer in (page, evidently):
        assert answer.headers["content-type"].startswith("text/html")
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; ") and "http" not in policy and "'self'" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["cache-control"] == "no-store"
    assert "script-src" not in page.headers["content-security-policy"]
    assert page.content == (watched.out / PAGE).read_bytes()
    assert evidently.content == (watched.out / EVIDENTLY).read_bytes()
    assert {path.name for path in watched.out.iterdir()} == {PAGE, EVIDENTLY, NUMBERS}
    assert watched.client.get("/nothing").status_code == 404 and watched.client.get("/look").status_code == 405


def test_too_few_to_judge(watched, logged_rows):
    look(watched, logged_rows.others)
    said = look(watched, logged_rows.fresh.slice(0, 30))
    assert not said["judged"] and said["said"] == "too few requests to judge: 30, and at least 50 are wanted"
    found = metrics(watched.client)
    assert watched.detected not in found and found["sodaops_drift_window_rows"] == 30
    assert "<h1>No verdict</h1>" in watched.client.get("/report").text
    assert "window held too few requests" in detail(watched.client.get("/report/evidently"), 503)
    assert watched.client.get("/healthz").json()["last_look"] == "ok"


def test_a_log_of_another_bundle(watched, logged_rows):
    said = look(watched, replaced(logged_rows.others, "bundle_id", "b2"))
    assert not said["judged"] and said["n_rows"] == 0
    assert watched.client.get("/drift.json").json()["others"]["b2"]["n_rows"] == 200
    page = " ".join(watched.client.get("/report").text.split())
    assert "200 requests of the window were answered by bundle b2, and are judged apart: drift in letters" in page
    found = metrics(watched.client)
    assert not any(name.startswith("sodaops_drift_detected") for name in found)


def test_a_part_that_is_damaged_and_a_clock_that_is_ahead(watched, logged_rows):
    fill(watched.log, logged_rows.fresh, refused_rows(4, logged_rows.bundle_id, datetime.now(UTC) + timedelta(hours=2)))
    bad = write_log_part(watched.log, logged_rows.fresh, "bad")
    bad.write_bytes(bad.read_bytes()[:-9])
    assert watched.client.post("/look").json()["n_rows"] == 200
    told = watched.client.get("/drift.json").json()
    assert told["ahead"] == 4 and list(told["skipped"]) == [str(bad)]
    page = watched.client.get("/report").text
    assert "1 part of the log left out: " in page and "since a clock is ahead: 4 rows of the future." in page


def test_never_two_looks_at_once(watched, logged_rows):
    """A part that is a pipe: reading it goes on until somebody has written to it."""
    look(watched, logged_rows.others)
    before, page = sum(runs(watched.client).values()), watched.client.get("/report").content
    fill(watched.log, logged_rows.fresh)
    pipe = watched.log / f"date={RECENTLY.date()}/pipe.parquet"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(10) as pool:
        asked = [pool.submit(watched.client.post, "/look") for _ in range(10)]
        until = time.monotonic() + 20
        while metrics(watched.client)["sodaops_requests_in_flight"] < 11:  # the ten, and this one
            assert time.monotonic() < until
            time.sleep(0.02)
        assert watched.client.get("/report").content == page, "the last verdict stays while it looks"
        assert not any(answer.done() for answer in asked)
        pipe.write_bytes(b"")  # opens it, and so ends the wait
        answers = [answer.result() for answer in asked]
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.text for answer in answers}) == 1 and answers[0].json()["n_rows"] == 200
    assert sum(runs(watched.client).values()) == before + 1


@pytest.mark.slow
def test_pages_are_whole_while_it_looks(watched, logged_rows):
    look(watched, logged_rows.fresh)
    stop, seen = threading.Event(), []

    def read():
        with watched.server.client() as client:
            while not stop.is_set():
                answer = client.get("/report/evidently")
                seen.append((answer.status_code, answer.content.rstrip().endswith(b"</html>")))

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for table in (logged_rows.others, logged_rows.fresh, logged_rows.others):
        look(watched, table)
    stop.set()
    for reader in readers:
        reader.join(30)
    assert len(seen) > 10 and set(seen) == {(200, True)}


def test_a_bundle_that_vanishes(watched, logged_rows):
    look(watched, logged_rows.others)
    failed = runs(watched.client).get("failed", 0)
    aside = watched.bundle.with_name("aside")
    watched.bundle.rename(aside)
    try:
        said = f"{watched.bundle}: no bundle.json here; expected a folder that training wrote (RUN/bundle)."
        assert detail(watched.client.post("/look"), 503) == said
        assert watched.client.get("/healthz").json() == {"status": "ok", "last_look": said}
        assert "<h1>Drift: texts</h1>" in watched.client.get("/report").text
        found = metrics(watched.client)
        assert found["sodaops_drift_runs_total{outcome=failed}"] == failed + 1
        assert watched.detected not in found  # what was seen before is no verdict of now
    finally:
        aside.rename(watched.bundle)
    assert look(watched, logged_rows.fresh)["said"] == "as the reference"
    assert watched.client.get("/healthz").json()["last_look"] == "ok"


def test_a_bundle_that_is_replaced(watched, logged_rows, tmp_path):
    look(watched, logged_rows.fresh)
    aside = watched.bundle.with_name("aside")
    watched.bundle.rename(aside)
    try:
        copy_bundle(aside, watched.bundle)
        said = look(watched, logged_rows.fresh)
        assert not said["judged"] and said["n_rows"] == 0, "the rows are of the bundle before"
        assert watched.detected not in metrics(watched.client)
    finally:
        shutil.rmtree(watched.bundle)
        aside.rename(watched.bundle)


def test_an_output_folder_that_holds_something_else(watched, logged_rows):
    look(watched, logged_rows.others)
    mine = watched.out / "mine.txt"
    mine.write_text("mine")
    try:
        fill(watched.log, logged_rows.fresh)
        assert "holds other things (mine.txt), which would be lost" in detail(watched.client.post("/look"), 503)
        assert mine.read_text() == "mine" and watched.detected not in metrics(watched.client)
    finally:
        mine.unlink()


def test_the_log_says_nothing_of_texts(watched, logged_rows):
    fill(watched.log, replaced(logged_rows.others, "text", "a very private text"))
    watched.client.post("/look")
    assert "a very private text" in watched.client.get("/report").text
    lines = watched.server.records()
    assert {"looked", "answered"} <= {line["message"] for line in lines}
    assert "very private" not in json.dumps(lines)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"BUNDLE": None}, "SODAOPS_DRIFT_BUNDLE is missing; give it as SODAOPS_DRIFT_BUNDLE=VALUE."),
        ({"EVRY_S": "5"}, "SODAOPS_DRIFT_EVRY_S is no setting of the service (did you mean SODAOPS_DRIFT_EVERY_S?)"),
        ({"ALPHA": "7"}, "SODAOPS_DRIFT_ALPHA=7: input should be less than or equal to 0.2."),
        ({"EVERY_S": "0"}, "SODAOPS_DRIFT_EVERY_S=0: input should be greater than 0."),
        ({"PORT": "http"}, "SODAOPS_DRIFT_PORT=http: input should be a valid integer"),
        ({"SINCE": "yesterday"}, "SODAOPS_DRIFT_SINCE=yesterday: value error, expected a time as 2026-11-25 or"),
        ({"ALERTS": "{bad"}, "SODAOPS_DRIFT_ALERTS: expected a JSON object."),
    ],
)
def test_settings_that_are_none(monkeypatch, changes, said):
    for key, value in {"BUNDLE": "b", "REQUEST_LOG": "log", **changes}.items():
        monkeypatch.delenv(DRIFT + key, raising=False) if value is None else monkeypatch.setenv(DRIFT + key, value)
    with pytest.raises(ConfigError) as error:
        WatchSettings()
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


def test_no_secret_in_a_message(monkeypatch):
    config = json.loads(built().model_dump_json()) | {"webhook_url": "https://hooks.test/S3CRET", "every_s": 0}
    config["rules"]["drift"]["clear"] = 0.9
    del config["state_dir"]
    for key, value in {"BUNDLE": "b", "REQUEST_LOG": "log", "ALERTS": json.dumps(config)}.items():
        monkeypatch.setenv(DRIFT + key, value)
    with pytest.raises(ConfigError) as error:
        WatchSettings()
    told = str(error.value)
    assert "S3CRET" not in told
    assert "SODAOPS_DRIFT_ALERTS: every_s: input should be greater than or equal to 1." in told
    assert "SODAOPS_DRIFT_ALERTS: state_dir is missing." in told
    assert "SODAOPS_DRIFT_ALERTS: rules.drift.clear: expected at most above=0.5, where the rule fires." in told


def test_a_fault_of_the_settings_ends_the_process(tmp_path):
    env = {**os.environ, "SODAOPS_DRIFT_BUNDLE": "b"}
    done = subprocess.run(
        [sys.executable, "-m", "sodaops.drift"], env=env, capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "ConfigError: SODAOPS_DRIFT_REQUEST_LOG is missing; give it as SODAOPS_DRIFT_REQUEST_LOG=VALUE.\n"


@pytest.mark.slow
def test_it_ends_while_it_looks(referenced, logged_rows, tmp_path):
    fill(tmp_path / "log", logged_rows.fresh)
    os.mkfifo(tmp_path / f"log/date={RECENTLY.date()}/pipe.parquet")  # a look that never ends
    server = Server(referenced, prefix=DRIFT, request_log=tmp_path / "log", output_dir=tmp_path / "out")
    with server.client() as client, ThreadPoolExecutor(1) as pool:
        assert client.get("/healthz").json()["last_look"] == "it has not looked yet"
        assert detail(client.get("/report"), 503) == "it has not looked yet"
        asked = pool.submit(client.post, "/look")
        while metrics(client)["sodaops_requests_in_flight"] < 2:
            time.sleep(0.02)
        began = time.monotonic()
        assert server.signal(signal.SIGTERM) == -signal.SIGTERM  # uvicorn ends by the signal, when all is done
        assert time.monotonic() - began < 10
        assert asked.exception() is not None or asked.result().status_code >= 500
    assert not any("Traceback" in line for line in server.lines)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_from_the_predictor_to_the_webhook(referenced, tmp_path):
    """Texts that nobody has trained on are asked; the predictor logs them, the drift service sees them, somebody is told."""
    port = free_port()
    rules = {**dict.fromkeys(RULES), "drift": built().rules["drift"].model_dump()}
    config = built(
        metrics_urls=[f"http://127.0.0.1:{port}/metrics"], rules=rules, every_s=1.0, state_dir=str(tmp_path / "alerts")
    )
    with Receiver(200) as receiver:
        environ = {
            "SODAOPS_API_KEYS": "sesame", "SODAOPS_ALERT_WEBHOOK": receiver.url, "SODAOPS_ALERT_API_KEY": "sesame",
            "SODAOPS_DRIFT_REQUEST_LOG": str(tmp_path / "log"), "SODAOPS_DRIFT_OUTPUT_DIR": str(tmp_path / "out"),
            "SODAOPS_DRIFT_ALERTS": config.model_dump_json(), "SODAOPS_DRIFT_EVERY_S": "9999",
        }  # fmt: skip
        key = {"x-api-key": "sesame"}
        served = Server(referenced, environ=environ, request_log=tmp_path / "log", part_s=1, log_texts="true")
        with served, served.client(headers=key) as client:
            for first in range(0, 120, 8):
                answer = client.post("/predict/batch", json={"texts": reviews()[first : first + 8]})
                assert answer.status_code == 200, answer.text
            until = time.monotonic() + 30
            while rows_of(tmp_path / "log") < 120:
                assert time.monotonic() < until
                time.sleep(0.05)
        with Server(referenced, prefix=DRIFT, environ=environ, port=port) as server, server.client() as client:
            keys_are_asked_for(client)
            client.headers.update(key)
            found = client.post("/look").json()
            assert found["drifted"] and found["n_rows"] == 120
            assert {e["text"] for e in client.get("/drift.json").json()["examples"]} <= set(reviews()[:120])
            until = time.monotonic() + 30
            while not receiver.asked:
                assert time.monotonic() < until, "".join(server.lines)
                time.sleep(0.05)
            time.sleep(2.5)  # two rounds more
            ((_, sent, body),) = receiver.asked
            assert sent.startswith("drift-firing-")
            assert body["text"] == "[ticket] drift fires: drift is 1 (above 0.5)"
            (attachment,) = body["attachments"]
            fields = {field["title"]: field["value"] for field in attachment["fields"]}
            assert fields["Rule"] == "drift" and fields["State"] == "firing" and fields["Value"] == "1"
            assert metrics(client)["sodaops_alert_firing{rule=drift}"] == 1
            assert "sesame" not in "".join(server.lines) and receiver.url not in "".join(server.lines)


def rows_of(log):
    return sum(pq.ParquetFile(path).metadata.num_rows for path in part_addresses(str(log))) if log.is_dir() else 0


def keys_are_asked_for(client):
    for path in ("/report", "/report/evidently", "/drift.json", "/metrics"):
        refused = client.get(path)
        assert "wrong or missing key" in detail(refused, 401) and refused.headers["www-authenticate"] == "Bearer"
    assert client.post("/look", headers={"x-api-key": "wrong"}).status_code == 401
    assert client.get("/healthz").status_code == 200 and client.get("/").status_code == 307
    assert client.get("/metrics", headers={"authorization": "Bearer sesame"}).status_code == 200


def test_the_verb_becomes_the_service(referenced, tmp_path):
    """A webhook in conf/ is a secret; it reaches the service whole, and no output."""
    (tmp_path / "log").mkdir()
    down = "{signal: up, below: 1.0, clear: 1.0, for_s: 0.0, severity: page, summary: Dead}"
    with Receiver(200) as receiver:
        command = [
            sys.executable, "-m", "sodaops.cli", "watch", str(referenced), f"drift.request_log={tmp_path / 'log'}",
            "drift.port=0", f"drift.output_dir={tmp_path / 'out'}", f"alerts.webhook_url={receiver.url}", "alerts.every_s=1",
            "alerts.metrics_urls=[http://127.0.0.1:9/metrics]", f"alerts.state_dir={tmp_path / 'alerts'}",
            f"alerts.rules.down={down}",
        ]  # fmt: skip
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            until = time.monotonic() + 40
            while not receiver.asked:
                assert time.monotonic() < until and process.poll() is None
                time.sleep(0.05)
        finally:
            process.send_signal(signal.SIGTERM)
            said = process.communicate(timeout=30)[0]
    assert receiver.asked[0][1].startswith("down-firing-")
    assert receiver.url not in said and re.search(r"running on http://127\.0\.0\.1:[1-9]", said)
