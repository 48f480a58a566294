"""The context of requests: what is refused, and what the request log keeps of it."""

import json

import pytest

from sodaops.bundle import layout
from sodaops.serving.context import MAX_VALUES
from tests.conftest import lazy
from tests.serving import detail, refresh_info

parts = lazy("sodaops.request_log.parts")


@pytest.fixture
def sliced(bundle):
    """The bundle, as if trained with slice columns."""
    refresh_info(bundle, data={**layout.read_info(bundle).data, "slice_columns": ["source", "country"]})
    return bundle


def logged(folder):
    return [json.loads(line) for path in (folder / "journal").iterdir() for line in path.read_text().splitlines()]


def test_the_context_is_logged(serve, sliced, tmp_path):
    client = serve(request_log=str(tmp_path / "log"))
    for path, body in (
        ("/predict", {"text": "good", "context": {"source": "app", "country": "Österreich"}}),
        ("/predict/batch", {"texts": ["good", "bad"], "context": {"source": "web"}}),
        ("/explain", {"text": "good", "context": {"country": ""}}),
        ("/predict", {"text": "good"}),
        ("/predict", {"text": "good", "context": None}),
        ("/predict", {"text": "good", "context": {}}),
    ):
        assert client.post(path, json=body).status_code == 200
    assert client.post("/predict", json={"text": " ", "context": {"source": "app"}}).status_code == 422
    rows = logged(tmp_path / "log")
    found = [json.loads(row["context"]) if "context" in row else None for row in rows]
    web = {"source": "web"}
    assert found == [{"source": "app", "country": "Österreich"}, web, web, {"country": ""}, None, None, None, {"source": "app"}]
    table = parts._read_rows(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    assert table["context"].to_pylist()[3:5] == ['{"country": ""}', None]


@pytest.mark.parametrize("context", [
    {"sorce": "app"}, {"source": 3}, {"source": None}, {"source": "x" * 65}, {"source": ["app"]}, ["app"], "app", 1,
    {str(n): "" for n in range(17)}, dict.fromkeys(map(str, range(1000)), 3),
])  # fmt: skip
def test_other_contexts_are_refused(serve, sliced, tmp_path, context):
    client = serve(request_log=str(tmp_path / "log"))
    answer = detail(client.post("/predict/batch", json={"texts": ["good"], "context": context}), 422)
    assert answer.count("context") == 1 and len(answer) < 1000, "one fault, whatever the number of values"
    assert not logged(tmp_path / "log")


def test_values_that_explode_in_number_are_logged_as_other(serve, sliced, tmp_path):
    client = serve(request_log=str(tmp_path / "log"))
    for n in (*range(MAX_VALUES + 3), 1):
        client.post("/predict", json={"text": "good", "context": {"source": f"user {n}"}})
    found = [json.loads(row["context"])["source"] for row in logged(tmp_path / "log")]
    assert found[-5:] == [f"user {MAX_VALUES - 1}", "other", "other", "other", "user 1"]
    text = client.get("/metrics").text
    assert 'sodaops_context_others_total{column="source"} 3.0' in text and "user 5" not in text


def test_the_schema_names_the_columns_of_the_bundle(serve, sliced):
    schemas = serve().get("/openapi.json").json()["components"]["schemas"]
    for name in ("TextRequest", "ExplanationRequest", "BatchRequest"):
        context = schemas[name]["properties"]["context"]["anyOf"][0]
        assert set(context["properties"]) == {"source", "country"} and not context["additionalProperties"]


def test_a_bundle_without_slice_columns_takes_no_context(client):
    assert "data.slice_columns" in detail(client.post("/predict", json={"text": "good", "context": {"source": "app"}}), 422)
