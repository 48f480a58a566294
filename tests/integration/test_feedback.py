"""What the service notes for later: feedback, and what the request log holds of a text."""

import hashlib
import os
import signal
import subprocess
import sys

from sodaops.annotation.store import Store
from sodaops.bundle import layout, reference
from tests.serving import Server
from tests.unit.test_request_log import parts


def test_feedback_joins_the_annotation_store(trained, tmp_path):
    store = tmp_path / "store"
    with Server(trained / "run/bundle", feedback_store=store) as server, server.client() as client:
        request_id = client.post("/predict", json={"text": "so good"}).json()["request_id"]
        assert client.post("/feedback", json={"request_id": request_id, "label": "negative"}).json() == {"noted": True}
        assert client.post("/feedback", json={"request_id": request_id, "label": "positive", "place": 3}).status_code == 200
        refused = client.post("/feedback", json={"request_id": request_id, "label": "fine"})
        assert refused.status_code == 422 and "it has negative, neutral, positive" in refused.json()["detail"]
        for body in (
            {"request_id": "a b", "label": "negative"},
            {"label": "negative"},
            {"request_id": "x", "label": "negative", "place": -1},
        ):
            assert client.post("/feedback", json=body).status_code == 422
        assert 'sodaops_feedback_total{label="negative"} 1.0' in client.get("/metrics").text
        server.signal(signal.SIGKILL)  # what was acknowledged is on the disk
    assert Store(store).feedback_without_task() == {(request_id, 0), (request_id, 3)}
    with Server(trained / "run/bundle") as server, server.client() as client:
        nowhere = client.post("/feedback", json={"request_id": "x", "label": "negative"})
        assert nowhere.status_code == 409 and "set SODAOPS_FEEDBACK_STORE" in nowhere.json()["detail"]


def test_a_feedback_store_with_other_labels_is_refused_at_the_start(trained, tmp_path):
    Store.create(tmp_path / "store", ["bad", "good"])
    env = {"SODAOPS_BUNDLE": str(trained / "run/bundle"), "SODAOPS_FEEDBACK_STORE": str(tmp_path / "store")}
    command = [sys.executable, "-m", "sodaops.serving"]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert all(labels in done.stderr for labels in ("bad, good", "negative, neutral, positive", str(tmp_path / "store")))


def test_logged_texts_are_redacted_and_refused_ones_are_noted(trained, tmp_path):
    text = "mail me at ann&#64;mail.exam\u200bple.org or call 555-867-5309, says @bob"
    with Server(trained / "run/bundle", request_log=tmp_path / "log", log_texts=True, redact='["email", "handle"]') as server:
        with server.client() as client:
            client.post("/predict", json={"text": text})
            assert client.post("/predict/batch", json={"texts": ["good", " \u200b "]}).status_code == 422
        server.signal(signal.SIGTERM)
    rows, cleaned = parts(tmp_path / "log"), "mail me at ann@mail.example.org or call 555-867-5309, says @bob"
    assert rows[0]["text"] == "mail me at <email> or call 555-867-5309, says <handle>"
    assert rows[0]["text_sha256"] == hashlib.sha256(cleaned.encode()).hexdigest()
    assert len(rows[0]["sketch"]) == len(
        reference.read_axes(trained / "run/bundle", layout.read_info(trained / "run/bundle")).axes[0]
    )
    assert (rows[0]["n_chars"], rows[0]["unknown"]) == (len(cleaned), 0)
    assert [(row["label"], row["place"], row["n_chars"]) for row in rows[1:]] == [(None, 1, 0)]
