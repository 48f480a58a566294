"""task=regression the whole way: table, training, bundle, report, gate, service, drift, annotation and a new table."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sodaops.annotation.exchange import export_file, import_file
from sodaops.annotation.merge import merge_answers
from sodaops.annotation.store import Store
from sodaops.bundle import reference
from sodaops.config.schema import DriftConfig
from sodaops.data.preprocess import ensure_splits, read_manifest, read_split
from sodaops.errors import ConfigError, DataError, ModelError
from sodaops.inference.predictor import Predictor
from sodaops.request_log.window import Window
from sodaops.tasks.regression import Estimate, Regression
from tests.annotation import CODE, task as text_task
from tests.conftest import configured, lazy, made_once, run_overrides, table
from tests.requests import log_rows
from tests.serving import detail

measure = lazy("sodaops.drift.measure")
api = lazy("sodaops.api")
gate = lazy("sodaops.registry.gate")

WORDS = {"awful": -2.0, "poor": -1.0, "plain": 0.0, "fine": 1.0, "superb": 2.0}
ROWS = [
    (f"the {thing} of day {i} was {word}", round(value + 0.1 * math.sin(i), 2))
    for i, (thing, (word, value)) in enumerate((t, w) for t in ("train", "meal", "film") * 28 for w in WORDS.items())
]


def settings(folder, path, *more):
    overrides = run_overrides(folder, path, "data=csv", "data.label_column=stars", "task=regression", *more)
    return configured(*overrides)


@pytest.fixture(scope="session")
def estimated(tmp_path_factory):
    """The folder of a finished run: ``run``, ``splits``, and the table."""

    def make(folder):
        from sodaops.pipeline import train

        (folder / "stars.csv").write_text(table(ROWS, ("text", "stars")))
        more = ("evaluate.baselines=true", "optim.lr=3e-3", "trainer.max_epochs=8", "optim.batch_tokens=512", "logger=csv")
        assert train(settings(folder, folder / "stars.csv", *more)).score is not None

    return made_once(tmp_path_factory, "estimated", make)


@pytest.fixture(scope="module")
def predictor(estimated):
    return Predictor(estimated / "run/bundle", "float32")


def test_the_bundle_has_what_was_derived_from_train_and_val(estimated, predictor):
    train, val = (read_split(estimated / "splits", split) for split in ("train", "val"))
    ours = predictor.task
    assert predictor.info.labels == ["stars"] and read_manifest(estimated / "splits")["labels"] == ["stars"]
    numbers = train["value"].to_numpy()
    assert (ours.mean, ours.deviation) == (pytest.approx(numbers.mean()), pytest.approx(numbers.std()))
    errors = np.abs(predictor.probs_of_cleaned(val["text"].to_pylist())[:, 0] - val["value"].to_numpy())
    rank = math.ceil(0.9 * (len(errors) + 1))
    assert ours.radius == pytest.approx(np.sort(errors)[rank - 1], abs=1e-3) and (errors <= ours.radius + 1e-3).mean() >= 0.9
    assert {"r2", "agreement", "max_gap"} <= predictor.info.onnx["float32"].keys() and predictor.info.metrics["val"]["r2"] > 0.3
    assert predictor.info.onnx["float32"]["max_gap"] < 1e-4


def test_the_report_and_the_numbers_of_the_test_split(estimated, predictor):
    folder = estimated / "run/evaluation"
    measured = json.loads((folder / "metrics.json").read_text())
    test, answers = measured["test"], pq.read_table(folder / "predictions.parquet")
    truth, values = answers["label"].cast(pa.float64()).to_numpy(), answers["predicted"].to_numpy()
    assert answers.column_names == ["source", "row", "label", "predicted", "low", "high"]
    assert test["mae"] == pytest.approx(np.abs(values - truth).mean(), abs=1e-5)
    assert test["rmse"] == pytest.approx(np.sqrt(((values - truth) ** 2).mean()), abs=1e-5)
    assert test["r2"] == pytest.approx(1 - ((values - truth) ** 2).mean() / truth.var(), abs=1e-5)
    inside = (answers["low"].to_numpy() <= truth) & (truth <= answers["high"].to_numpy())
    assert test["coverage"] == pytest.approx(inside.mean(), abs=0.02)
    for name in ("r2", "mae", "rmse", "spearman", "coverage"):
        low, high = test["interval_95"][name].values()
        assert low <= test[name] <= high
    assert (
        list(test["baselines"]) == ["mean", "tfidf"]
        and test["baselines"]["tfidf"]["r2"] > 0.8 > test["baselines"]["mean"]["r2"]
    )
    page = (folder / "report.html").read_text()
    assert page.count("<figure>") == 3 and "R²" in page and "The worst errors" in page
    assert {plot["file"] for plot in measured["plots"]} == {"plots/predicted.png", "plots/residuals.png", "plots/errors.png"}


def test_the_gate_compares_bundles_by_paired_samples(estimated, tmp_path):
    bundle, rules = estimated / "run/bundle", configured("registry.gate.n_bootstrap=1000").registry.gate
    against_baseline = gate.run_gate("a", bundle, None, estimated / "splits", rules)
    rule = {verdict.rule: verdict for verdict in against_baseline.verdicts}
    assert not rule["better"].passed and rule["better"].value < 0  # ridge regression solves these texts
    assert rule["onnx"].passed if "onnx" in rule else True
    assert rule["calibration"].value is None and {"slices", "agreement"} <= rule.keys()
    itself = gate.run_gate("a", bundle, ("b", bundle), estimated / "splits", rules)
    assert itself.gain["measured"] == itself.gain["low"] == itself.gain["high"] == 0
    gate.write_gate_report(str(tmp_path / "gate"), itself, "why", Regression())
    assert "R²" in (tmp_path / "gate/gate.html").read_text()


def test_service_terminal_tables_and_python_give_the_number_and_its_interval(estimated, predictor, serve, run, tmp_path):
    bundle = estimated / "run/bundle"
    client = serve(bundle, request_log=str(tmp_path / "log"), feedback_store=str(tmp_path / "store"), variant="float32")
    answer = client.post("/predict", json={"text": "the meal was superb"}).json()
    assert list(answer) == ["value", "low", "high", "bundle_version", "request_id"]
    ours = api.load(bundle, "float32")
    (estimate,) = ours.predict(["the meal was superb"])
    assert isinstance(estimate, Estimate) and vars(estimate) == pytest.approx({k: answer[k] for k in vars(estimate)}, abs=1e-5)
    assert estimate.high - estimate.value == pytest.approx(predictor.task.radius) == estimate.value - estimate.low
    assert "value" in client.get("/openapi.json").json()["components"]["schemas"]["TextResponse"]["properties"]
    spans = client.post("/explain", json={"text": "the meal was superb"}).json()["spans"]
    assert spans[-1] == {
        "text": "superb",
        "effect": pytest.approx(estimate.value - ours.predict(["the meal was"])[0].value, abs=1e-4),
    }
    body = {"request_id": answer["request_id"], "label": 1.5}
    assert client.post("/feedback", json=body).json() == {"noted": True}
    assert "stars='positive'" in detail(client.post("/feedback", json={**body, "label": "positive"}), 422)
    code, out, _ = run("predict", bundle, "--variant", "float32", "the meal was superb")
    assert code == 0 and out.startswith(
        f"{estimate.value:.4g}\tthe meal was superb\t({estimate.low:.4g} to {estimate.high:.4g})"
    )
    code, _, err = run("export", bundle, "--format=transformers", "--output", "exported")
    assert code == 2 and "task=regression" in err and not Path("exported").exists()
    Path("in.csv").write_text(table([("the meal was superb",), ("",)], ("text",)))
    ours.predict_file("in.csv", "out.parquet")
    rows = pq.read_table("out.parquet").to_pylist()
    assert rows[0]["value"] == pytest.approx(estimate.value, abs=1e-5) and rows[1]["value"] is None is rows[1]["low"]
    evaluated = api.evaluate(ours, [{"text": text, "stars": stars} for text, stars in ROWS[:80]])
    assert evaluated.metrics["n_rows"] == 80 and evaluated.metrics["r2"] > 0.3


def test_drift_of_the_value(estimated, predictor):
    known = reference.read_reference(estimated / "run/bundle", predictor.info)
    assert known.answers.shape == (len(known.seen), 1) and not known.label_ids.any()
    texts = read_split(estimated / "splits", "train")["text"].to_pylist()[:150]
    rows = log_rows(predictor, texts)
    config = DriftConfig(n_permutations=1000)
    good = rows.filter(pa.array(rows["score"].to_numpy() > predictor.task.mean))
    result, _ = measure.measure_drift(
        config.model_copy(update={"min_rows": 40}), predictor.info, known, Window(good, len(good))
    )
    value = {feature.name: feature for feature in result.features}["value"]
    assert value.drifted and value.title == "predicted value" and value.current > value.reference
    assert "labels" in {cause.name for cause in result.causes} or {"texts"} == {cause.name for cause in result.causes}


def test_people_give_numbers_and_these_become_rows(estimated, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(estimated / "stars.csv", "stars.csv")
    config = settings(tmp_path, "stars.csv", "data.added=added", "task.minimum=-5")
    ours = Predictor(estimated / "run/bundle").task
    store = Store.create("store", ["stars"], ours)
    store.add_tasks("a", [text_task(f"a quite new text about a {thing}") for thing in ("bridge", "garden", "river")])
    texts = [each.task for each in store.state().tasks]
    for name, answers in (("ann", (1, "2.5", None)), ("ben", (2, 2.5, 0))):
        session = store.session(name, CODE)
        for text, answer in zip(texts, answers, strict=True):
            session.answer(text, answer)
    with pytest.raises(DataError, match="stars=True"):
        store.session("ann", CODE).answer(texts[0], True)
    export_file(store, "a.json")
    assert '<Number name="label"' in Path("a.xml").read_text()
    other = Store.create("other", ["stars"], Regression())
    other.add_tasks("a", [text_task(each.text) for each in store.state().tasks])
    assert import_file(other, "a.json").n_answers == 6 and other.state().answers == store.state().answers
    before = ensure_splits(config.data, Path("splits"), Regression())
    merged = merge_answers(store, config.data, Path("splits"), 1, 0.7, Regression())
    rows = {row["text"]: row["stars"] for row in pa.csv.read_csv(merged.path).to_pylist()}
    assert rows == {
        f"a quite new text about a {thing}": number for thing, number in (("bridge", 1.5), ("garden", 2.5), ("river", 0))
    }
    assert not [name for name in pa.csv.read_csv(merged.path).column_names if name.startswith("votes_")]
    after = ensure_splits(config.data, Path("splits"), Regression())
    assert sum(after["splits"][split]["n_rows"] - before["splits"][split]["n_rows"] for split in ("train", "val")) == 3
    with pytest.raises(DataError, match=r"task=regression.*task=single_label"):
        merge_answers(store, config.data, Path("splits"), 1, 0.7)


def test_a_val_split_of_one_row_is_refused(write, tmp_path):
    from sodaops.pipeline import train

    for name, rows in (("train", ROWS[:40]), ("val", ROWS[40:41]), ("test", ROWS[41:45])):
        write(f"{name}.csv", table(rows, ("text", "stars")))
    files = ("data.files={train: train.csv, val: val.csv, test: test.csv}", "data.added=null", "data.name=one")
    with pytest.raises(ModelError, match=r"val .*data\.fractions"):
        train(settings(tmp_path, "null", *files, "evaluate.split=none", "export.variants=[]"))


def test_intervals_cover_the_share_that_was_asked_for():
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(300):
        values, truth = rng.normal(size=(2, 150))
        ours = Regression(coverage=0.8).fitted(values[:50, None], truth[:50], ["x"])
        covered.append((np.abs(values[50:] - truth[50:]) <= ours.radius).mean())
    assert 0.79 < np.mean(covered) < 0.82  # (50 + 1) * 0.8 / 51 at least, and 1 / 51 more at most
    assert Regression(coverage=0.99).fitted(np.array([[1.0], [2.0]]), np.array([0.0, 0.0]), ["x"]).radius == 2  # too few rows


def test_numbers_of_several_people():
    ours = Regression(minimum=0, maximum=5, deviation=1.0)
    assert ours.merged(["1", "2", "5"]) == "2" and ours.merged([]) is None
    assert ours.agree("1", "1.5") and not ours.agree("1", "2")
    assert ours.kappa([("1", "1"), ("3", "3")]) == 1 and ours.kappa([("1", "1")]) is None and ours.kappa([]) is None
    assert ours.question == {"kind": "number", "min": 0, "max": 5}
    assert ours.prediction([4.5], ["stars"]) == Estimate(4.5, 4.5, 4.5)
    for wrong in (True, "x", 5.1, -1, float("nan"), "1_0", [1], None):
        with pytest.raises(DataError, match="stars="):
            ours.check_answer(wrong, ["stars"])


@pytest.mark.parametrize(
    ("cells", "more", "named"),
    [
        (["1", "nan", "2"], (), r"t\.csv stars: 'nan' at row 2"),
        (["1", "inf", "-inf"], (), r"t\.csv stars: 'inf', '-inf' at row 2, 3"),
        (["1", "", "2"], (), r"stars: '' at row 2"),
        (["1", "three", "2"], (), r"'three' at row 2"),
        (["1", "7", "2"], ("task.maximum=5",), r"'7' at row 2; expected a finite number.*5"),
        (["1", "1.0", "1e0"], (), r"t\.csv: all rows of stars are 1"),
    ],
    ids=["NaN", "infinite", "empty", "a word", "out of the range", "one value"],
)
def test_targets_that_are_refused(write, tmp_path, cells, more, named):
    write("t.csv", table([(f"text {i}", cell) for i, cell in enumerate(cells * 1)], ("text", "stars")))
    config = settings(tmp_path, "t.csv", *more)
    from sodaops.tasks import make_task

    with pytest.raises(DataError, match=named):
        ensure_splits(config.data, tmp_path / "splits", make_task(config.task))


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["data.vote_columns={a: b}"], "data.vote_columns"),
        (["data.labels=[a,b]"], "data.labels"),
        (["loss=cross_entropy"], "loss._target_"),
        (["checkpoint.monitor=val/macro_f1"], "checkpoint.monitor"),
        (["task.coverage=1.5"], "task.coverage"),
        (["task.minimum=2", "task.maximum=1"], "task.minimum"),
        (["+task.bins=5"], "task.bins"),
        (["+metrics.mae._target_=torchmetrics.MeanAbsoluteError"], "metrics.mae"),
    ],
    ids=lambda value: value[0].partition("=")[0] if isinstance(value, list) else None,
)
def test_settings_that_do_not_fit(tmp_path, overrides, key):
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        settings(tmp_path, "t.csv", *overrides)
