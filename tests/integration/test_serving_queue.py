"""The queue of the predictor: overload, deadlines, failing models, workers; and what reaches its log."""

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from sodaops.serving.batcher import Batcher
from sodaops.serving.service import ClientDisconnected
from tests.conftest import wait_until
from tests.serving import detail


class Hold:
    """Holds up the model of an application until released."""

    def __init__(self, client):
        self.predictor = client.app.state.service.models.current
        self._run = self.predictor.run
        self.started, self.release = threading.Event(), threading.Event()
        self.predictor.run = self

    def __call__(self, rows):
        self.started.set()
        assert self.release.wait(120)
        return self._run(rows)


def set_deadline(client, deadline_s):
    service = client.app.state.service
    service.settings = service.settings.model_copy(update={"deadline_s": deadline_s})


def test_a_full_queue_and_a_deadline(serve):
    client = serve(max_queue=4, n_workers=1, deadline_s=120)
    batcher = client.app.state.service.batcher
    four = {"texts": ["x"] * 4}
    assert "5 texts" in detail(client.post("/predict/batch", json={"texts": ["x"] * 5}), 422)  # would never fit
    assert len(client.post("/explain", json={"text": "one two three four five"}).json()["spans"]) == 3  # and the whole text
    hold = Hold(client)
    with ThreadPoolExecutor(2) as pool:
        computed = pool.submit(client.post, "/predict/batch", json=four)
        assert hold.started.wait(120)
        waiting = pool.submit(client.post, "/predict/batch", json=four)
        wait_until(lambda: batcher.n_waiting == 4)
        refused = client.get("/predict", params={"text": "x"})
        hold.release.set()
        assert [response.result().status_code for response in (computed, waiting)] == [200, 200]
    assert detail(refused, 429) and int(refused.headers["retry-after"]) >= 1
    assert "sodaops_refused_total 1.0" in client.get("/metrics").text
    hold.release.clear()
    set_deadline(client, 0.2)
    for body in (four, four, {"texts": ["x"]}):  # computed; waiting; in the place of those abandoned
        assert detail(client.post("/predict/batch", json=body), 504)
    hold.release.set()
    set_deadline(client, 120)
    assert client.get("/predict", params={"text": "x"}).status_code == 200
    assert batcher.n_waiting == 0


def test_a_body_that_no_route_reads_does_not_lift_the_deadline(serve):
    client = serve(deadline_s=0.5, max_body_bytes=1000)
    hold = Hold(client)
    response = client.request("GET", "/predict", params={"text": "x"}, content=iter([b"x" * 900] * 3))
    hold.release.set()
    assert response.status_code in (413, 504)


def test_a_client_that_disconnects_is_not_waited_for(serve):
    client = serve(n_workers=1)
    service, hold = client.app.state.service, Hold(client)

    async def disconnected():
        return

    with pytest.raises(ClientDisconnected):
        client.portal.call(service.predict, ["x"] * 3, "one", disconnected, time.perf_counter())
    hold.release.set()
    assert client.get("/predict", params={"text": "x"}).status_code == 200
    metrics = client.get("/metrics").text.splitlines()
    assert [line.split()[1] for line in metrics if line.startswith("sodaops_predictions_total")] == ["1.0"]


def test_one_text_that_fails_fails_alone(serve):
    client = serve(n_workers=1)
    batcher, hold = client.app.state.service.batcher, Hold(client)
    run = hold._run

    def fails_on_one_word(rows):
        if any(len(row) == 3 for row in rows):
            raise RuntimeError("not this one")
        return run(rows)

    def status(text):
        return client.get("/predict", params={"text": text}).status_code

    with ThreadPoolExecutor(5) as pool:
        first = pool.submit(status, "the first")
        assert hold.started.wait(120)
        others = [pool.submit(status, text) for text in ("x", "a longer one", "two longer ones", "three longer ones")]
        wait_until(lambda: batcher.n_waiting == 4)  # they become one batch
        hold.predictor.run = fails_on_one_word
        hold.release.set()
        assert first.result() == 200 and [other.result() for other in others] == [500, 200, 200, 200]


def test_an_unexpected_error_tells_the_client_nothing(serve, capfd):
    client = serve()

    def broken(rows):
        raise RuntimeError("inner matter")

    client.app.state.service.models.current.run = broken
    message = detail(client.get("/predict", params={"text": "secretword"}), 500)
    log = capfd.readouterr().out
    assert "inner" not in message and "inner matter" in log and "batcher.py" in log and "secretword" not in log
    assert [record["level"] for record in map(json.loads, log.splitlines()) if "trace" in record] == ["error"]
    assert client.get("/healthz").status_code == 200


def test_texts_stay_out_of_the_log(serve, capfd):
    client = serve()
    client.get("/predict", params={"text": "secretword"})
    client.post("/predict", json={"text": "secretword"})
    client.post("/predict", json={"text": "secretword" * 10_000})
    client.get("/secretword")
    log = capfd.readouterr().out
    lines = [record for record in map(json.loads, log.splitlines()) if "status" in record]
    assert len(lines) == 4 and "secretword" not in log
    assert {"request_id", "method", "path", "status", "ms", "time", "level"} <= set(lines[0])


def test_without_its_workers_it_is_not_ready(serve):
    client = serve()
    client.app.state.service.batcher.close()
    assert detail(client.get("/readyz"), 503)


@pytest.mark.skipif(not hasattr(os, "getpriority"), reason="no priorities here")
def test_workers_keep_a_lower_priority(monkeypatch):
    set_priority, values = os.setpriority, []
    monkeypatch.setattr(os, "setpriority", lambda which, who, value: values.append(value))

    def start():  # in a thread of its own, whose priority the workers inherit
        set_priority(os.PRIO_PROCESS, threading.get_native_id(), 15)
        Batcher(2, 1, 1, print).close()

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    Batcher(1, 1, 1, print).close()
    assert values == [15, 15, max(5, os.getpriority(os.PRIO_PROCESS, 0))]
