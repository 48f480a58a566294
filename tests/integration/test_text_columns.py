"""Texts of two columns, the whole way: training, bundle, tables, service, request log, annotation."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

import sodaops
from sodaops.annotation.exchange import export_file, import_file
from sodaops.annotation.store import Store
from sodaops.bundle.layout import check_splits, read_info
from sodaops.errors import BundleError, ConfigError, DataError
from sodaops.inference.predictor import Predictor
from sodaops.text.columns import SEPARATOR
from tests.conftest import TINY, configured, lazy, made_once, table
from tests.serving import copy_bundle, detail, refresh_info

transformers = lazy("transformers")
torch = lazy("torch")
COLUMNS = ["title", "body"]
PAIRS = [("late [SEP] again", "the train &amp; the bus"), ("", "only a body"), ("only a title", ""), ("long " * 40, "short")]
TEXTS = [dict(zip(COLUMNS, pair, strict=True)) for pair in PAIRS]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A run on pairs, in which body and title must be distinguished: ``run``, ``splits`` and the table ``pairs.csv``."""

    def make(folder):
        rows = [(f"{a} number {i}", f"{b} number {i}", label) for i in range(60) for a, b, label in
                (("good", "bad", "up"), ("bad", "good", "down"))]  # fmt: skip
        (folder / "pairs.csv").write_text(table([*rows, ("", " ", "up")], [*COLUMNS, "label"]))
        from sodaops.pipeline import train

        paths = [f"data.path={folder / 'pairs.csv'}", f"run_dir={folder / 'run'}", f"evaluate.splits_dir={folder / 'splits'}"]
        keys = ["data=csv", "data.text_column=[title,body]", "model.max_tokens=24", "trainer.precision=32-true"]
        train(configured(*TINY, *keys, *paths, "evaluate.baselines=true"))

    return made_once(tmp_path_factory, "pairs", make)


@pytest.fixture
def bundle(pairs):
    return pairs / "run/bundle"


@pytest.fixture(scope="module")
def model(pairs):
    return sodaops.load(pairs / "run/bundle", "float32")


def test_the_splits_hold_the_parts_of_a_text(pairs):
    manifest = json.loads((pairs / "splits/manifest.json").read_text())
    assert manifest["text_columns"] == COLUMNS and manifest["dropped"]["empty_text"]["n_rows"] == 1
    assert all(text.count(SEPARATOR) == 1 for text in pq.read_table(pairs / "splits/train.parquet")["text"].to_pylist())
    assert read_info(pairs / "run/bundle").text_columns == COLUMNS
    errors = [line for line in (pairs / "run/evaluation/report.html").read_text().splitlines() if "title: " in line]
    assert errors or json.loads((pairs / "run/evaluation/metrics.json").read_text())["test"]["accuracy"] == 1


def test_training_and_serving_encode_a_pair_as_transformers_does(pairs, model):
    """The probabilities of the ONNX graph are those of the encoder for the pair, its token types included."""
    bundle = pairs / "run/bundle"
    tokenizer = transformers.AutoTokenizer.from_pretrained(bundle)
    encoder = transformers.AutoModel.from_pretrained(bundle, add_pooling_layer=False).eval()
    cleaned = [tuple(model.predictor.clean(SEPARATOR.join(pair)).split(SEPARATOR)) for pair in PAIRS]
    inputs = tokenizer(
        *map(list, zip(*cleaned, strict=True)), truncation=True, max_length=24, padding=True, return_tensors="pt"
    )
    assert "token_type_ids" in inputs and inputs["token_type_ids"].max() == 1
    from sodaops.bundle.save import load_bundle
    from sodaops.modeling.encoder import mean_pool

    with torch.no_grad():
        embeddings = mean_pool(encoder(**inputs).last_hidden_state, inputs["attention_mask"])
        expected = load_bundle(bundle).model.head(embeddings).softmax(-1).numpy()
    answers = np.array([list(answer.probs.values()) for answer in model.predict(TEXTS)])
    np.testing.assert_allclose(answers, expected, atol=1e-5)
    swapped = model.predict([{"title": "x good", "body": "x bad"}, {"title": "x bad", "body": "x good"}])
    assert swapped[0].probs != pytest.approx(swapped[1].probs, abs=1e-3)


def test_an_export_for_transformers_takes_pairs(pairs, model, workdir):
    from sodaops.export.transformers_export import export_transformers

    assert export_transformers(pairs / "run/bundle", "exported")
    classify = transformers.pipeline("text-classification", model="exported", trust_remote_code=True, top_k=None)
    texts = [text for text in TEXTS if text["body"]]  # transformers takes an empty second part for none
    answers = classify([{"text": text["title"], "text_pair": text["body"]} for text in texts])
    for answer, expected in zip(answers, model.predict(texts), strict=True):
        assert {one["label"]: one["score"] for one in answer} == pytest.approx(expected.probs, abs=1e-5)


def test_tables_dictionaries_and_words_give_the_same_answers(pairs, model, run, write):
    expected = [answer.label for answer in model.predict(TEXTS)]
    write("t.csv", table([(*pair, "x") for pair in [*PAIRS, (" ", "")]], ["headline", "article", "other"]))
    columns = ["--text-column", "headline", "--text-column", "article"]
    code, _, error = run("predict", pairs / "run", "--file", "t.csv", "--output", "out.jsonl", "--variant", "float32", *columns)
    assert code == 0, error
    rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [row.get("label") for row in rows] == [*expected, None]
    frame = pytest.importorskip("pandas").DataFrame(TEXTS)
    assert model.predict(frame)["label"].tolist() == expected
    code, out, _ = run("predict", pairs / "run", json.dumps(TEXTS[0]), "--variant", "float32")
    assert code == 0 and out.split("\t")[0] == expected[0]
    for words, named in (
        (["a text"], "text 1"),
        ([json.dumps({"title": "a"})], "body"),
        (["--file", "t.csv", "--output", "o.csv"], "title"),
    ):
        code, _, error = run("predict", pairs / "run", *words)
        assert code == 2 and named in error


@pytest.mark.parametrize(
    ("item", "named"),
    [("a text", "text 2"), ({"title": "a"}, "body"), ({"title": "a", "body": 1}, "body"), ({"title": "a", "bodi": ""}, "bodi")],
)
def test_a_value_of_the_wrong_shape_is_named(model, item, named):
    with pytest.raises(DataError, match=named):
        model.predict([TEXTS[0], item])
    with pytest.raises(DataError, match="list"):
        model.predict(TEXTS[0])


def test_no_text_ends_its_part(model):
    """Neither the separator of parts nor the tokenizer's special token can be written in a text."""
    sneaky, plain = {"title": f"a{SEPARATOR}b", "body": "c"}, {"title": "ab", "body": "c"}
    assert model.predict([sneaky]) == model.predict([plain])
    separator = model.predictor._tokenizer.token_to_id("[SEP]")
    assert (model.predictor.encode(f"a [SEP] b{SEPARATOR}c") == separator).sum() == 2


def test_the_service_takes_the_columns_of_its_bundle(pairs, model, serve):
    client = serve(pairs / "run/bundle", variant="float32", max_chars=100)
    expected = model.predict(TEXTS[1:3])
    answers = client.post("/predict/batch", json={"texts": TEXTS[1:3]}).json()["predictions"]
    assert [answer["label"] for answer in answers] == [one.label for one in expected]
    for one, answer in zip(TEXTS[1:3], expected, strict=True):
        for response in (client.get("/predict", params=one), client.post("/predict", json={"text": one})):
            assert response.json()["probs"] == pytest.approx(answer.probs, abs=1e-5)
    tensors = [
        {"name": name, "shape": [2], "datatype": "BYTES", "data": [one[name] for one in TEXTS[1:3]]} for name in COLUMNS[::-1]
    ]
    label = client.post("/v2/models/sodaops/infer", json={"inputs": tensors}).json()["outputs"][0]
    assert label["data"] == [one.label for one in expected]
    tensors[0] |= {"shape": [1], "data": ["a"]}
    assert "shape" in detail(client.post("/v2/models/sodaops/infer", json={"inputs": tensors}), 400)
    explained = client.post("/explain", json={"text": {"title": "so late", "body": "bad"}}).json()["spans"]
    assert [(span["column"], span["text"]) for span in explained] == [("title", "so "), ("title", "late"), ("body", "bad")]
    for text, named in (
        ("a", "text"), ({"title": "a"}, "body"), ({"title": "a", "body": "b", "bodi": ""}, "bodi"),
        ({"title": "a", "body": None}, "body"), ({"title": "a" * 60, "body": "b" * 60}, "121"),
        ({"title": " ", "body": ""}, "text 1"),
    ):  # fmt: skip
        assert named in detail(client.post("/predict", json={"text": text}), 422)
        assert named in detail(client.post("/predict/batch", json={"texts": [text]}), 422)
    assert "body" in detail(client.get("/predict", params={"title": "a"}), 422)
    document = client.get("/openapi.json").json()["components"]["schemas"]
    assert document["Text"]["required"] == COLUMNS and set(document["TextRequest"]["properties"]["text"]["examples"][0]) == set(
        COLUMNS
    )
    page = client.get("/").text
    assert 'name="title"' in page and 'name="body"' in page and 'id="text"' not in page
    assert client.get("/info").json()["text_columns"] == COLUMNS


def test_a_service_keeps_its_columns(pairs, serve, tmp_path):
    served = copy_bundle(pairs / "run/bundle", tmp_path / "served")
    client = serve(served, admin_keys=["root"])
    info = read_info(served)
    refresh_info(served, data={**info.data, "text_column": ["title", "other"]})
    assert "other" in detail(client.post("/admin/reload", headers={"x-api-key": "root"}), 409)
    assert client.get("/readyz").json()["bundle_version"] == info.bundle_id


def test_from_the_request_log_to_annotations(pairs, bundle, serve, run, workdir):
    settings = {
        "request_log": str(workdir / "log"),
        "log_texts": True,
        "redact": ["email"],
        "feedback_store": str(workdir / "store"),
    }
    client = serve(bundle, **settings)
    texts = [{"title": f"mail me{i}@example.org", "body": f"about <i>train</i> {i}"} for i in range(6)] + [
        {"title": "", "body": "x"}
    ]
    request = client.post("/predict/batch", json={"texts": texts}).json()["request_id"]
    assert detail(client.post("/predict", json={"text": {"title": " ", "body": " "}}), 422)
    assert client.post("/feedback", json={"request_id": request, "label": "up", "place": 0}).status_code == 200
    client.__exit__(None, None, None)
    rows = pa.concat_tables([pq.read_table(path) for path in workdir.glob("log/*/*.parquet")])
    assert rows["part_title"].to_pylist()[0] == "mail <email>" and rows["part_body"].to_pylist()[6] == "x"
    assert "text" not in rows.column_names and rows.num_rows == 8
    keys = ["drift.request_log=log", "annotate.store=store", f"evaluate.splits_dir={pairs / 'splits'}", "annotate.n=4"]
    code, _, error = run("annotate", "pick", bundle, *keys)
    assert code == 0, error
    code, _, error = run("drift", bundle, "drift.output_dir=drift", *keys[:1])
    assert code == 0, error
    store = Store("store")
    assert store.text_columns == COLUMNS
    tasks = store.state().tasks
    assert len(tasks) == 5 and all(task.text.count(SEPARATOR) == 1 for task in tasks)
    for name in ("out.json", "out.csv"):
        assert export_file(store, name) == 5 and import_file(store, name).n_answers == 0
    items = json.loads(Path("out.json").read_text())
    assert set(items[0]["data"]) == {*COLUMNS, "task", "why"} and 'toName="title"' in Path("out.xml").read_text()
    assert Path("out.csv").read_text().splitlines()[0] == "task,title,body,label,annotator"
    other = Store.create("other", store.labels, text_columns=COLUMNS)
    Path("in.json").write_text(json.dumps([{**item, "data": {name: item["data"][name] for name in COLUMNS}} for item in items]))
    assert import_file(other, "in.json") == (5, 1)
    assert {task.text for task in other.state().tasks} == {task.text for task in tasks}
    with pytest.raises(DataError, match="title"):
        Store.create("store", store.labels)
    Path("wrong.csv").write_text("title,label\na,up\n")
    with pytest.raises(DataError, match="body"):
        import_file(store, "wrong.csv")


def test_the_page_and_the_merge_show_the_parts(pairs, workdir, run):
    from fastapi.testclient import TestClient

    from sodaops.annotation.app import create_annotation_app

    store = Store.create("store", ["down", "up"], text_columns=COLUMNS)
    Path("new.csv").write_text(table([("a new title", "a new body", "up", "ann"), ("", "body alone", "down", "ann")],
                                     [*COLUMNS, "label", "annotator"]))  # fmt: skip
    import_file(store, "new.csv")
    with TestClient(create_annotation_app("store")) as page:
        shown = page.get("/api/next", params={"annotator": "bob"}).json()["task"]
    assert shown["parts"] == [{"column": "title", "text": "a new title"}, {"column": "body", "text": "a new body"}]
    keys = [
        "annotate.store=store",
        "data=csv",
        f"data.path={pairs / 'pairs.csv'}",
        "data.text_column=[title,body]",
        "data.added=added",
    ]
    code, _, error = run("annotate", "merge", *keys, "annotate.min_annotators=1")
    assert code == 0, error
    (merged,) = Path("added").glob("*.csv")
    assert pa.csv.read_csv(merged).select(COLUMNS).to_pylist()[0] == {"title": "a new title", "body": "a new body"}
    code, _, error = run("annotate", "merge", *keys[:3], "data.text_column=title", "data.added=added")
    assert code == 2 and "title" in error


def test_a_missing_column_is_named(run, write):
    write("t.csv", table([("a", "b"), ("c", "d")], ["title", "label"]))
    code, _, error = run("preprocess", "data=csv", "data.path=t.csv", "data.text_column=[title,body]")
    assert code == 2 and "body" in error and "data.text_column" in error


def test_other_splits_and_too_few_tokens_are_refused(pairs, run):
    info = read_info(pairs / "run/bundle")
    with pytest.raises(ConfigError, match="text columns=1"):
        check_splits(info, {"labels": info.labels, "cleaning": info.cleaning}, Path("splits"))
    code, _, error = run("train", *TINY, "data=csv", f"data.path={pairs / 'pairs.csv'}", "data.text_column=[title,body]",
                         "model.max_tokens=4", "run_dir=out")  # fmt: skip
    assert code == 2 and "model.max_tokens=4" in error


def test_a_crafted_list_of_columns_is_refused(pairs, tmp_path):
    folder = copy_bundle(pairs / "run/bundle", tmp_path / "bundle")
    fields = json.loads((folder / "bundle.json").read_text())
    fields["data"]["text_column"] = ["title"] * 2
    (folder / "bundle.json").write_text(json.dumps(fields))
    with pytest.raises(BundleError, match="text_column"):
        Predictor(folder)
