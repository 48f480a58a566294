"""The drift service over request logs as the predictor writes them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from sodaops.drift.settings import WatchSettings
from sodaops.errors import ConfigError
from sodaops.request_log.parts import part_addresses
from tests.conftest import REPO, lazy, wait_until
from tests.requests import refused_rows, write_log_part
from tests.serving import DRIFT, Server, copy_bundle
from tests.watching import RECENTLY, fill, metrics, replaced, reviews

check = lazy("sodaops.drift.check")
testclient = lazy("fastapi.testclient")

KEY = "sesame"


@pytest.fixture(scope="module")
def watched(drift_bundle, logged_rows, tmp_path_factory):
    """A drift service in this process that has run once on an empty log, and then runs when asked to."""
    from sodaops.drift import app

    folder = tmp_path_factory.mktemp("watched")
    bundle = shutil.copytree(drift_bundle, folder / "bundle")
    fill(folder / "log")
    settings = WatchSettings(
        bundle=str(bundle), request_log=str(folder / "log"), output_dir=str(folder / "out"), every_s=9999, n_permutations=1000
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "configure_json_logging", lambda: None)  # it would change the logging of other tests
        application = app.create_drift_app(settings)
    with testclient.TestClient(application, follow_redirects=False) as client:
        wait_until(lambda: metrics(client).get("sodaops_drift_runs_total{outcome=no_data}"))
        yield SimpleNamespace(
            client=client, bundle=bundle, log=folder / "log", out=folder / "out",
            detected=f"sodaops_drift_detected{{bundle_id={logged_rows.bundle_id}}}",
        )  # fmt: skip


def run_on(watched, *tables):
    """The answer of a run on these rows."""
    fill(watched.log, *tables)
    answer = watched.client.post("/look")
    assert answer.status_code == 200, answer.text
    return answer.json()


def detail(answer, status):
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    return answer.json()["detail"]


def labelled(values, prefix):
    return {name.removeprefix(prefix)[:-1]: value for name, value in values.items() if name.startswith(prefix)}


def runs(client):
    return labelled(metrics(client), "sodaops_drift_runs_total{outcome=")


def test_an_empty_log(watched, logged_rows):
    fill(watched.log)
    message = detail(watched.client.post("/look"), 503)
    assert message.startswith(f"{watched.log}: ")
    for path in ("/report", "/report/evidently", "/drift.json"):
        assert detail(watched.client.get(path), 503) == message
    assert watched.client.get("/healthz").json() == {"status": "ok", "last_look": message}
    values = metrics(watched.client)
    assert watched.detected not in values and values["sodaops_drift_window_rows"] == 0
    assert not any(name.startswith(("sodaops_drift_p_value{", "sodaops_drift_effect{")) for name in values)
    assert values["sodaops_drift_runs_total{outcome=no_data}"] >= 1


def test_requests_like_the_reference(watched, logged_rows):
    start = time.time()
    answer = run_on(watched, logged_rows.fresh)
    assert (answer["drifted"], answer["judged"], answer["n_rows"]) == (False, True, 200)
    assert watched.client.get("/healthz").json() == {"status": "ok", "last_look": "ok"}
    values = metrics(watched.client)
    assert values[watched.detected] == 0 and values["sodaops_drift_window_rows"] == 200
    assert start <= values["sodaops_drift_last_run_timestamp_seconds"] <= time.time()
    created = datetime.fromisoformat(json.loads((watched.bundle / "bundle.json").read_text())["created"])
    age_s = (datetime.now(UTC) - created).total_seconds()
    assert values["sodaops_drift_reference_age_seconds"] == pytest.approx(age_s, abs=500)  # rounded to 0.01 days
    p = labelled(values, "sodaops_drift_p_value{feature=")
    assert p.keys() == {"n_chars", "letters", "non_ascii", "pieces_per_word", "unknown", "label", "score", "embedding"}
    assert min(p.values()) > 0.01 / 8
    assert not any(name.startswith("sodaops_drift_cause{") for name in values)
    accuracy = watched.client.get("/drift.json").json()["quality"]["metrics"]["accuracy"]
    bounds = [values[f"sodaops_quality{{bound={bound}}}{{metric=accuracy}}"] for bound in ("low", "value", "high")]
    assert bounds == sorted(bounds) == [accuracy["low"], accuracy["value"], accuracy["high"]]
    assert f"<b>{accuracy['value']:.3f}</b>" in watched.client.get("/report").text


def test_drift_in_metrics_numbers_and_pages(watched, logged_rows):
    runs_before = runs(watched.client).get("drift", 0)
    answer = run_on(watched, logged_rows.others)
    values, numbers = metrics(watched.client), watched.client.get("/drift.json").json()
    assert answer["drifted"] and values[watched.detected] == 1 and values["sodaops_drift_cause{cause=texts}"] == 1
    assert runs(watched.client)["drift"] == runs_before + 1
    assert numbers["drifted"] and numbers["bundle_id"] == logged_rows.bundle_id and numbers["n_rows"] == 200
    assert numbers["causes"] == [{"name": "texts", "said": answer["said"]}]
    for feature in numbers["features"]:
        assert values[f"sodaops_drift_p_value{{feature={feature['name']}}}"] == pytest.approx(feature["p"])
        if feature["effect"] is not None:
            assert values[f"sodaops_drift_effect{{feature={feature['name']}}}"] == pytest.approx(feature["effect"])
    assert values["sodaops_quality_withheld{reason=drift}"] == 1 and numbers["quality"]["withheld"] == "drift"
    assert not any(name.startswith("sodaops_quality{") for name in values)
    assert numbers["examples"]
    assert {example["text"] for example in numbers["examples"]} <= set(logged_rows.others["text"].to_pylist())

    first = watched.client.get("/")
    assert first.status_code == 307 and first.headers["location"] == "/report"
    assert watched.client.head("/report").status_code == watched.client.head("/drift.json").status_code == 200
    page, evidently = watched.client.get("/report"), watched.client.get("/report/evidently")
    assert "<h1>Drift: texts</h1>" in page.text and logged_rows.bundle_id in page.text
    assert "<html" in evidently.text and "plotly" in evidently.text.lower()
    for answer in (page, evidently):
        assert answer.headers["content-type"].startswith("text/html")
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'; " in policy and not any(part in policy for part in ("http", "'self'", "inline"))
        assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["cache-control"] == "no-store"
    assert "script-src" not in page.headers["content-security-policy"]
    assert page.content == (watched.out / check.PAGE).read_bytes()
    assert evidently.content == (watched.out / check.EVIDENTLY).read_bytes()
    assert {path.name for path in watched.out.iterdir()} == {check.PAGE, check.EVIDENTLY, check.NUMBERS}
    assert watched.client.get("/nothing").status_code == 404 and watched.client.get("/look").status_code == 405


def test_drift_in_a_segment(watched, logged_rows):
    web, app = (
        replaced(rows, "context", f'{{"source": "{name}"}}')
        for rows, name in ((logged_rows.fresh, "web"), (logged_rows.others.slice(0, 60), "app"))
    )
    assert run_on(watched, web, app)["n_rows"] == 260
    detected = labelled(metrics(watched.client), "sodaops_drift_segment_detected{column=source}{value=")
    assert detected == {"web": 0, "app": 1}
    assert re.search("<h1>.*source=app</h1>", watched.client.get("/report").text)
    assert {segment["value"] for segment in watched.client.get("/drift.json").json()["segments"]} == {"web", "app"}


def test_the_first_page_under_a_prefix(watched):
    from fastapi.testclient import TestClient

    client = TestClient(watched.client.app, follow_redirects=False, root_path="/drift")
    assert client.get("/drift/").headers["location"] == "/drift/report"


def test_too_few_requests_another_bundle_damaged_parts_and_a_clock_ahead(watched, logged_rows):
    run_on(watched, logged_rows.others)
    future = refused_rows(4, logged_rows.bundle_id, datetime.now(UTC) + timedelta(hours=2))
    fill(watched.log, logged_rows.fresh.slice(0, 30), replaced(logged_rows.others, "bundle_id", "b2"), future)
    damaged = write_log_part(watched.log, logged_rows.fresh, "damaged")
    damaged.write_bytes(damaged.read_bytes()[:-9])
    answer = watched.client.post("/look").json()
    assert not answer["judged"] and answer["n_rows"] == 30
    numbers, page = watched.client.get("/drift.json").json(), watched.client.get("/report").text
    assert numbers["others"]["b2"]["n_rows"] == 200 and "letters" in numbers["others"]["b2"]["drifted"]
    assert numbers["ahead"] == 4 and list(numbers["skipped"]) == [str(damaged)]
    assert "b2" in page and str(damaged) in page and "4 rows" in page
    values = metrics(watched.client)
    assert not any(name.startswith("sodaops_drift_detected") for name in values) and values["sodaops_drift_window_rows"] == 30
    assert "<h1>No verdict</h1>" in page and watched.client.get("/healthz").json()["last_look"] == "ok"
    assert check.EVIDENTLY in detail(watched.client.get("/report/evidently"), 503)


def test_never_two_runs_at_once(watched, logged_rows):
    """One part is a pipe: reading it waits until somebody has written to it."""
    run_on(watched, logged_rows.others)
    runs_before, page = sum(runs(watched.client).values()), watched.client.get("/report").content
    fill(watched.log, logged_rows.fresh)
    pipe = watched.log / f"date={RECENTLY.date()}/pipe.parquet"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(10) as pool:
        pending = [pool.submit(watched.client.post, "/look") for _ in range(10)]
        try:
            wait_until(lambda: metrics(watched.client)["sodaops_requests_in_flight"] >= 11)  # the ten, and this one
            assert watched.client.get("/report").content == page, "the last verdict stays until the run ends"
            assert not any(answer.done() for answer in pending)
        finally:
            pipe.write_bytes(b"")  # ends the wait of the reader
        answers = [answer.result() for answer in pending]
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.text for answer in answers}) == 1 and answers[0].json()["n_rows"] == 200
    assert sum(runs(watched.client).values()) == runs_before + 1


def test_a_bundle_that_vanishes_or_is_replaced(watched, logged_rows):
    run_on(watched, logged_rows.others)
    n_failed = runs(watched.client).get("failed", 0)
    aside = watched.bundle.with_name("aside")
    watched.bundle.rename(aside)
    try:
        message = detail(watched.client.post("/look"), 503)
        assert message.startswith(f"{watched.bundle}: ")
        assert watched.client.get("/healthz").json() == {"status": "ok", "last_look": message}
        assert "<h1>Drift: texts</h1>" in watched.client.get("/report").text
        assert runs(watched.client)["failed"] == n_failed + 1
        assert watched.detected not in metrics(watched.client), "the last verdict does not hold any more"
        copy_bundle(aside, watched.bundle)
        answer = run_on(watched, logged_rows.fresh)
        assert not answer["judged"] and answer["n_rows"] == 0, "the rows are of the previous bundle"
        assert watched.detected not in metrics(watched.client)
    finally:
        shutil.rmtree(watched.bundle, ignore_errors=True)
        aside.rename(watched.bundle)
    assert not run_on(watched, logged_rows.fresh)["drifted"]
    assert watched.client.get("/healthz").json()["last_look"] == "ok"


def test_an_output_folder_with_other_files(watched, logged_rows):
    run_on(watched, logged_rows.others)
    other = watched.out / "mine.txt"
    other.write_text("mine")
    try:
        fill(watched.log, logged_rows.fresh)
        assert "mine.txt" in detail(watched.client.post("/look"), 503)
        values = metrics(watched.client)
        assert other.read_text() == "mine" and watched.detected not in values
        assert not any(name.startswith("sodaops_quality") for name in values), "the last reason does not hold any more"
    finally:
        other.unlink()


@pytest.mark.parametrize(("changes", "variable"), [
    ({"BUNDLE": None}, "BUNDLE"),
    ({"EVRY_S": "5"}, "EVRY_S"),
    ({"ALPHA": "7"}, "ALPHA"),
    ({"EVERY_S": "0"}, "EVERY_S"),
    ({"PORT": "http"}, "PORT"),
    ({"SINCE": "yesterday"}, "SINCE"),
    ({"ALERTS": "{}"}, "ALERTS"),  # removed: Prometheus evaluates the rules
])  # fmt: skip
def test_refused_settings(monkeypatch, changes, variable):
    for key, value in {"BUNDLE": "b", "REQUEST_LOG": "log", **changes}.items():
        monkeypatch.delenv(DRIFT + key, raising=False) if value is None else monkeypatch.setenv(DRIFT + key, value)
    with pytest.raises(ConfigError, match=rf"^{DRIFT}{variable}\b") as error:
        WatchSettings()
    assert "\n" not in str(error.value)


def test_refused_settings_end_the_process(tmp_path):
    env = {**os.environ, "SODAOPS_DRIFT_BUNDLE": "b"}
    done = subprocess.run(
        [sys.executable, "-m", "sodaops.drift"], env=env, capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("ConfigError: SODAOPS_DRIFT_REQUEST_LOG ") and done.stderr.count("\n") == 1


def test_from_the_predictor_to_the_metrics(drift_bundle, tmp_path):
    """The predictor logs texts unlike its training data, and the drift service reports drift; no log holds keys or texts."""
    log = tmp_path / "log"
    settings = {"request_log": log, "log_texts": "true", "part_s": 1}
    environ = {"SODAOPS_API_KEYS": KEY}
    with Server(drift_bundle, environ=environ, **settings) as server, server.client(headers={"x-api-key": KEY}) as client:
        for first in range(0, 120, 8):
            assert client.post("/predict/batch", json={"texts": reviews()[first : first + 8]}).status_code == 200
        wait_until(lambda: log.is_dir() and sum(pq.ParquetFile(p).metadata.num_rows for p in part_addresses(str(log))) == 120)
    settings = {"request_log": log, "output_dir": tmp_path / "out", "every_s": 9999}
    with Server(drift_bundle, prefix=DRIFT, environ=environ, **settings) as server, server.client() as client:
        for path in ("/report", "/report/evidently", "/drift.json", "/metrics"):
            refused = client.get(path)
            assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
        assert client.post("/look", headers={"x-api-key": "wrong"}).status_code == 401
        assert client.get("/healthz").status_code == 200 and client.get("/").status_code == 307
        client.headers["authorization"] = f"Bearer {KEY}"
        answer = client.post("/look").json()
        assert answer["drifted"] and answer["n_rows"] == 120
        examples = {example["text"] for example in client.get("/drift.json").json()["examples"]}
        assert examples <= set(reviews()[:120])
        values = metrics(client)
        assert any(name.startswith("sodaops_drift_detected") and value == 1 for name, value in values.items())
    lines = "".join(server.lines)
    assert '"drift check"' in lines and KEY not in lines and not any(text in lines for text in examples)


def test_the_command_becomes_the_service(drift_bundle, logged_rows, tmp_path, monkeypatch):
    """SIGTERM ends it during a run that does not end; before that it passes the smoke test of a deployment."""
    monkeypatch.syspath_prepend(str(REPO / "cloudbuild"))
    import smoke

    fill(tmp_path / "log", logged_rows.fresh)
    os.mkfifo(tmp_path / f"log/date={RECENTLY.date()}/pipe.parquet")  # a run that never ends
    command = [
        sys.executable, "-m", "sodaops.cli", "watch", str(drift_bundle), f"drift.request_log={tmp_path / 'log'}",
        "drift.port=0", f"drift.output_dir={tmp_path / 'out'}",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPO)
    lines = []
    try:
        while "running on http" not in (line := process.stdout.readline()):
            assert line, "".join(lines)
            lines.append(line)
        url = line.split("running on ")[1].split()[0]
        smoke.check_drift(smoke.Smoke(url, url, 60))
        with pytest.raises(smoke.StepError, match="404"):
            smoke.check_predictor(smoke.Smoke(url, url, 0.2), "a version")
        process.send_signal(signal.SIGTERM)
        lines += process.communicate(timeout=120)[0].splitlines()
    finally:
        process.kill()
    assert process.returncode == -signal.SIGTERM and not any("Traceback" in line for line in lines)
    assert not (tmp_path / "out").exists()
