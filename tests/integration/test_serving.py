"""Routes of the predictor: predictions, refusals, keys, pages, headers."""

import json
import re

import pytest

from sodaops.bundle import layout
from sodaops.inference.predictor import Predictor
from tests.serving import detail, refresh_info

TEXTS = ["a good day", "the worst day", "so &amp; so"]
JSON = {"content-type": "application/json"}


def test_it_answers_as_the_predictor_does(client, trained):
    predictor = Predictor(trained / "run/bundle")
    expected = predictor.predict(TEXTS)
    batch = client.post("/predict/batch", json={"texts": TEXTS}).json()
    assert batch["bundle_version"] == predictor.info.bundle_id
    for text, from_batch, prediction in zip(TEXTS, batch["predictions"], expected, strict=True):
        for answer in (
            from_batch,
            client.get("/predict", params={"text": text}).json(),
            client.get("/predict", params={"review": text}).json(),
            client.post("/predict", json={"text": text}).json(),
        ):
            assert answer["label"] == prediction.label and answer["score"] == pytest.approx(prediction.score, abs=1e-5)
            assert list(answer["probs"]) == predictor.info.labels
            assert answer["probs"] == pytest.approx(prediction.probs, abs=1e-5)


@pytest.mark.parametrize("text", ["\u0301", "\ufe0f\u0301 \u0301"])  # accents without letters: the tokenizer drops them
def test_a_text_without_tokens_is_an_empty_one(client, trained, text):
    assert Predictor(trained / "run/bundle").clean(text)
    empty = detail(client.post("/predict", json={"text": " "}), 422)
    assert detail(client.get("/predict", params={"text": text}), 422) == empty
    assert detail(client.post("/predict", json={"text": text}), 422) == empty
    assert detail(client.post("/explain", json={"text": text}), 422) == empty
    assert "text 2" in detail(client.post("/predict/batch", json={"texts": ["good", text]}), 422)


def test_request_ids(client):
    response = client.get("/predict", params={"text": "x"}, headers={"x-request-id": "own-1"})
    assert response.json()["request_id"] == response.headers["x-request-id"] == "own-1"
    made = [client.get("/healthz", headers={"x-request-id": bad}).headers["x-request-id"] for bad in ("a b", "", "x" * 65)]
    assert all(re.fullmatch("[0-9a-f]{32}", one) for one in made) and len(set(made)) == 3


def test_an_explanation_takes_pieces_out(client, trained):
    text = "I love  this very much"
    explained = client.post("/explain", json={"text": text}).json()
    predictor = Predictor(trained / "run/bundle")
    assert "".join(span["text"] for span in explained["spans"]) == "I love this very much"
    column = predictor.info.labels.index(explained["label"])
    with_it, without = predictor.probs([text, "I this very much"])[:, column]
    assert explained["spans"][1] == {"text": "love ", "effect": pytest.approx(with_it - without, abs=1e-5)}
    assert len(client.post("/explain", json={"text": "word " * 150}).json()["spans"]) == 32
    assert len(client.post("/explain", json={"text": "word"}).json()["spans"]) == 1


@pytest.mark.parametrize("cleaning", ["minimal", "letters"])
def test_what_is_answered_is_explained_and_logged(serve, bundle, tmp_path, cleaning):
    refresh_info(bundle, cleaning=cleaning)
    client, request_ids = serve(request_log=str(tmp_path / "log")), []
    for text in ("good &amp;nbsp;", "wonderful", "a " * 4000 + "b" * 10_000):
        answer, explained = (client.post(path, json={"text": text}).json() for path in ("/predict", "/explain"))
        assert explained["label"] == answer["label"] and 1 <= len(explained["spans"]) <= 32
        assert "".join(span["text"] for span in explained["spans"]).strip() == Predictor(bundle).clean(text)
        request_ids += [answer["request_id"], explained["request_id"]]
    rows = [json.loads(line) for path in (tmp_path / "log/journal").iterdir() for line in path.read_text().splitlines()]
    assert [row["request_id"] for row in rows] == request_ids


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
            assert address.startswith("data:") or re.fullmatch("[a-z][a-z0-9./-]+", address), address
            if not address.startswith("data:"):
                assert client.get(address).status_code == 200, address
        policy = page.headers["content-security-policy"]
        assert "connect-src 'self'" in policy and "unsafe" not in policy
        assert "testserver" not in page.text, "the Host header is not to be trusted"


@pytest.mark.parametrize(("content", "headers", "status", "named"), [
    (b'{"text": ""}', JSON, 422, "text 1 "),
    (b'{"text": " \\u200b \\t"}', JSON, 422, "text 1 "),
    (b'{"text": "\\u0000\\u0000"}', JSON, 422, "text 1 "),
    (b'{"text": "\\ud800"}', JSON, 422, "text 1 "),
    (json.dumps({"text": "x" * 1001}).encode(), JSON, 422, "text 1 has 1001 "),
    (json.dumps({"text": "x" * 1_000_000}).encode(), JSON, 413, "100000 bytes"),
    (b'{"text": "fine"}', {"content-type": "text/plain"}, 415, "text/plain"),
    (b'{"text": "fine"}', {}, 415, "application/json"),
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
    (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", JSON, 400, "body"),
    (b'{"text": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", JSON, 400, "body"),
    (b'{"text": 1e400}', JSON, 422, "body.text"),
    (b'{"text": -Infinity}', JSON, 422, "body.text"),
    (b"\x1f\x8b\x08\x00", {**JSON, "content-encoding": "gzip"}, 415, "gzip"),
    ("text=fine".encode("utf-16"), JSON, 422, "body"),
    (b"text=fine", {"content-type": "application/x-www-form-urlencoded"}, 415, "application/json"),
    (json.dumps({"text": "a", "k" * 10_000: 1}).encode(), JSON, 422, "body."),
    (json.dumps(dict.fromkeys(map(str, range(5000)), 1)).encode(), JSON, 422, "5000 keys"),
], ids=lambda value: repr(value)[:40])  # fmt: skip
def test_bad_texts_are_refused_and_not_repeated(client, capfd, content, headers, status, named):
    response = client.post("/predict", content=content, headers=headers)
    assert named in detail(response, status) and len(response.content) < 1000
    assert "secretword" not in response.text + capfd.readouterr().out


@pytest.mark.parametrize(("texts", "named"), [
    ([], "body.texts"),
    (["x"] * 10_000, "10000 texts"),
    (["fine", ""], "text 2 "),
    (["fine", 1], "body.texts.1"),
    ([1] * 5000, "body.texts.0"),
    (["fine", "x" * 1001], "text 2 has 1001 "),
])  # fmt: skip
def test_bad_batches_are_refused_whole(client, texts, named):
    assert named in detail(client.post("/predict/batch", json={"texts": texts}), 422)


def test_odd_texts_are_answered(client):
    odd = ["a\x00b", "\ud83d\ude00 \udc00 ok", "مرحبا", "😀" * 300, "\u202eabc", "&lt;b&gt;", "x" * 999]
    for text in odd:
        body = json.dumps({"text": text})
        assert client.post("/predict", content=body, headers=JSON).status_code == 200, text
    for query in ("", "?text=a&review=b", "?text=a&text=b", "?text=a&model=b"):
        assert "text" in detail(client.get(f"/predict{query}"), 422)


def test_methods_and_places_that_are_not_there(client):
    assert client.put("/predict").headers["allow"] == "GET, HEAD, POST"
    assert detail(client.get("/predict/batch"), 405) and detail(client.get("/admin"), 404)
    assert detail(client.get("/../../etc/passwd"), 404)


def test_head_is_answered_wherever_get_is(client):
    for path in (
        "/",
        "/docs",
        "/healthz",
        "/readyz",
        "/metrics",
        "/info",
        "/openapi.json",
        "/predict?text=a",
        "/swagger/swagger-ui.css",
    ):
        found, whole = client.head(path), client.get(path)
        assert (found.status_code, found.content) == (200, b""), path
        assert found.headers["content-type"] == whole.headers["content-type"]
    assert client.head("/predict/batch").status_code == 405
    assert 'method="HEAD",path="/healthz",status="200"' in client.get("/metrics").text


def test_only_allowed_hosts(serve):
    client = serve(allowed_hosts=["service.example"])
    for host, status in (("service.example:80", 200), ("SERVICE.example", 200), ("evil.example", 400), ("", 400)):
        assert client.get("/predict?text=a", headers={"host": host}).status_code == status, host
    assert client.get("/healthz", headers={"host": "10.0.0.1"}).status_code == 200, "a load balancer asks by address"


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
            assert "X-API-Key" in detail(refused, 401) and refused.headers["www-authenticate"] == "Bearer"
    for path in ("/", "/healthz", "/readyz", "/docs", "/openapi.json"):
        assert client.get(path).status_code == 200
    for headers in (*right[:3], *wrong):
        assert "admin key" in detail(client.post("/admin/reload", headers=headers), 401)
    assert client.post("/admin/reload", headers=right[3]).json()["changed"] is False
    assert "SODAOPS_ADMIN_KEYS" in detail(serve().post("/admin/reload"), 403)


def test_under_a_prefix(serve):
    client = serve(root_path="/api", admin_keys=["root"], api_keys=["user"])
    user = {"x-api-key": "user"}
    assert client.get("/api/healthz").status_code == 200
    assert "admin" in detail(client.post("/api/admin/reload", headers=user), 401)
    assert client.post("/api/admin/reload", headers={"x-api-key": "root"}).status_code == 200
    assert client.get("/api/predict", params={"text": "x"}, headers=user).status_code == 200
    assert client.put("/api/predict", headers=user).headers["allow"] == "GET, HEAD, POST"
    assert 'path="/predict"' in client.get("/api/metrics", headers=user).text
    assert "script-src" in client.get("/api/").headers["content-security-policy"]
