"""The annotation service in a process of its own, and the verb."""

import json
import signal
import subprocess
import sys
import threading

import httpx
import pytest

from sodaops.annotation.store import Store
from sodaops.cli import main
from sodaops.config.schema import AnnotateConfig
from tests.annotation import CODE, LABELS, Server, store_of, task
from tests.conftest import REPO, configured


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "store"


def body(name, label, annotator="ann", session=CODE):
    return {"annotator": annotator, "session": session, "task": name, "label": label}


def test_a_session_of_answers_skip_and_undo(folder):
    names = [one.task for one in store_of(folder, 3).state().tasks]
    with Server(folder) as server, server.client() as client:
        assert client.get("/healthz").json() == {"status": "ok"}
        first = client.get("/api/next", params={"annotator": "ann"}).json()
        assert first == {
            "task": {"task": names[0], "text": "text 0"}, "labels": LABELS, "n_tasks": 3, "n_answered": 0, "n_labelled": 0,
            "n_skipped": 0, "agreements": [],
        }  # fmt: skip
        second = client.post("/api/answer", json=body(names[0], "neutral")).json()
        assert (second["task"]["text"], second["n_labelled"], second["n_answered"]) == ("text 1", 1, 1)
        third = client.post("/api/answer", json=body(names[1], None)).json()
        assert (third["task"]["text"], third["n_labelled"], third["n_skipped"], third["n_answered"]) == ("text 2", 1, 1, 1)
        back = client.post("/api/undo", json={"annotator": "ann", "session": CODE}).json()
        assert (back["task"]["text"], back["n_skipped"]) == ("text 1", 0)
        back = client.post("/api/undo", json={"annotator": "ann", "session": CODE, "task": names[0]}).json()
        assert (back["task"]["text"], back["n_labelled"]) == ("text 0", 0)
        nothing = client.post("/api/undo", json={"annotator": "ann", "session": CODE})
        assert (nothing.status_code, nothing.headers["content-type"]) == (422, "application/problem+json")
        assert "no answer in this session" in nothing.json()["detail"]
        for name in names:
            last = client.post("/api/answer", json=body(name, "positive")).json()
        assert last["task"] is None and last["n_labelled"] == 3
        assert client.get("/api/next", params={"annotator": "ben"}).json()["task"]["text"] == "text 0"
        assert server.stop() == -signal.SIGTERM  # uvicorn raises the signal again when all is done
    logged = "".join(server.lines)
    assert "text 0" not in logged and '"path": "/api/answer"' in logged


def test_what_the_model_said_is_not_told(folder):
    store = Store.create(folder, LABELS)
    store.add_tasks("some", [task("one", label="neutral", score=0.41, probs={"neutral": 0.41}, bundle_id="b1")])
    with Server(folder) as server, server.client() as client:
        found = client.get("/api/next", params={"annotator": "ann"}).json()
        assert found["task"] == {"task": store.state().tasks[0].task, "text": "one"} and "0.41" not in json.dumps(found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": "positve"}, "label='positve'; expected one of negative, neutral, positive (did you mean positive?)"),
        ({"label": 1}, "body.label"),
        ({"task": "0" * 16}, "no such task"),
        ({"annotator": "  "}, "expected a name of 1 to 60 characters"),
        ({"session": "../../x"}, "expected 8 to 32 hexadecimal digits"),
        ({"more": 1}, "body.more"),
    ],
)
def test_an_answer_that_cannot_be_one(folder, changes, message):
    (one,) = store_of(folder, 1).state().tasks
    with Server(folder) as server, server.client() as client:
        refused = client.post("/api/answer", json={**body(one.task, "neutral"), **changes})
        assert refused.status_code == 422 and message in refused.json()["detail"], refused.text
        missing = client.post("/api/answer", json={"annotator": "ann", "session": CODE, "task": one.task})
        assert missing.status_code == 422 and "body.label: Field required" in missing.json()["detail"]
        assert client.get("/api/next", params={"annotator": ""}).status_code == 422
        assert client.get("/api/nothing").status_code == 404 and client.get("/api/answer").status_code == 405
        assert client.post("/api/answer", content=b"x" * 70_000).status_code == 413
    assert Store(folder).state().answers == {} and not (folder / "answers").exists()


def test_keys_and_headers(folder):
    store_of(folder, 1)
    with Server(folder, API_KEYS="one,two") as server, server.client() as client:
        page = client.get("/")
        assert page.status_code == 200 and "connect-src 'self'" in page.headers["content-security-policy"]
        assert page.headers["x-content-type-options"] == "nosniff"
        asked = {"url": "/api/next", "params": {"annotator": "ann"}}
        assert client.get(**asked).status_code == 401
        assert client.get(**asked, headers={"x-api-key": "three"}).status_code == 401
        assert client.get(**asked, headers={"x-api-key": "two"}).status_code == 200
        assert client.get(**asked, headers={"authorization": "Bearer one"}).status_code == 200
        assert client.post("/api/answer", json=body("x", None)).status_code == 401
        assert client.get("/healthz").status_code == 200


def test_kill_9_loses_no_acknowledged_answer(folder):
    """Six annotators answer as fast as they can; the server is killed in the middle, started anew, and they go on."""
    names = [one.task for one in store_of(folder, 400).state().tasks]
    acknowledged = []

    def work(url, annotator, code, start):
        with httpx.Client(base_url=url, timeout=10) as client:
            for n, name in enumerate(names[start:], start):
                label = LABELS[n % 3]
                try:
                    answer = client.post("/api/answer", json=body(name, label, annotator, code))
                except httpx.HTTPError:
                    return
                assert answer.status_code == 200
                acknowledged.append((annotator, name, label))

    for round_ in range(2):
        server = Server(folder)
        threads = [
            threading.Thread(target=work, args=(server.url, f"a{n}", f"{n:08x}", 200 * round_), daemon=True) for n in range(6)
        ]
        for thread in threads:
            thread.start()
        while len(acknowledged) < 150 * (round_ + 1):
            threading.Event().wait(0.005)
        assert server.stop(signal.SIGKILL) == -signal.SIGKILL
        for thread in threads:
            thread.join(20)
    state = Store(folder).state()
    assert len(acknowledged) >= 300 and state.damaged == []
    missing = [entry for entry in acknowledged if state.answers.get(entry[1], {}).get(entry[0]) != entry[2]]
    assert missing == []
    assert sum(state.progress().labelled.values()) - len(acknowledged) <= 12  # those on their way when it was killed


def test_two_servers_on_one_store(folder):
    names = [one.task for one in store_of(folder, 4).state().tasks]
    with Server(folder) as one, Server(folder) as two, one.client() as ours, two.client() as theirs:
        for n, name in enumerate(names):
            assert ours.post("/api/answer", json=body(name, "neutral" if n else "negative", "ann")).status_code == 200
            found = theirs.post("/api/answer", json=body(name, "neutral", "ben", "f" * 16)).json()
        assert found["agreements"] == [{"annotator": "ann", "n_shared": 4, "raw": 0.75, "kappa": 0.0}]
        found = ours.get("/api/next", params={"annotator": "ann"}).json()
        assert found["agreements"] == [{"annotator": "ben", "n_shared": 4, "raw": 0.75, "kappa": 0.0}]
        # the same page, of which a load balancer sends one call here and the next one there
        back = theirs.post("/api/undo", json={"annotator": "ann", "session": CODE}).json()
        assert back["task"]["text"] == "text 3"
        assert theirs.post("/api/answer", json=body(names[3], "positive", "ann")).status_code == 200
        back = ours.post("/api/undo", json={"annotator": "ann", "session": CODE, "task": names[3]}).json()
        assert back["task"]["text"] == "text 3" and back["n_labelled"] == 3
    assert len(list((folder / "answers").iterdir())) == 3
    state = Store(folder).state()
    assert state.progress() == (4, 4, {"ann": 3, "ben": 4}, {}) and [c.text for c in state.conflicts()] == ["text 0"]


def test_the_service_alone_has_the_settings_of_conf():
    assert configured().annotate == AnnotateConfig()


def test_settings_that_cannot_be(folder, tmp_path):
    command = [sys.executable, "-m", "sodaops.annotation"]
    done = subprocess.run(command, env={"SODAOPS_ANNOTATE_STORE": str(folder)}, capture_output=True, text=True)
    assert done.returncode == 2 and "no annotation store, no such folder" in done.stderr and "Traceback" not in done.stderr
    done = subprocess.run(command, env={"SODAOPS_ANNOTATE_STOR": "x"}, capture_output=True, text=True)
    assert done.returncode == 2 and "SODAOPS_ANNOTATE_STOR is no setting" in done.stderr


def test_the_verb(folder, capsys, tmp_path):
    texts = tmp_path / "texts.csv"
    texts.write_text("text,label,annotator\none,neutral,ann\none,positive,ben\ntwo,neutral,ann\ntwo,neutral,ben\nthree,,\n")
    here = f"annotate.store={folder}"
    assert main(["annotate", "status", here]) == 2 and "no annotation store" in capsys.readouterr().err
    assert main(["annotate", "import", str(texts), here]) == 0  # the labels are those of data=tweets
    assert capsys.readouterr().out == f"{folder}: 3 new texts, 4 new answers\n"
    assert main(["annotate", "status", here]) == 0
    name = task("one")["text_sha256"][:16]
    assert capsys.readouterr().out.splitlines() == [
        f"{folder}: 3 texts, 2 with a label (negative, neutral, positive)",
        f"{'ann':<24}      2 labelled      0 skipped",
        f"{'ben':<24}      2 labelled      0 skipped",
        "ann and ben: 50 % of 2 shared texts alike, kappa 0.00",
        f"conflict: {name}: ann neutral, ben positive",
    ]
    assert main(["annotate", "export", str(tmp_path / "out.json"), here]) == 0
    assert "out.xml: the labeling config" in capsys.readouterr().out and (tmp_path / "out.xml").is_file()
    assert main(["annotate", "exprot"]) == 2 and "did you mean export?" in capsys.readouterr().err
    assert main(["annotate", "status", "annotate.stor=x"]) == 2 and "did you mean store?" in capsys.readouterr().err


def test_the_verb_serves(folder):
    store_of(folder, 1)
    command = [sys.executable, "-m", "sodaops.cli", "annotate", "serve", str(folder), "annotate.port=0"]
    running = subprocess.Popen(command, cwd=REPO, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        url = next(line.split("running on ")[1].split(" ")[0] for line in running.stdout if "running on http" in line)
        assert httpx.get(f"{url}/api/next", params={"annotator": "ann"}).json()["task"]["text"] == "text 0"
    finally:
        running.terminate()
        assert running.wait(30) == -signal.SIGTERM
        running.stdout.close()
