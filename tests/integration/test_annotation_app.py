"""The annotation service and the command `annotate`; most tests run them in this process."""

import json
import logging
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest
from pydantic import SecretStr

from sodaops.annotation.store import Store
from sodaops.config.schema import AnnotateConfig
from tests.annotation import CODE, LABELS, Server, store_of, task
from tests.conftest import REPO, configured, lazy

annotation_app = lazy("sodaops.annotation.app")
annotation_main = lazy("sodaops.annotation.__main__")
testclient = lazy("fastapi.testclient")
guard = lazy("sodaops.web.guard")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "store"


def body(name, label, annotator="ann", session=CODE):
    return {"annotator": annotator, "session": session, "task": name, "label": label}


def test_a_session_of_answers_skip_and_undo(folder, caplog):
    names = [one.task for one in store_of(folder, 3).state().tasks]
    caplog.set_level(logging.INFO)
    client = testclient.TestClient(annotation_app.create_annotation_app(folder))
    session = {"annotator": "ann", "session": CODE}
    assert client.get("/healthz").json() == {"status": "ok"}
    first = client.get("/api/next", params={"annotator": "ann"}).json()
    assert first == {
        "task": {"task": names[0], "text": "text 0"}, "labels": LABELS, "n_tasks": 3, "n_answered": 0, "n_labelled": 0,
        "n_skipped": 0, "agreements": [], "question": {"kind": "choice"},
    }  # fmt: skip
    second = client.post("/api/answer", json=body(names[0], "neutral")).json()
    assert (second["task"]["text"], second["n_labelled"], second["n_answered"]) == ("text 1", 1, 1)
    third = client.post("/api/answer", json=body(names[1], None)).json()
    assert (third["task"]["text"], third["n_labelled"], third["n_skipped"], third["n_answered"]) == ("text 2", 1, 1, 1)
    back = client.post("/api/undo", json=session).json()
    assert (back["task"]["text"], back["n_skipped"]) == ("text 1", 0)
    back = client.post("/api/undo", json={**session, "task": names[0]}).json()
    assert (back["task"]["text"], back["n_labelled"]) == ("text 0", 0)
    nothing = client.post("/api/undo", json=session)
    assert (nothing.status_code, nothing.headers["content-type"]) == (422, "application/problem+json")
    for name in names:
        last = client.post("/api/answer", json=body(name, "positive")).json()
    assert last["task"] is None and last["n_labelled"] == 3
    assert client.get("/api/next", params={"annotator": "ben"}).json()["task"]["text"] == "text 0"
    assert "text 0" not in caplog.text and any(getattr(record, "path", "") == "/api/answer" for record in caplog.records)


def test_the_prediction_is_not_sent(folder):
    store = Store.create(folder, LABELS)
    store.add_tasks("some", [task("one", label="neutral", score=0.41, probs={"neutral": 0.41}, bundle_id="b1")])
    state = (
        testclient.TestClient(annotation_app.create_annotation_app(folder)).get("/api/next", params={"annotator": "ann"}).json()
    )
    assert state["task"] == {"task": store.state().tasks[0].task, "text": "one"} and "0.41" not in json.dumps(state)


def test_answers_that_are_not_valid(folder):
    (one,) = store_of(folder, 1).state().tasks
    client = testclient.TestClient(annotation_app.create_annotation_app(folder))
    for changes, named in [
        ({"label": "positve"}, "label='positve'"), ({"label": 1}, "label=1"), ({"label": {}}, "body.label"),
        ({"task": "0" * 16}, "task='0000000000000000'"),
        ({"annotator": "  "}, "annotator="), ({"session": "../../x"}, "session="), ({"more": 1}, "body.more"),
    ]:  # fmt: skip
        refused = client.post("/api/answer", json={**body(one.task, "neutral"), **changes})
        assert refused.status_code == 422 and named in refused.json()["detail"], refused.text
    missing = client.post("/api/answer", json={"annotator": "ann", "session": CODE, "task": one.task})
    assert missing.status_code == 422 and "body.label" in missing.json()["detail"]
    assert client.get("/api/next", params={"annotator": ""}).status_code == 422
    assert client.head("/api/next?annotator=ann").status_code == 200
    form = {"content-type": "text/plain"}  # what a form of another site could send
    assert client.post("/api/answer", content=json.dumps(body(one.task, "neutral")), headers=form).status_code == 415
    assert client.get("/api/nothing").status_code == 404 and client.get("/api/answer").status_code == 405
    assert client.post("/api/answer", content=b"x" * 70_000).status_code == 413
    assert Store(folder).state().answers == {}


def test_a_store_that_cannot_be_written(folder, monkeypatch):
    monkeypatch.setattr("sodaops.annotation.database._BUSY_TIMEOUT_S", 0.01)
    (one,) = store_of(folder, 1).state().tasks
    client = testclient.TestClient(annotation_app.create_annotation_app(folder))
    with Store(folder)._transaction():
        assert client.post("/api/answer", json=body(one.task, "neutral")).status_code == 503  # the page tries again
    assert client.post("/api/answer", json=body(one.task, "neutral")).status_code == 200


def test_keys_and_headers(folder):
    store_of(folder, 1)
    keys = guard.Access([SecretStr("one"), SecretStr("two")])
    client = testclient.TestClient(annotation_app.create_annotation_app(folder, keys))
    page = client.get("/")
    policy = page.headers["content-security-policy"]
    assert page.status_code == 200 and "connect-src 'self'" in policy and "unsafe" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    headers = {(): 401, ("x-api-key", "three"): 401, ("x-api-key", "two"): 200, ("authorization", "Bearer one"): 200}
    for header, status in headers.items():
        response = client.get("/api/next", params={"annotator": "ann"}, headers=dict([header] if header else []))
        assert response.status_code == status
    assert client.post("/api/answer", json=body("x", None)).status_code == 401
    assert client.get("/healthz").status_code == 200


def test_kill_9_of_two_servers_loses_no_acknowledged_answer(folder):
    """Six annotators answer as fast as they can on two servers; both are killed, are started again, and they go on."""
    names = [one.task for one in store_of(folder, 400).state().tasks]
    acknowledged = []

    def work(url, annotator, code, names):
        with httpx.Client(base_url=url, timeout=60) as client:
            for n, name in enumerate(names):
                try:
                    response = client.post("/api/answer", json=body(name, LABELS[n % 3], annotator, code))
                except httpx.HTTPError:
                    return
                assert response.status_code == 200
                acknowledged.append((annotator, name, LABELS[n % 3]))

    for part in (names[:200], names[200:]):
        servers, n_before = [Server(folder), Server(folder)], len(acknowledged)
        threads = [threading.Thread(target=work, args=(servers[n % 2].url, f"a{n}", f"{n:08x}", part)) for n in range(6)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 300
        while len(acknowledged) < n_before + 100:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert [server.stop(signal.SIGKILL) for server in servers] == 2 * [-signal.SIGKILL]
        for thread in threads:
            thread.join(120)
    state = Store(folder).state()
    assert [entry for entry in acknowledged if state.answers.get(entry[1], {}).get(entry[0]) != entry[2]] == []
    assert sum(state.progress().labelled.values()) - len(acknowledged) <= 12  # requests that were running at a kill


def test_two_servers_on_one_store(folder):
    names = [one.task for one in store_of(folder, 4).state().tasks]
    with Server(folder) as one, Server(folder) as two, one.client() as client_1, two.client() as client_2:
        for n, name in enumerate(names):
            assert client_1.post("/api/answer", json=body(name, "neutral" if n else "negative", "ann")).status_code == 200
            state = client_2.post("/api/answer", json=body(name, "neutral", "ben", "f" * 16)).json()
        assert state["agreements"] == [{"annotator": "ann", "n_shared": 4, "raw": 0.75, "kappa": 0.0}]
        state = client_1.get("/api/next", params={"annotator": "ann"}).json()
        assert state["agreements"] == [{"annotator": "ben", "n_shared": 4, "raw": 0.75, "kappa": 0.0}]
        # one page, whose requests a load balancer sends to both servers
        back = client_2.post("/api/undo", json={"annotator": "ann", "session": CODE}).json()
        assert back["task"]["text"] == "text 3"
        assert client_2.post("/api/answer", json=body(names[3], "positive", "ann")).status_code == 200
        back = client_1.post("/api/undo", json={"annotator": "ann", "session": CODE, "task": names[3]}).json()
        assert back["task"]["text"] == "text 3" and back["n_labelled"] == 3
    state = Store(folder).state()
    assert state.progress() == (4, 4, {"ann": 3, "ben": 4}, {}) and [one.text for one in state.conflicts()] == ["text 0"]


def test_the_service_alone_has_the_settings_of_conf():
    assert configured().annotate == AnnotateConfig()


@pytest.mark.parametrize(("name", "named"), [("STORE", "none"), ("STOR", "SODAOPS_ANNOTATE_STOR")])
def test_settings_that_are_not_valid(monkeypatch, workdir, capsys, name, named):
    monkeypatch.setattr("sodaops.annotation.__main__.configure_json_logging", lambda: None)
    monkeypatch.setattr(sys, "argv", ["annotation"])
    monkeypatch.setenv(f"SODAOPS_ANNOTATE_{name}", "none")
    assert annotation_main.main() == 2 and named in capsys.readouterr().err


def test_the_command(folder, run, tmp_path):
    texts = tmp_path / "texts.csv"
    texts.write_text("text,label,annotator\none,neutral,ann\none,positive,ben\ntwo,neutral,ann\ntwo,neutral,ben\nthree,,\n")
    store = f"annotate.store={folder}"
    code, _, err = run("annotate", "status", store)
    assert code == 2 and str(folder) in err
    assert run("annotate", "import", texts, store)[:2] == (0, f"{folder}: 3 new texts, 4 new answers\n")  # labels: data.labels
    code, out, _ = run("annotate", "status", store)
    lines = [line.split() for line in out.splitlines()]
    assert code == 0 and lines[0][:5] == [f"{folder}:", "3", "texts,", "2", "with"]
    assert lines[1:3] == [[name, "2", "labelled", "0", "skipped"] for name in ("ann", "ben")]
    assert "50 %" in out and lines[3][-2:] == ["kappa", "0.00"]
    assert lines[4] == ["conflict:", f"{task('one')['text_sha256'][:16]}:", "ann", "neutral,", "ben", "positive"]
    Store(folder).forget([], [task("two")["text_sha256"]])
    assert "2 answers" in run("annotate", "status", store)[1]  # that are left of the deleted text
    code, out, _ = run("annotate", "export", tmp_path / "out.json", store)
    assert code == 0 and "out.xml" in out and (tmp_path / "out.xml").is_file()
    for arguments, hint in [(["exprot"], "export?"), (["status", "annotate.stor=x"], "store?")]:
        code, _, err = run("annotate", *arguments)
        assert code == 2 and hint in err


def test_the_command_serves(folder):
    store_of(folder, 1)
    command = [sys.executable, "-m", "sodaops.cli", "annotate", "serve", str(folder), "annotate.port=0"]
    running = subprocess.Popen(command, cwd=REPO, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        url = next(line.split("running on ")[1].split(" ")[0] for line in running.stdout if "running on http" in line)
        assert httpx.get(f"{url}/api/next", params={"annotator": "ann"}).json()["task"]["text"] == "text 0"
    finally:
        running.terminate()
        assert running.wait(120) == -signal.SIGTERM  # uvicorn raises the signal again when all is done
        running.stdout.close()
