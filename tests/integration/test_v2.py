"""The Open Inference Protocol (v2): routes, tensors in JSON and in bytes, refusals, and Triton's own client."""

import json

import pytest

from tests.conftest import lazy
from tests.integration.test_abstention import with_thresholds
from tests.other_tasks import Stars, Tags, with_task
from tests.serving import Server

np = lazy("numpy")
triton = lazy("tritonclient.http")
TEXTS = ["a good day", "the worst däy", "so &amp; so"]
INFER = "/v2/models/sodaops/infer"


def tensor(data, **changes):
    return {"name": "text", "shape": [len(data)], "datatype": "BYTES", "data": data} | changes


def packed(*texts):
    return b"".join(len(text.encode()).to_bytes(4, "little") + text.encode() for text in texts)


def binary(client, data, shape=(1,), json_length=None, size=None, **fields):
    """A request whose texts follow the JSON."""
    size = len(data) if size is None else size
    parts = {"name": "text", "shape": list(shape), "datatype": "BYTES", "parameters": {"binary_data_size": size}}
    head = json.dumps({"inputs": [parts], **fields}).encode()
    headers = {"inference-header-content-length": str(len(head)) if json_length is None else json_length}
    return client.post(INFER, content=head + data, headers=headers)


def test_it_answers_as_the_other_routes_do(client):
    info = client.get("/info").json()
    model = client.get("/v2/models/sodaops").json()
    assert model["versions"] == [info["bundle_version"]]
    assert model["inputs"] == [{"name": "text", "datatype": "BYTES", "shape": [-1]}]
    assert [(output["name"], output["datatype"], output["shape"]) for output in model["outputs"]] == [
        ("label", "BYTES", [-1]), ("score", "FP32", [-1]), ("probs", "FP32", [-1, len(info["labels"])]),
    ]  # fmt: skip
    assert json.loads(model["outputs"][2]["parameters"]["labels"]) == info["labels"]
    expected = client.post("/predict/batch", json={"texts": TEXTS}).json()["predictions"]
    for path in (INFER, f"/v2/models/sodaops/versions/{info['bundle_version']}/infer"):
        answer = client.post(path, json={"id": "one", "inputs": [tensor(TEXTS)]}).json()
        label, score, probs = answer.pop("outputs")
        assert answer == {"model_name": "sodaops", "model_version": info["bundle_version"], "id": "one"}
        assert label["data"] == [one["label"] for one in expected] and score["shape"] == [3]
        assert probs["shape"] == [3, len(info["labels"])]
        assert probs["data"] == pytest.approx([prob for one in expected for prob in one["probs"].values()], abs=1e-5)
    rows = tensor([[text] for text in TEXTS], shape=[3, 1], parameters={"content_type": "str"})
    chosen = client.post(INFER, json={"inputs": [rows], "outputs": [{"name": "score"}]}).json()
    assert [(output["name"], output["data"]) for output in chosen["outputs"]] == [("score", pytest.approx(score["data"]))]


@pytest.mark.parametrize(("body", "status", "named"), [
    ({"inputs": [tensor(["a"], datatype="FP32")]}, 400, "datatype"),
    ({"inputs": [tensor(["a"], shape=[2])]}, 400, "shape"),
    ({"inputs": [tensor(["a", "b"], shape=[1, 2])]}, 400, "shape"),
    ({"inputs": [tensor([], shape=[0])]}, 400, "shape"),
    ({"inputs": [tensor([], shape=[])]}, 400, "shape"),
    ({"inputs": [tensor(["a"], shape=[1.5])]}, 400, "shape"),
    ({"inputs": [tensor(["a"], shape=[10**30])]}, 400, "shape"),
    ({"inputs": [tensor([3])]}, 400, "inputs.0.data"),
    ({"inputs": [tensor(["a"], name="txt")]}, 400, "text"),
    ({"inputs": [tensor(["a"]), tensor(["a"])]}, 400, "text"),
    ({"inputs": [tensor(["a"], parameters={"binary_data_size": 9})]}, 400, "lengths"),
    ({"inputs": [tensor(["a"], parameters={"binary_data_size": -1})]}, 400, "binary_data_size"),
    ({"inputs": [tensor(["a"], parameters={"shared_memory_region": "r"})]}, 400, "shared_memory_region"),
    ({"inputs": [tensor(["a", " "])], "outputs": [{"name": "logits"}]}, 400, "probs"),  # before the texts are read
    ({"inputs": [tensor(["a"])], "outputs": [{"name": "probs"}] * 4}, 400, "probs"),
    ({"inputs": [tensor(["a"])], "outputs": [{"name": "probs", "parameters": {"classification": 2}}]}, 400, "classification"),
    ({}, 400, "inputs"),
    ([], 400, "body"),
    ({"inputs": [tensor(["a", " "])]}, 422, "text 2"),
    ({"inputs": [tensor(["a"] * 9)]}, 422, "8"),
    ({"inputs": [tensor(["a" * 1001])]}, 422, "1001"),
])  # fmt: skip
def test_refused_requests(client, body, status, named):
    response = client.post(INFER, json=body)
    problem = response.json()
    assert (response.status_code, problem["status"]) == (status, status)
    assert problem["error"] == problem["detail"] and named in problem["error"]


def test_refused_bodies(client):
    texts = packed("a")
    for response in (
        client.post(INFER, content=b"{"),
        client.post(INFER, content=b'{"inputs": [], "id": "\\ud800"}'),
        binary(client, texts, json_length="99999"),
        binary(client, texts, json_length="-1"),
        binary(client, texts, size=3),
        binary(client, texts, size=99),
        client.post(INFER, json={"inputs": [tensor(["a"], parameters={"binary_data_size": 10**4300 - 1})]}),
        binary(client, texts + b"x", size=len(texts)),
        binary(client, b"\x09\0\0\0ab"),
        binary(client, b"\xff\xff\xff\xff"),
        binary(client, b"\x01\0\0\0\xff"),
        binary(client, packed(*[""] * 20_000), shape=[1]),
    ):
        assert response.status_code == 400 and response.json()["error"], response.text
    assert client.post(INFER, content=b"a", headers={"content-type": "text/plain"}).status_code == 415
    assert "JSON" in client.post("/predict", content=b"{}").json()["detail"], "other routes still need the media type"


def test_unknown_models_versions_and_methods(client):
    for path in ("models/other", "models/other/ready", "models/sodaops/versions/0/ready", "models/sodaops/versions/0", "x"):
        response = client.get(f"/v2/{path}")
        assert response.status_code == 404 and response.json()["error"]
    for path in ("models/other/infer", "models/sodaops/versions/0/infer"):
        response = client.post(f"/v2/{path}", json={"inputs": [tensor(["a"])]})
        assert response.status_code == 404 and "sodaops" in response.json()["error"]
    assert client.get(INFER).status_code == 405 and client.get(INFER).headers["allow"] == "POST"


def test_keys_name_log_and_metrics_apply(serve, tmp_path):
    client = serve(api_keys=["key"], model_name="mood", request_log=str(tmp_path / "log"), allowed_hosts=["mood.test"])
    for path in ("live", "ready"):
        assert client.get(f"/v2/health/{path}").status_code == 200
    client.base_url = "http://mood.test"
    for path in ("/v2", "/v2/models/mood/ready"):
        refused = client.get(path)
        assert refused.status_code == 401 and "key" in refused.json()["error"]
    client.headers["x-api-key"] = "key"
    assert client.get("/v2").json()["extensions"] == ["binary_tensor_data"]
    assert client.get("/v2/models/mood/ready").json() == {"name": "mood", "ready": True}
    answer = client.post("/v2/models/mood/infer", json={"inputs": [tensor(TEXTS)]}, headers={"x-request-id": "own"})
    (part,) = (tmp_path / "log/journal").iterdir()
    rows = [json.loads(line) for line in part.read_text().splitlines()]
    assert [(row["request_id"], row["place"], row["label"]) for row in rows] == [
        ("own", place, label) for place, label in enumerate(answer.json()["outputs"][0]["data"])
    ]
    assert 'method="POST",path="/v2/models/{name}/infer",status="200"} 1.0' in client.get("/metrics").text


@pytest.mark.parametrize(("kind", "labels"), [(Tags, ["a", "b", "c"]), (Stars, ["stars"])])
def test_other_tasks_give_the_fields_that_they_have(serve, bundle, monkeypatch, kind, labels):
    monkeypatch.setenv("SODAOPS_TASKS", f"tests.other_tasks.{kind.__name__}")
    client = serve(with_task(bundle, kind(), labels))
    expected = client.post("/predict", json={"text": "a"}).json()
    outputs = client.post(INFER, json={"inputs": [tensor(["a"])]}).json()["outputs"]
    described = client.get("/v2/models/sodaops").json()["outputs"]
    assert [(one["name"], one["datatype"]) for one in outputs] == [(one["name"], one["datatype"]) for one in described]
    if kind is Stars:
        assert outputs == [{"name": "value", "datatype": "FP32", "shape": [1], "data": [pytest.approx(expected["value"])]}]
    else:
        assert json.loads(outputs[0]["data"][0]) == expected["tags"] and outputs[0]["datatype"] == "BYTES"
        assert outputs[1]["data"] == pytest.approx(list(expected["probs"].values()), abs=1e-5)


def test_abstention_and_label_sets(serve, trained, tmp_path):
    client = serve(with_thresholds(trained / "run/bundle", tmp_path / "abstaining"), abstain=True)
    datatypes = {one["name"]: one["datatype"] for one in client.get("/v2/models/sodaops").json()["outputs"]}
    assert (datatypes["abstain"], datatypes["reason"]) == ("BOOL", "BYTES") and "label_set" not in datatypes
    expected = client.post("/predict/batch", json={"texts": TEXTS, "sets": True}).json()["predictions"]
    request = {"inputs": [tensor(TEXTS)], "parameters": {"sets": True}}
    outputs = {one["name"]: one["data"] for one in client.post(INFER, json=request).json()["outputs"]}
    assert outputs["abstain"] == [one["abstain"] for one in expected]
    assert outputs["reason"] == [one["reason"] or "" for one in expected]
    assert [json.loads(cell) for cell in outputs["label_set"]] == [one["label_set"] for one in expected]
    request["parameters"] = {"abstain": False, "binary_data_output": True}
    response = client.post(INFER, json=request)
    head = json.loads(response.content[: int(response.headers["inference-header-content-length"])])
    assert [one["name"] for one in head["outputs"]] == ["label", "score", "probs"]


def test_the_client_of_triton(trained):
    """JSON and binary data, in all four combinations, against a service of its own."""
    with Server(trained / "run/bundle", api_keys="key", reload_s="null") as server:
        keys = {"x-api-key": "key"}
        with server.client(headers=keys) as plain:
            expected = plain.post("/predict/batch", json={"texts": TEXTS}).json()
        client = triton.InferenceServerClient(server.url.removeprefix("http://"))
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("sodaops", headers=keys)
        assert client.get_server_metadata(headers=keys)["name"] == "sodaops"
        assert client.get_model_metadata("sodaops", headers=keys)["inputs"][0]["name"] == "text"
        texts = triton.InferInput("text", [len(TEXTS)], "BYTES")
        for is_binary in (True, False):
            texts.set_data_from_numpy(np.array(TEXTS, object), binary_data=is_binary)
            for outputs in (
                None,
                [triton.InferRequestedOutput(name, binary_data=False) for name in ("probs", "score", "label")],
                [triton.InferRequestedOutput(name) for name in ("label", "probs", "score")],
            ):
                result = client.infer("sodaops", [texts], outputs=outputs, headers=dict(keys))  # it adds to the dict
                assert result.get_response()["model_version"] == expected["bundle_version"]
                labels = [one if isinstance(one, str) else one.decode() for one in result.as_numpy("label")]
                assert labels == [one["label"] for one in expected["predictions"]]
                probs = [list(one["probs"].values()) for one in expected["predictions"]]
                assert result.as_numpy("probs").dtype == np.float32 and result.as_numpy("probs") == pytest.approx(
                    np.array(probs), abs=1e-5
                )
                assert result.as_numpy("score") == pytest.approx(np.array(probs).max(1), abs=1e-5)
        numbers = triton.InferInput("text", [1], "INT32")
        numbers.set_data_from_numpy(np.array([1], np.int32))
        error = lazy("tritonclient.utils").InferenceServerException
        for name, given, status, named in (("other", texts, "404", "sodaops"), ("sodaops", numbers, "400", "BYTES")):
            with pytest.raises(error) as refusal:
                client.infer(name, [given], headers=dict(keys))
            assert refusal.value.status() == status and named in refusal.value.message()
        with pytest.raises(error) as refusal:
            client.infer("sodaops", [texts])
        assert refusal.value.status() == "401" and "key" in refusal.value.message()
        client.close()
