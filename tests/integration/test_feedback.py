"""What the predictor keeps for later: feedback, and the request log's rows of a text."""

import hashlib

import pytest

from sodaops.annotation.store import Store
from sodaops.bundle import layout, reference
from tests.serving import detail
from tests.unit.test_request_log import parts


def test_feedback_joins_the_annotation_store(serve, client, tmp_path):
    store = tmp_path / "store"
    with_store = serve(feedback_store=str(store))
    request_id = with_store.post("/predict", json={"text": "so good"}).json()["request_id"]
    assert with_store.post("/feedback", json={"request_id": request_id, "label": "negative"}).json() == {"noted": True}
    assert Store(store).feedback_without_task() == {(request_id, 0)}  # on disk when acknowledged
    for never in ({"request_id": "never"}, {"request_id": request_id, "place": 1}):
        assert "request_id" in detail(with_store.post("/feedback", json={"label": "negative", **never}), 404)
    refused = detail(with_store.post("/feedback", json={"request_id": request_id, "label": "fine"}), 422)
    assert "label" in refused and "negative, neutral, positive" in refused
    for body in (
        {"request_id": "a b", "label": "negative"},
        {"label": "negative"},
        {"request_id": "x", "label": "negative", "place": -1},
    ):
        assert detail(with_store.post("/feedback", json=body), 422)
    assert 'sodaops_feedback_total{label="negative"} 1.0' in with_store.get("/metrics").text
    body = {"request_id": "x", "label": "negative"}
    assert "SODAOPS_FEEDBACK_STORE" in detail(client.post("/feedback", json=body), 409)


def test_feedback_on_earlier_requests_is_looked_up_in_the_log(serve, tmp_path):
    settings = {"feedback_store": str(tmp_path / "store"), "request_log": str(tmp_path / "log")}
    for before in ("in a part", "in the journal"):  # of another process
        earlier = serve(request_log=settings["request_log"])
        request_id = earlier.post("/predict/batch", json={"texts": [before, "b"]}).json()["request_id"]
        if before == "in a part":
            earlier.__exit__()
        client = serve(**settings)
        for place, status in ((1, 200), (2, 404)):
            body = {"request_id": request_id, "place": place, "label": "negative"}
            assert client.post("/feedback", json=body).status_code == status
        client.__exit__()
    client = serve(feedback_store=settings["feedback_store"])
    made_up = [client.post("/feedback", json={"request_id": f"r{n}", "label": "negative"}) for n in range(40)]
    assert {answer.status_code for answer in made_up[:10]} == {404} and 429 in {answer.status_code for answer in made_up}
    assert client.post("/predict", json={"text": "good"}).status_code == 200


def test_a_feedback_store_with_other_labels_is_refused_at_the_start(serve, tmp_path, capsys):
    Store.create(tmp_path / "store", ["bad", "good"])
    with pytest.raises(SystemExit, match="2"):
        serve(feedback_store=str(tmp_path / "store"))
    printed = capsys.readouterr().err
    assert printed.startswith("DataError: ")
    assert all(part in printed for part in (str(tmp_path / "store"), "bad, good", "negative, neutral, positive"))


def test_logged_texts_are_redacted_and_refused_ones_are_noted(serve, bundle, tmp_path):
    text = "mail me at ann&#64;mail.exam\u200bple.org or call 555-867-5309, says @bob"
    client = serve(request_log=str(tmp_path / "log"), log_texts=True, redact=["email", "handle"])
    client.post("/predict", json={"text": text})
    assert client.post("/predict/batch", json={"texts": ["good", " \u200b "]}).status_code == 422
    client.__exit__()
    rows, cleaned = parts(tmp_path / "log"), "mail me at ann@mail.example.org or call 555-867-5309, says @bob"
    assert rows[0]["text"] == "mail me at <email> or call 555-867-5309, says <handle>"
    assert rows[0]["text_sha256"] == hashlib.sha256(cleaned.encode()).hexdigest()
    assert len(rows[0]["sketch"]) == len(reference.read_axes(bundle, layout.read_info(bundle)).axes[0])
    assert (rows[0]["n_chars"], rows[0]["unknown"]) == (len(cleaned), 0)
    assert [(row["label"], row["place"], row["n_chars"]) for row in rows[1:]] == [(None, 1, 0)]
