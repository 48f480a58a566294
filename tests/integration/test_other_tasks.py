"""Tasks from outside the package, from the service to the annotation: several labels, and a number."""

import json
import shutil
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from sodaops.annotation.exchange import export_file, import_file
from sodaops.annotation.store import Store
from sodaops.bundle import reference
from sodaops.config.schema import DriftConfig, SharesConfig
from sodaops.errors import BundleError, DataError
from sodaops.inference.predictor import Predictor
from sodaops.request_log.window import Window
from tests.annotation import CODE, task
from tests.conftest import lazy
from tests.other_tasks import Stars, Tags, with_task
from tests.requests import log_rows
from tests.serving import detail, refresh_info
from tests.unit.test_request_log import parts
from tests.watching import tweets

measure = lazy("sodaops.drift.measure")
picking = lazy("sodaops.annotation.pick")
annotation_app = lazy("sodaops.annotation.app")
testclient = lazy("fastapi.testclient")
LABELS = {Tags: ["negative", "neutral", "positive"], Stars: ["stars"]}


@pytest.fixture(autouse=True)
def trusted(monkeypatch):
    monkeypatch.setenv("SODAOPS_TASKS", "tests.other_tasks.Tags,tests.other_tasks.Stars")


@pytest.fixture
def store(tmp_path):
    """Makes a store with the texts a, b, c and d."""

    def make(kind, name="store"):
        made = Store.create(tmp_path / name, LABELS[kind], kind())
        made.add_tasks("some", [task(text, why="random") for text in "abcd"])
        return made

    return make


def test_a_task_that_nothing_here_names_is_refused(bundle, monkeypatch, tmp_path):
    with_task(bundle, Stars(), ["stars"])
    Store.create(tmp_path / "s", ["stars"], Stars())
    monkeypatch.delenv("SODAOPS_TASKS")
    with pytest.raises(BundleError, match="SODAOPS_TASKS"):
        Predictor(bundle)
    with pytest.raises(DataError, match="SODAOPS_TASKS"):
        Store(tmp_path / "s")


@pytest.mark.parametrize(
    ("kind", "fields", "right", "wrong"),
    [(Tags, ["tags", "probs"], ["neutral", "negative"], 3), (Stars, ["value"], 4.5, ["neutral"])],
    ids=["several labels", "a number"],
)
def test_the_service_answers_as_the_task_does(serve, bundle, tmp_path, kind, fields, right, wrong):
    with_task(bundle, kind(), LABELS[kind])
    client = serve(feedback_store=str(tmp_path / "store"), request_log=str(tmp_path / "log"))
    answer = client.post("/predict", json={"text": "so good"}).json()
    prediction = vars(Predictor(bundle).predict(["so good"])[0])
    assert list(answer) == [*fields, "bundle_version", "request_id"]
    assert answer[fields[0]] == (pytest.approx(prediction["value"], abs=1e-5) if kind is Stars else prediction["tags"])
    assert list(client.post("/predict/batch", json={"texts": ["a", "b"]}).json()["predictions"][1]) == fields
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    assert list(schemas["TextResponse"]["properties"]) == list(answer) and schemas["LabelResponse"]["required"] == fields

    explained = client.post("/explain", json={"text": "so good"}).json()
    column = kind().explained(Predictor(bundle).predict(["so good"])[0], LABELS[kind])
    with_it, without = Predictor(bundle).probs(["so good", "good"])[:, column]
    assert explained["spans"][0] == {"text": "so ", "effect": pytest.approx(float(with_it - without), abs=1e-4)}
    chosen = client.post("/explain", json={"text": "so good", "label": LABELS[kind][0]}).json()
    with_it, without = Predictor(bundle).probs(["so good", "good"])[:, 0]
    assert chosen["spans"][0]["effect"] == pytest.approx(float(with_it - without), abs=1e-4)
    assert "label" in detail(client.post("/explain", json={"text": "so good", "label": "x"}), 422)

    body = {"request_id": answer["request_id"], "label": right}
    assert client.post("/feedback", json=body).json() == {"noted": True}
    assert repr(wrong) in detail(client.post("/feedback", json={**body, "label": wrong}), 422)
    counted = [line for line in client.get("/metrics").text.splitlines() if line.startswith("sodaops_predictions_total{")]
    assert bool(counted) == (kind is Tags)
    client.__exit__()
    assert (
        parts(tmp_path / "log")[0]["label"]
        == kind().logged(kind().prediction(parts(tmp_path / "log")[0]["probs"], LABELS[kind]))[0]
    )


@pytest.fixture(scope="module")
def watched(drift_bundle, tmp_path_factory):
    """For each task a predictor, its reference, and the log of tweets that the reference does not know."""

    def make(kind):
        folder = tmp_path_factory.mktemp(kind.__name__) / "bundle"
        with_task(shutil.copytree(drift_bundle, folder), kind(), LABELS[kind])
        predictor = Predictor(folder)
        from sodaops.export.drift_reference import make_reference

        cleaned = [predictor.clean(text) for text in tweets()[:1200]]
        reference.write_reference(folder, make_reference(predictor, cleaned[:600], cleaned[600:]))
        refresh_info(folder)
        predictor = Predictor(folder)
        return predictor, reference.read_reference(folder, predictor.info), log_rows(predictor, tweets()[1200:2200])

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SODAOPS_TASKS", "tests.other_tasks.Tags,tests.other_tasks.Stars")
        return {kind: make(kind) for kind in (Tags, Stars)}


@pytest.mark.parametrize(("kind", "names"), [(Tags, {"tags", "number_of_tags"}), (Stars, {"stars"})])
def test_drift_compares_what_the_task_names(watched, kind, names):
    predictor, known, rows = watched[kind]
    settings = DriftConfig(n_permutations=1000)
    same, _ = measure.measure_drift(settings, predictor.info, known, Window(rows.slice(0, 300), 300))
    assert not same.drifted, same.message
    assert {feature.name for feature in same.features} == names | {
        "n_chars", "letters", "non_ascii", "pieces_per_word", "unknown", "embedding"
    }  # fmt: skip
    assert same.level == pytest.approx(settings.alpha / len(same.features))
    column = np.array(rows["probs"].to_pylist())[:, 0]
    one_sided = rows.take(np.argsort(column)[-200:])
    other, _ = measure.measure_drift(settings, predictor.info, known, Window(one_sided, 200))
    changed = {feature.name for feature in other.features if feature.drifted}
    assert other.drifted and "labels" in {cause.name for cause in other.causes} | {"labels"} and names & changed
    by_name = {feature.name: feature for feature in other.features}
    if kind is Tags:
        rates = [(bin_.start, bin_.current) for bin_ in by_name["tags"].bins]
        assert rates[0] == ("negative", pytest.approx((np.array(one_sided["probs"].to_pylist())[:, 0] > 0.5).mean()))
        assert by_name["tags"].effect == max(abs(bin_.current - bin_.reference) for bin_ in by_name["tags"].bins)
    else:
        assert by_name["stars"].reference < by_name["stars"].current


@pytest.mark.parametrize("kind", [Tags, Stars])
def test_uncertain_texts_are_picked_by_the_task(watched, kind, tmp_path):
    predictor, known, rows = watched[kind]
    shares = SharesConfig().model_dump()
    made = Store.create(tmp_path / "store", LABELS[kind], kind())
    picked = picking.pick_tasks(predictor.info, known, rows, made, set(), 5, dict.fromkeys(shares, 0.0) | {"uncertain": 1.0})
    uncertainty = kind().uncertainty(np.array(rows["probs"].to_pylist()))
    most = rows.take(np.argsort(-uncertainty, kind="stable")[:5])["request_id"].to_pylist()
    assert sorted(each["request_id"] for each in picked.tasks) == sorted(most)
    assert made.add_tasks("first", picked.tasks) == 5
    everything = picking.pick_tasks(predictor.info, known, rows, made, set(), 40, shares)
    assert Counter(each["why"] for each in everything.tasks).keys() == shares.keys()
    assert pc.sum(pa.array([each["score"] for each in everything.tasks])).is_valid


@pytest.mark.parametrize(
    ("kind", "answers", "kept", "wrong"),
    [
        (Tags, [["positive", "negative"], "neutral", [], None], ["negative|positive", "neutral", "", None], [["x"], 3, "x"]),
        (Stars, [4, 2.5, 0, None], ["4", "2.5", "0", None], [6, "x", [1]]),
    ],
    ids=["several labels", "a number"],
)
def test_answers_are_the_tasks_and_survive_every_format(store, kind, answers, kept, wrong, tmp_path):
    one = store(kind)
    client = testclient.TestClient(annotation_app.create_annotation_app(one.folder))
    for text, answer in zip(one.state().tasks, answers, strict=True):
        body = {"annotator": "ann", "session": CODE, "task": text.task}
        for refused in wrong:
            assert client.post("/api/answer", json={**body, "label": refused}).status_code == 422
        assert client.post("/api/answer", json={**body, "label": answer}).json()["question"] == kind().question
    assert [given["ann"] for given in one.state().answers.values()] == kept
    for name in ("a.csv", "a.json"):
        export_file(one, tmp_path / name)
        other = store(kind, f"of-{name}")
        assert import_file(other, tmp_path / name) == (0, 4)
        assert other.state().answers == one.state().answers
        assert import_file(one, tmp_path / name) == (0, 0)
    config = (tmp_path / "a.xml").read_text()
    assert ('choice="multiple"' in config) == (kind is Tags) and ("<Number" in config) == (kind is Stars)
    values = [each["annotations"][0]["result"][0]["value"] for each in json.loads((tmp_path / "a.json").read_text())[:3]]
    assert values[0] == ({"choices": ["negative", "positive"]} if kind is Tags else {"number": 4.0})


def test_what_label_studio_itself_exports_of_numbers_and_several_choices(store, tmp_path):
    for kind, cells, kept in (
        (Tags, ['"{""choices"": [""neutral"", ""positive""]}"', "neutral"], ["neutral|positive", "neutral"]),
        (Stars, ['"[{""number"": 3}]"', "0"], ["3", "0"]),
    ):
        rows = [f"{n},2,{'ab'[n]},{cell}" for n, cell in enumerate(cells)]
        (tmp_path / "flat.csv").write_text("\n".join(["annotation_id,annotator,text,label", *rows]) + "\n")
        made = store(kind, kind.__name__)
        import_file(made, tmp_path / "flat.csv")
        assert [given["label-studio 2"] for given in made.state().answers.values()] == kept


def test_agreement_and_conflicts_are_the_tasks(store):
    made = store(Stars)
    texts = [each.task for each in made.state().tasks]
    for name, values in (("ann", (1, 2, 3)), ("ben", (1.5, 5, 3))):
        session = made.session(name)
        for text, value in zip(texts, values, strict=False):
            session.answer(text, value)
    state = made.state()
    assert [each.task for each in state.conflicts()] == [texts[1]]
    assert state.agreement("ann", "ben").raw == pytest.approx(2 / 3)


def test_a_store_of_another_task_is_refused(store, tmp_path):
    made = store(Tags)
    with pytest.raises(DataError, match="tags.*single_label"):
        Store.create(made.folder, LABELS[Tags])
    assert json.loads((made.folder / "store.json").read_text())["format"] == 3  # versions without tasks refuse it
    assert json.loads((Store.create(tmp_path / "plain", ["a", "b"]).folder / "store.json").read_text()) == {
        "format": 2, "labels": ["a", "b"]
    }  # fmt: skip
