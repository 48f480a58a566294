import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import onnx
import pytest
from fastapi.testclient import TestClient
from onnx import TensorProto, helper, numpy_helper
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

from sodaops.bundle import layout
from sodaops.config.schema import ServeConfig
from sodaops.errors import ConfigError
from sodaops.inference.predictor import Predictor
from sodaops.registry.registry import Registry
from sodaops.serving.app import create_app
from sodaops.serving.settings import ServeSettings
from tests.conftest import REPO, configured
from tests.serving import Server, copy_bundle, refresh_info, swap_bundle

TEXTS = ["a good day", "the worst day", "so &amp; so"]
JSON = {"content-type": "application/json"}


@pytest.fixture
def bundle(trained, tmp_path):
    return Path(shutil.copytree(trained / "run/bundle", tmp_path / "bundle"))


@pytest.fixture
def serve(bundle):
    """Starts the application in this process."""
    with contextlib.ExitStack() as stack:

        def start(source=bundle, **settings):
            app = create_app(ServeSettings(bundle=str(source), reload_s=None, **settings))
            return stack.enter_context(TestClient(app, raise_server_exceptions=False))

        yield start


@pytest.fixture(scope="module")
def client(trained):
    app = create_app(ServeSettings(bundle=str(trained / "run/bundle"), max_chars=1000, max_texts=8, max_body_bytes=100_000))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def detail(response, status):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    found = response.json()
    assert found["status"] == status and found["request_id"] == response.headers["x-request-id"]
    return found["detail"]


def test_it_answers_as_the_predictor_does(client, trained):
    predictor = Predictor(trained / "run/bundle")
    expected = predictor.predict(TEXTS)
    batch = client.post("/predict/batch", json={"texts": TEXTS}).json()
    assert batch["bundle_version"] == predictor.info.bundle_id
    for text, there, here in zip(TEXTS, batch["predictions"], expected, strict=True):
        for one in (
            there,
            client.get("/predict", params={"text": text}).json(),
            client.get("/predict", params={"review": text}).json(),
            client.post("/predict", json={"text": text}).json(),
        ):
            assert one["label"] == here.label and one["score"] == pytest.approx(here.score, abs=1e-5)
            assert list(one["probs"]) == predictor.info.labels and one["probs"] == pytest.approx(here.probs, abs=1e-5)


def test_request_ids(client):
    given = client.get("/predict", params={"text": "x"}, headers={"x-request-id": "mine-1"})
    assert given.json()["request_id"] == given.headers["x-request-id"] == "mine-1"
    made = [client.get("/healthz", headers={"x-request-id": bad}).headers["x-request-id"] for bad in ("a b", "", "x" * 65)]
    assert all(re.fullmatch("[0-9a-f]{32}", one) for one in made) and len(set(made)) == 3


def test_an_explanation_takes_pieces_out(client, trained):
    text = "I love  this very much"
    found = client.post("/explain", json={"text": text}).json()
    predictor = Predictor(trained / "run/bundle")
    assert "".join(span["text"] for span in found["spans"]) == "I love this very much"
    column = predictor.info.labels.index(found["label"])
    with_it, without = predictor.probs([text, "I this very much"])[:, column]
    assert found["spans"][1] == {"text": "love ", "effect": pytest.approx(with_it - without, abs=1e-5)}
    assert len(client.post("/explain", json={"text": "word " * 150}).json()["spans"]) == 32
    assert len(client.post("/explain", json={"text": "word"}).json()["spans"]) == 1


@pytest.mark.parametrize("cleaning", ["minimal", "letters"])
@pytest.mark.parametrize("text", ["good &amp;nbsp;", "wonderful", "a " * 4000 + "b" * 10_000])
def test_what_is_answered_is_explained_and_logged(serve, bundle, tmp_path, cleaning, text):
    refresh_info(bundle, cleaning=cleaning)
    client = serve(request_log=str(tmp_path / "log"))
    asked = {"text": text}
    answer, explained = (client.post(path, json=asked).json() for path in ("/predict", "/explain"))
    assert explained["label"] == answer["label"] and 1 <= len(explained["spans"]) <= 32
    assert "".join(span["text"] for span in explained["spans"]).strip() == Predictor(bundle).clean(text)
    rows = [json.loads(line) for path in (tmp_path / "log/journal").iterdir() for line in path.read_text().splitlines()]
    assert [row["request_id"] for row in rows] == [answer["request_id"], explained["request_id"]]


def test_what_operates_it(client, trained):
    info = layout.read_info(trained / "run/bundle")
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"ready": True, "bundle_version": info.bundle_id}
    card = client.get("/info").json()
    assert card["labels"] == info.labels and card["metrics"] == info.metrics and card["variant"] == info.default_variant
    assert card["onnx"] == info.onnx and card["previous"] is None
    client.get("/predict", params={"text": "x"})
    assert client.get("/info").json()["recent"]["p95_ms"] > 0
    metrics = client.get("/metrics").text
    for name in (
        'sodaops_requests_total{method="GET",path="/predict",status="200"}',
        'sodaops_request_seconds_bucket{le="0.1",path="/predict"}',
        "sodaops_queue_texts 0.0",
        "sodaops_batch_texts_count",
        "sodaops_requests_in_flight 1.0",
        f'sodaops_bundle_info{{bundle_id="{info.bundle_id}",variant="{info.default_variant}"}} 1.0',
        "sodaops_predictions_total{label=",
        "sodaops_confidence_bucket",
        "process_resident_memory_bytes",
        "process_cpu_seconds_total",
    ):
        assert name in metrics, name
    client.get("/no/such/place")
    assert 'path="other",status="404"' in client.get("/metrics").text


def test_pages_load_nothing_from_outside(client):
    for path in ("/", "/docs"):
        page = client.get(path)
        assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
        for address in re.findall(r"""(?:src|href)=["']([^"']+)["']""", page.text):
            assert address.startswith(("/", "data:", "http://testserver/")) or re.fullmatch("[a-z]+", address), address
            if not address.startswith("data:"):
                assert client.get(address).status_code == 200, address
        assert "connect-src 'self'" in page.headers["content-security-policy"]


@pytest.mark.parametrize(
    ("content", "headers", "status", "says"),
    [
        (b'{"text": ""}', JSON, 422, "text 1 is empty after cleaning"),
        (b'{"text": " \\u200b \\t"}', JSON, 422, "text 1 is empty after cleaning"),
        (b'{"text": "\\u0000\\u0000"}', JSON, 422, "text 1 is empty after cleaning"),
        (b'{"text": "\\ud800"}', JSON, 422, "text 1 is empty after cleaning"),
        (json.dumps({"text": "x" * 1001}).encode(), JSON, 422, "text 1 has 1001 characters; at most 1000 are read"),
        (json.dumps({"text": "x" * 1_000_000}).encode(), JSON, 413, "at most 100000 bytes are read"),
        (b'{"text": "fine"}', {"content-type": "text/plain"}, 422, "body"),
        (b'{"text": "fine"}', {}, 422, "body"),
        (b"", JSON, 422, "body"),
        (b'{"text": "secretword', JSON, 422, "body"),
        (b'{"text": "\xff\xfe"}', JSON, 400, "body"),
        (b"[" * 90_000, JSON, 400, "body"),
        (b'{"text": 1}', JSON, 422, "body.text"),
        (b'{"text": null}', JSON, 422, "body.text"),
        (b'{"text": ["secretword"]}', JSON, 422, "body.text"),
        (b'{"text": "a", "model": "secretword"}', JSON, 422, "body.model"),
        (b'{"txt": "secretword"}', JSON, 422, "body.text"),
        (b'"secretword"', JSON, 422, "body"),
        (b"NaN", JSON, 422, "body"),
        (json.dumps({"text": "a", "k" * 10_000: 1}).encode(), JSON, 422, "body."),
        (json.dumps(dict.fromkeys(map(str, range(5000)), 1)).encode(), JSON, 422, "5000 keys; expected text alone"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_bad_texts_are_refused_and_not_repeated(client, capfd, content, headers, status, says):
    response = client.post("/predict", content=content, headers=headers)
    assert says in detail(response, status) and len(response.content) < 1000
    assert "secretword" not in response.text + capfd.readouterr().out


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        ([], "body.texts"),
        (["x"] * 10_000, "10000 texts; at most 8"),
        (["fine", ""], "text 2 is empty"),
        (["fine", 1], "body.texts.1"),
        ([1] * 5000, "body.texts.0: Input should be a valid string"),
        (["fine", "x" * 1001], "text 2 has 1001"),
    ],
)
def test_bad_batches_are_refused_whole(client, texts, says):
    assert says in detail(client.post("/predict/batch", json={"texts": texts}), 422)


def test_odd_texts_are_answered(client):
    odd = ["a\x00b", "\ud83d\ude00 \udc00 ok", "مرحبا", "😀" * 300, "\u202eabc", "&lt;b&gt;", "x" * 999]
    for text in odd:
        body = json.dumps({"text": text})
        assert client.post("/predict", content=body, headers=JSON).status_code == 200, text
    for query in ("", "?text=a&review=b", "?text=a&text=b", "?text=a&model=b"):
        assert detail(client.get(f"/predict{query}"), 422) == "give text once, or review in its place, and nothing else"


def test_methods_and_places_that_are_not_there(client):
    assert client.put("/predict").headers["allow"] == "GET, POST"
    assert detail(client.get("/predict/batch"), 405) and detail(client.get("/admin"), 404)
    assert detail(client.get("/../../etc/passwd"), 404)


def test_headers(client, serve):
    headers = client.get("/predict", params={"text": "x"}, headers={"origin": "http://evil.example"}).headers
    assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
    assert "default-src 'none'" in headers["content-security-policy"] and headers["cache-control"] == "no-store"
    assert "access-control-allow-origin" not in headers and "server" not in headers
    open_to = serve(cors_origins=["http://friend.example"], api_keys=["one"])
    ask = {
        "origin": "http://friend.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "x-api-key",
    }
    assert open_to.options("/predict", headers=ask).status_code == 200
    for origin, allowed in (("http://friend.example", "http://friend.example"), ("http://evil.example", None)):
        answer = open_to.get("/healthz", headers={"origin": origin})
        assert answer.headers.get("access-control-allow-origin") == allowed


def test_keys(serve):
    client = serve(api_keys=["one", "two"], admin_keys=["root"])
    right = [{"x-api-key": "one"}, {"x-api-key": "two"}, {"authorization": "Bearer two"}, {"x-api-key": "root"}]
    wrong = [{}, {"x-api-key": "three"}, {"x-api-key": ""}, {"authorization": "Bearer"}, {"authorization": "Basic one"}]
    for path in ("/predict?text=x", "/info", "/metrics"):
        assert [client.get(path, headers=headers).status_code for headers in right] == [200] * 4
        for headers in wrong:
            refused = client.get(path, headers=headers)
            assert "wrong or missing key" in detail(refused, 401) and refused.headers["www-authenticate"] == "Bearer"
    for path in ("/", "/healthz", "/readyz", "/docs", "/openapi.json"):
        assert client.get(path).status_code == 200
    for headers in (*right[:3], *wrong):
        assert "admin key" in detail(client.post("/admin/reload", headers=headers), 401)
    assert client.post("/admin/reload", headers=right[3]).json()["changed"] is False
    assert "SODAOPS_ADMIN_KEYS" in detail(serve().post("/admin/reload"), 403)


def test_a_fault_of_ours_tells_the_client_nothing(serve, capfd):
    client = serve()

    def broken(rows):
        raise RuntimeError("inner matter")

    client.app.state.service.models.current.run = broken
    said = detail(client.get("/predict", params={"text": "secretword"}), 500)
    log = capfd.readouterr().out
    assert "inner" not in said and "inner matter" in log and "batcher.py" in log and "secretword" not in log
    records = [json.loads(line) for line in log.splitlines()]
    assert [r["level"] for r in records if "trace" in r] == ["error"]
    assert client.get("/healthz").status_code == 200


def test_texts_stay_out_of_the_log(serve, capfd):
    client = serve()
    client.get("/predict", params={"text": "secretword"})
    client.post("/predict", json={"text": "secretword"})
    client.post("/predict", json={"text": "secretword" * 10_000})
    client.get("/secretword")
    log = capfd.readouterr().out
    answered = [record for record in map(json.loads, log.splitlines()) if record["message"] == "answered"]
    assert len(answered) == 4 and "secretword" not in log
    assert {"request_id", "method", "path", "status", "ms", "time", "level"} <= set(answered[0])


def test_a_full_queue_and_a_deadline(serve):
    client = serve(max_queue=4, n_workers=1, deadline_s=2)
    batcher, predictor = client.app.state.service.batcher, client.app.state.service.models.current
    quick, begun, go_on = predictor.run, threading.Event(), threading.Event()

    def held(rows):
        begun.set()
        go_on.wait(60)
        return quick(rows)

    assert "5 texts; at most 4" in detail(client.post("/predict/batch", json={"texts": ["x"] * 5}), 422)  # it never fits
    assert len(client.post("/explain", json={"text": "one two three four five"}).json()["spans"]) == 3  # and the whole text
    predictor.run = held
    with ThreadPoolExecutor(2) as pool:
        ask = functools.partial(pool.submit, client.post, "/predict/batch", json={"texts": ["x"] * 4})
        computed = ask()
        assert begun.wait(30)
        waiting = ask()
        while batcher.n_waiting < 4:
            time.sleep(0.01)
        refused = client.get("/predict", params={"text": "x"})
        assert [one.result().status_code for one in (computed, waiting)] == [504, 504]
    assert "too many texts wait" in detail(refused, 429) and int(refused.headers["retry-after"]) >= 1
    assert "sodaops_refused_total 1.0" in client.get("/metrics").text
    # those that were given up hold no place
    assert "before the deadline" in detail(client.get("/predict", params={"text": "x"}), 504)
    predictor.run = quick
    go_on.set()
    assert client.get("/predict", params={"text": "x"}).status_code == 200
    assert batcher.n_waiting == 0


def test_a_body_that_is_not_asked_for_does_not_lift_the_deadline(serve):
    client = serve(deadline_s=0.5, max_body_bytes=1000)
    client.app.state.service.models.current.run = lambda rows: time.sleep(3)
    began = time.perf_counter()
    answer = client.request("GET", "/predict", params={"text": "x"}, content=iter([b"x" * 900] * 3))
    assert answer.status_code in (413, 504) and time.perf_counter() - began < 2


def test_one_text_that_fails_fails_alone(serve):
    client = serve(n_workers=1)
    predictor = client.app.state.service.models.current
    whole = predictor.run

    def picky(rows):
        time.sleep(0.1)
        if any(len(row) == 3 for row in rows):
            raise RuntimeError("not this one")
        return whole(rows)

    predictor.run = picky
    texts = ["x", "a longer one", "two longer ones", "three longer ones"]
    with ThreadPoolExecutor(4) as pool:
        statuses = list(pool.map(lambda text: client.get("/predict", params={"text": text}).status_code, texts))
    assert statuses == [500, 200, 200, 200]


def test_under_a_prefix(serve, bundle):
    app = create_app(ServeSettings(bundle=str(bundle), reload_s=None, admin_keys=["root"], api_keys=["user"]))
    with TestClient(app, root_path="/api") as client:
        user = {"x-api-key": "user"}
        assert client.get("/api/healthz").status_code == 200
        assert "admin" in detail(client.post("/api/admin/reload", headers=user), 401)
        assert client.post("/api/admin/reload", headers={"x-api-key": "root"}).status_code == 200
        assert client.get("/api/predict", params={"text": "x"}, headers=user).status_code == 200
        assert client.put("/api/predict", headers=user).headers["allow"] == "GET, POST"
        assert 'path="/predict"' in client.get("/api/metrics", headers=user).text
        assert "script-src" in client.get("/api/").headers["content-security-policy"]


def test_without_its_threads_it_is_not_ready(serve):
    client = serve()
    client.app.state.service.batcher.close()
    assert "started anew" in detail(client.get("/readyz"), 503)


@pytest.mark.skipif(not hasattr(os, "getpriority"), reason="no priorities here")
def test_a_low_priority_is_kept(bundle):
    code = (
        "import os; os.nice(15); from sodaops.serving.batcher import Batcher; import time; "
        "b = Batcher(1, 1, 1, print); time.sleep(0.2); b.check(); "
        "print(os.getpriority(os.PRIO_PROCESS, b._threads[0].native_id))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO).stdout == "15\n"


def test_reload_and_roll_back(serve, bundle, tmp_path):
    key = {"x-api-key": "root"}
    client = serve(admin_keys=["root"])

    def version():
        return client.get("/predict", params={"text": "x"}).json()["bundle_version"]

    first = version()
    assert "nothing to roll back to" in detail(client.post("/admin/rollback", headers=key), 409)
    swap_bundle(bundle, copy_bundle(bundle, tmp_path / "second"))
    assert version() == first
    assert client.post("/admin/reload", headers=key).json()["changed"] is True
    second = version()
    assert second != first and client.get("/info").json()["previous"] == first
    assert client.post("/admin/rollback", headers=key).json() == {"changed": True, "bundle_version": first}
    assert "nothing to roll back to" in detail(client.post("/admin/rollback", headers=key), 409)
    assert version() == first
    assert client.portal.call(client.app.state.service.models.reload) is False, "what was rolled back comes back by itself"
    assert client.post("/admin/reload", headers=key).json()["changed"] is True
    assert version() == second


def test_a_new_bundle_is_found_by_itself(bundle, tmp_path):
    app = create_app(ServeSettings(bundle=str(bundle), reload_s=0.05))
    with TestClient(app) as client:
        first = client.get("/readyz").json()["bundle_version"]
        swap_bundle(bundle, copy_bundle(bundle, tmp_path / "second"))
        until = time.monotonic() + 10
        while client.get("/readyz").json()["bundle_version"] == first:
            assert time.monotonic() < until
            time.sleep(0.05)


def test_a_champion_takes_over_and_is_taken_back(bundle, tmp_path):
    registry = Registry(str(tmp_path / "registry"))
    first, second = (registry.register(one) for one in (bundle, copy_bundle(bundle, tmp_path / "second")))
    source = f"{registry.root}@champion"
    with pytest.raises(SystemExit), TestClient(create_app(ServeSettings(bundle=source))):
        pytest.fail("it started without a champion")
    registry.move("champion", first, None, "")
    with TestClient(create_app(ServeSettings(bundle=source, reload_s=0.05))) as client:

        def wait_for(version):
            until = time.monotonic() + 10
            while client.get("/predict", params={"text": "x"}).json()["bundle_version"] != version:
                assert time.monotonic() < until
                time.sleep(0.05)

        wait_for(first)
        registry.move("champion", second, first, "")
        wait_for(second)
        registry.roll_back("worse")
        wait_for(first)


def test_a_bundle_that_is_being_copied_is_tried_again(bundle, tmp_path):
    fresh = copy_bundle(bundle, tmp_path / "second")
    app = create_app(ServeSettings(bundle=str(bundle), reload_s=0.05))
    with TestClient(app) as client:
        first = client.get("/readyz").json()["bundle_version"]
        (bundle / "tokenizer.json").write_text("half")
        shutil.copy(fresh / "bundle.json", bundle / "bundle.json")
        until = time.monotonic() + 10
        while 'outcome="refused"' not in client.get("/metrics").text:
            assert time.monotonic() < until
            time.sleep(0.05)
        assert client.get("/readyz").json()["bundle_version"] == first
        shutil.copytree(fresh, bundle, dirs_exist_ok=True)
        while client.get("/readyz").json()["bundle_version"] == first:
            assert time.monotonic() < until
            time.sleep(0.05)


def escaping(folder):
    """A model whose weights would lie outside the bundle."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../../outside.bin")
    names = [helper.make_tensor_value_info(name, TensorProto.INT64, ["a", "b"]) for name in ("input_ids", "attention_mask")]
    outs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("logits", "embeddings")]
    nodes = [helper.make_node("Identity", ["w"], [name]) for name in ("logits", "embeddings")]
    graph = helper.make_graph(nodes, "g", names, outs, [tensor])
    (folder.parent.parent / "outside.bin").write_bytes(np.ones(2, np.float32).tobytes())
    for name in json.loads((folder / layout.INFO).read_text())["onnx"]:
        (folder / layout.ONNX[name]).write_bytes(helper.make_model(graph).SerializeToString())
    refresh_info(folder)


def other_model(folder):
    model = onnx.load(folder / layout.ONNX["float32"])
    model.graph.output[0].name = "scores"
    model.graph.node[[node.output[0] for node in model.graph.node].index("logits")].output[0] = "scores"
    for name in json.loads((folder / layout.INFO).read_text())["onnx"]:
        onnx.save(model, folder / layout.ONNX[name])
    refresh_info(folder)


def failing(folder):
    """Reads the 200th column of a text that has none."""
    model = onnx.load(folder / layout.ONNX["float32"])
    model.graph.initializer.append(numpy_helper.from_array(np.array([200]), "far"))
    model.graph.node.insert(0, helper.make_node("Gather", ["input_ids", "far"], ["nothing"], axis=1))
    model.graph.node.insert(1, helper.make_node("Add", ["input_ids", "nothing"], ["ids"]))
    for node in list(model.graph.node)[2:]:
        node.input[:] = ["ids" if name == "input_ids" else name for name in node.input]
    for name in json.loads((folder / layout.INFO).read_text())["onnx"]:
        onnx.save(model, folder / layout.ONNX[name])
    refresh_info(folder)


def edit(**changes):
    def change(folder):
        info = json.loads((folder / layout.INFO).read_text())
        (folder / layout.INFO).write_text(json.dumps({**info, **changes}))

    return change


def listed(name):
    def change(folder):
        (folder / "evil.pkl").write_bytes(b"\x80\x04.")
        info = json.loads((folder / layout.INFO).read_text())
        info["files"][name] = "0" * 64
        info["bundle_id"] = layout.compute_bundle_id(info["files"], **layout._answers(info))
        (folder / layout.INFO).write_text(json.dumps(info))

    return change


def cut(name):
    def change(folder):
        path = folder / (name or layout.ONNX[layout.read_info(folder).default_variant])
        path.write_bytes(path.read_bytes()[:-100])

    return change


BROKEN = {
    "corrupt model": (cut(None), "has been changed"),
    "corrupt tokenizer": (cut("tokenizer.json"), "tokenizer.json has been changed"),
    "half copied": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "half a bundle.json": (cut("bundle.json"), "damaged"),
    "no bundle.json": (lambda folder: (folder / "bundle.json").unlink(), "no bundle.json"),
    "wrong types": (edit(max_tokens="many"), "max_tokens"),
    "other labels": (edit(labels=["a", "b", "c"]), "bundle.json has been changed"),
    "path that escapes": (listed("../../etc/passwd"), "is no file of a bundle"),
    "pickle": (listed("evil.pkl"), "'evil.pkl' is no file of a bundle"),
    "weights that escape": (escaping, "ONNX Runtime refuses the model"),
    "another model": (other_model, "other inputs and outputs"),
    "another cleaning": (lambda folder: refresh_info(folder, cleaning="tweets_v2"), "does not answer"),
    "a graph that fails": (failing, "does not answer"),
    "no model": (lambda folder: refresh_info(folder, onnx={}), "holds no ONNX model"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_bundle_is_refused_and_the_old_one_goes_on(serve, bundle, tmp_path, how):
    change, says = BROKEN[how]
    client = serve(admin_keys=["root"])
    first = client.get("/readyz").json()["bundle_version"]
    broken = copy_bundle(bundle, tmp_path / "deep/down/broken")
    change(broken)
    client.app.state.service.models.source = str(broken)
    assert says in detail(client.post("/admin/reload", headers={"x-api-key": "root"}), 409)
    answer = client.get("/predict", params={"text": "x"})
    assert answer.status_code == 200 and answer.json()["bundle_version"] == first
    with pytest.raises(SystemExit, match="2"):
        create_app(ServeSettings(bundle=str(broken)))


def test_conf_serve_is_the_settings_defaults(trained):
    assert configured().serve == ServeConfig()
    assert ServeSettings(bundle="b").model_dump(exclude={"bundle", "api_keys", "admin_keys"}) == ServeConfig().model_dump()


@pytest.mark.parametrize(
    ("variables", "port"),
    [({}, 8000), ({"PORT": "9000"}, 9000), ({"PORT": "9000", "SODAOPS_PORT": "9001"}, 9001)],
)
def test_whose_port_it_is(monkeypatch, variables, port):
    for name in ("PORT", "SODAOPS_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert ServeSettings(bundle="b").port == port
    monkeypatch.setenv("PORT", "http")
    if "SODAOPS_PORT" not in variables:
        with pytest.raises(ConfigError, match="^PORT=http: input should be a valid integer"):
            ServeSettings(bundle="b")


def test_arguments_are_refused():
    with pytest.raises(ConfigError, match=r"'max_queue=9': the service takes no arguments; .* variables: SODAOPS_PORT=8000"):
        ServeSettings.from_environment(["max_queue=9"])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "SODAOPS_BUNDLE is missing"),
        (
            {"SODAOPS_BUNDLE": "/no/where"},
            "BundleError: /no/where: no bundle.json here; expected a folder that training wrote (RUN/bundle).\n"
            "SODAOPS_BUNDLE says which bundle to serve: a folder, gs://BUCKET/FOLDER or REGISTRY@ALIAS.",
        ),
        (
            {"SODAOPS_BUNDLE": "b", "SODAOPS_MAX_QUEU": "1"},
            "SODAOPS_MAX_QUEU is no setting of the service (did you mean",
        ),
        ({"SODAOPS_BUNDLE": "b", "SODAOPS_MAX_QUEUE": "none"}, "SODAOPS_MAX_QUEUE=none: input should be a valid integer"),
        ({"SODAOPS_BUNDLE": "b", "SODAOPS_PORT": "-1"}, "SODAOPS_PORT=-1: input should be greater"),
        ({"SODAOPS_BUNDLE": "b", "SODAOPS_VARIANT": "int4"}, "SODAOPS_VARIANT=int4: input should be 'float32' or 'int8'"),
        ({"SODAOPS_BUNDLE": "b", "SODAOPS_CORS_ORIGINS": "x"}, "SODAOPS_CORS_ORIGINS"),
        ({"SODAOPS_REQUEST_LOG": "gs://b/log"}, "SODAOPS_JOURNAL_DIR is missing"),
        ({"SODAOPS_REQUEST_LOG": "/dev/null/x"}, "StorageError: /dev/null/x/journal: cannot hold"),
    ],
)
@pytest.mark.slow
def test_faulty_settings_end_with_2(trained, settings, says):
    if "SODAOPS_REQUEST_LOG" in settings:
        settings = {**settings, "SODAOPS_BUNDLE": str(trained / "run/bundle")}
    commands = [["-m", "sodaops.serving"]]
    if "did you mean" in says:
        commands.append(["-m", "uvicorn", "sodaops.serving.app:create_app", "--factory"])
    for command in commands:
        done = subprocess.run(
            [sys.executable, *command], env={**os.environ, **settings}, cwd=REPO, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_spans_reach_a_collector_without_texts(trained, monkeypatch):
    received = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            received.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        with Server(trained / "run/bundle") as server, server.client() as client:
            client.get("/predict", params={"text": "secretword"}, headers={"x-request-id": "one"})
            client.post("/predict", json={"text": 5, "secretword": "secretword"})
        collector.shutdown()
    requests = [trace_service_pb2.ExportTraceServiceRequest.FromString(body) for body in received]
    spans = [s for r in requests for resource in r.resource_spans for scope in resource.scope_spans for s in scope.spans]
    found = {span.name: {a.key: a.value for a in span.attributes} for span in spans}
    assert found.keys() == {"GET /predict", "POST /predict"}
    assert found["GET /predict"]["request_id"].string_value == "one"
    assert found["POST /predict"]["http.response.status_code"].int_value == 422
    assert not any(b"secretword" in body for body in received)


def test_a_collector_without_its_package(trained, monkeypatch, capsys):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace.export", None)
    with pytest.raises(SystemExit) as ended:
        create_app(ServeSettings(bundle=str(trained / "run/bundle")))
    assert ended.value.code == 2 and "pip install 'sodaops[otel]'" in capsys.readouterr().err
