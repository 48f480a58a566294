"""task=multi_label the whole way, on made rows: training, report, gate, service, tables, Python, annotation."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import sodaops
from sodaops import pipeline
from sodaops.bundle import layout, reference
from sodaops.cli import main
from sodaops.config.schema import DriftConfig
from sodaops.data.preprocess import read_manifest, read_split
from sodaops.errors import DataError
from sodaops.inference.predictor import Predictor
from sodaops.registry.registry import Registry
from sodaops.request_log.window import Window
from sodaops.tasks.multi_label import MultiLabel
from tests.conftest import configured, made_once
from tests.integration.test_gate import EASY
from tests.requests import log_rows
from tests.serving import copy_bundle, detail

WORDS = {
    "cheap": ["cheap", "price"],
    "clean": ["clean", "spotless"],
    "late": ["late", "delayed"],
    "rude": ["rude", "unfriendly"],
}
LABELS = [*WORDS]


def made(n=360):
    draw = random.Random(0)
    rows = []
    for i in range(n):
        tags = [label for label in LABELS if draw.random() < 0.35]
        text = " ".join([f"visit {i}", *(draw.choice(WORDS[tag]) for tag in tags), draw.choice(["today", "again", "there"])])
        rows.append({"text": text, "tags": tags, "joined": ";".join(tags), "city": draw.choice(["Rome", "Oslo"])})
        rows[-1] |= {label: int(label in tags) for label in LABELS}
    return pa.Table.from_pylist(rows)


def overrides(folder, *more):
    return [
        "data=csv", f"data.path={folder / 'table.parquet'}", "data.label_column=tags", "task=multi_label",
        "task.allow_none=true", "data.slice_columns=[city]", "model=tiny", "trainer.max_epochs=8", "trainer.precision=32-true",
        "optim.lr=0.003", "optim.head_lr=0.01", "evaluate.n_bootstrap=200", "logger=none", f"run_dir={folder / 'run'}",
        f"evaluate.splits_dir={folder / 'splits'}", *more,
    ]  # fmt: skip


@pytest.fixture(scope="session")
def tagged(tmp_path_factory):
    """The folder of a finished run with several labels per text: ``table.parquet``, ``run`` and ``splits``."""

    def make(folder):
        pq.write_table(made(), folder / "table.parquet")
        own = "+metrics.wrong._target_=torchmetrics.classification.MultilabelHammingDistance"
        assert pipeline.train(configured(*overrides(folder, own, "task.thresholds={late: 0.4}"))).score is not None

    return made_once(tmp_path_factory, "tagged", make)


def test_the_bundle_answers_with_its_thresholds(tagged):
    predictor = Predictor(tagged / "run/bundle", "float32")
    assert isinstance(predictor.task, MultiLabel) and predictor.info.labels == LABELS
    thresholds = predictor.info.task["thresholds"]
    assert list(thresholds) == LABELS and thresholds["late"] == 0.4 and all(0 < of < 1 for of in thresholds.values())
    val = read_split(tagged / "splits", "val")
    probs, truth = predictor.probs_of_cleaned(val["text"].to_pylist()), predictor.task.truth(val)
    at_half = MultiLabel().summary(probs, truth)["macro_f1"]
    assert predictor.task.summary(probs, truth)["macro_f1"] >= max(at_half, 0.6)
    for answer, row in zip(
        predictor.predict(["late and rude", "clean"]), predictor.probs(["late and rude", "clean"]), strict=True
    ):
        assert answer.labels == [label for label, p in zip(LABELS, row, strict=True) if p >= thresholds[label]]
    measured = {variant: of["macro_f1"] for variant, of in predictor.info.onnx.items()}
    assert measured.keys() == {"float32", "int8"}
    assert predictor.info.metrics["val"]["macro_f1"] == pytest.approx(measured["float32"], abs=1e-3), "not that at 0.5"
    manifest = read_manifest(tagged / "splits")
    counts = {label: sum(of["labels"][label] for of in manifest["splits"].values()) for label in LABELS}
    assert counts == {label: made()[label].to_pandas().sum() for label in LABELS}


def test_the_report_and_the_metrics(tagged):
    evaluation = tagged / "run/evaluation"
    content = json.loads((evaluation / "metrics.json").read_text(encoding="utf-8"))["test"]
    assert {metric.name for metric in MultiLabel.metrics} <= content.keys()
    assert content["baselines"].keys() == MultiLabel.baselines.keys() and 0 < content["wrong"] < 1
    assert content["baselines"]["tfidf"]["macro_f1"] > 0.9, "each label has two words of its own"
    assert content["slices"]["city"]["Oslo"].keys() >= {"n_rows", "macro_f1", "micro_f1"}
    page = (evaluation / "report.html").read_text(encoding="utf-8")
    assert all(text in page for text in ("macro-F1", "Hamming loss", "threshold", "By city", "every label for every text"))
    predictions = pq.read_table(evaluation / "predictions.parquet").to_pylist()
    assert set(predictions[0]) == {"source", "row", "label", "predicted", *(f"prob_{label}" for label in LABELS)}
    assert main(["report", str(tagged / "run")]) == 0
    assert "any number of 4 labels: cheap, clean" in (tagged / "run/project_report.html").read_text(encoding="utf-8")


def test_the_other_forms_of_labels_give_the_same_splits(tagged, workdir):
    table = made()
    pq.write_table(table, "table.parquet")
    with open("rows.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in table.to_pylist())
    pq.write_table(table.drop_columns("tags"), "plain.parquet")
    first = read_split(tagged / "splits", "train")
    for name, more in {
        "json": ["data.path=rows.jsonl"],
        "separator": ["data.path=plain.parquet", "data.label_column=joined", 'task.separator=";"'],
        "columns": ["data.path=plain.parquet", "task.columns=[cheap,clean,late,rude]"],
    }.items():
        assert main(["preprocess", *overrides(workdir), *more, f"evaluate.splits_dir={workdir / name}"]) == 0
        split = read_split(workdir / name, "train")
        assert split["label"].to_pylist() == first["label"].to_pylist() and split["text"] == first["text"], name
        assert split["label_set"] == first["label_set"]


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["task.allow_none=false"], ["DataError", "no label", "task.allow_none"]),
        (["data.labels=[cheap,clean,late]"], ["DataError", "'rude'"]),
        (["data.label_column=joined"], ["DataError", "task.separator"]),
        (['task.separator=";"'], ["DataError", "column tags", "list"]),
        (["task.columns=[cheap,city]"], ["DataError", "0 or 1", "cheap, city"]),
        (["task.columns=[cheap,cleen]"], ["DataError", "task.columns", "did you mean clean"]),
        (["task.thresholds={lat:0.4}"], ["ConfigError", "task.thresholds.lat", "did you mean late"]),
        (["task=single_label", "loss=cross_entropy", "checkpoint.monitor=val/loss"], ["DataError", "column tags", "list"]),
    ],
)
def test_tables_that_are_refused(more, parts, tagged, workdir, run):
    shutil.copy(tagged / "table.parquet", "table.parquet")
    words = [word for word in overrides(workdir) if "task" not in word or "task=single_label" not in more]
    code, _, err = run("preprocess", *words, *more)
    assert code == 2 and all(part in err for part in parts), err


def test_the_gate(tagged, workdir, capsys):
    shutil.copytree(tagged / "splits", "splits")
    first, second = (
        Registry("registry").register(copy_bundle(tagged / "run/bundle", workdir / f"bundle{i}", f"{i}")) for i in range(2)
    )
    settings = [word for word in EASY if "max_ece" not in word] + ["evaluate.splits_dir=splits", "registry.gate.max_ece=0.5"]
    assert main(["promote", first, *settings]) == 0
    result = json.loads(Path(f"outputs/gate/{first}/gate.json").read_text())
    assert result["against"] == "TF-IDF + logistic regression" and [each["rule"] for each in result["verdicts"]] == [
        "better",
        "calibration",
    ]
    assert result["slices"][0]["slice"] == "label cheap" and result["scores"]["challenger"].keys() == {
        "macro_f1",
        "micro_f1",
        "ece",
    }
    limits = ["registry.gate.max_gap=1e-4", "registry.gate.min_agreement=0.5", "registry.gate.min_gain=0.0"]
    assert main(["promote", second, *settings, *limits]) == 3, "the same answers: no gain"
    verdicts = {each["rule"]: each for each in json.loads(Path(f"outputs/gate/{second}/gate.json").read_text())["verdicts"]}
    assert verdicts["better"]["value"] == 0 and not verdicts["better"]["passed"]
    assert verdicts["parity"]["passed"] and verdicts["agreement"]["value"] > 0.5
    capsys.readouterr()


def test_the_service(tagged, serve, tmp_path):
    client = serve(tagged / "run/bundle", feedback_store=str(tmp_path / "store"), request_log=str(tmp_path / "log"))
    expected = Predictor(tagged / "run/bundle").predict(["the train was late and the staff rude"])[0]
    answer = client.post("/predict", json={"text": "the train was late and the staff rude"}).json()
    assert answer["labels"] == expected.labels and answer["probs"] == pytest.approx(expected.probs, abs=1e-5)
    assert list(client.post("/predict/batch", json={"texts": ["a", "b"]}).json()["predictions"][0]) == ["labels", "probs"]
    explained = client.post("/explain", json={"text": "late train", "label": "late"}).json()
    assert "".join(span["text"] for span in explained["spans"]) == "late train"
    body = {"request_id": answer["request_id"], "label": ["rude", "late"]}
    assert client.post("/feedback", json=body).json() == {"noted": True}
    assert "lat" in detail(client.post("/feedback", json={**body, "label": ["lat"]}), 422)
    assert client.post("/predict", json={"text": ["late", "rude"]}).status_code == 422
    schema = client.get("/openapi.json").json()["components"]["schemas"]["TextResponse"]["properties"]
    assert schema["labels"]["type"] == "array" and "label" not in schema


def test_drift_is_that_of_label_rates(tagged):
    from sodaops.drift.measure import measure_drift

    predictor = Predictor(tagged / "run/bundle")
    known, rows = reference.read_reference(tagged / "run/bundle", predictor.info), made(1000).to_pylist()[360:]
    assert known.truth is None and set(known.segments[:, 0]) == {"Rome", "Oslo"}
    of_both = {}
    for name, texts in {
        "like": [row["text"] for row in rows[:150]],
        "late": [row["text"] for row in rows if row["late"]][:150],
    }.items():
        window = Window(log_rows(predictor, texts), len(texts))
        result, _ = measure_drift(DriftConfig(n_permutations=1000), predictor.info, known, window)
        (of_both[name],) = [feature for feature in result.features if feature.name == "labels"]
    assert of_both["late"].drifted and not of_both["like"].drifted
    rates = {one.start: one.current - one.reference for one in of_both["late"].bins}
    assert list(rates) == LABELS and max(rates, key=rates.get) == "late"


def test_tables_and_python(tagged, workdir):
    pd = pytest.importorskip("pandas")
    rows = made(20)
    pq.write_table(rows, "in.parquet")
    for name in ("out.parquet", "out.csv", "out.jsonl"):
        assert main(["predict", str(tagged / "run"), "--file", "in.parquet", "--output", name]) == 0
    model = sodaops.load(tagged / "run")
    texts = rows["text"].to_pylist()
    answers = [answer.labels for answer in model.predict(texts)]
    assert pq.read_table("out.parquet")["labels"].to_pylist() == answers
    assert [json.loads(line)["labels"] for line in Path("out.jsonl").read_text().splitlines()] == answers
    assert [json.loads(cell) for cell in pd.read_csv("out.csv")["labels"]] == answers
    frame = model.predict(pd.DataFrame({"text": [*texts[:3], ""]}))
    assert frame["labels"].tolist() == [*answers[:3], None]
    evaluated = sodaops.evaluate(model, rows, n_bootstrap=100)
    truth = np.array([[row[label] == 1 for label in LABELS] for row in rows.to_pylist()])
    assert evaluated.metrics["macro_f1"] == pytest.approx(
        model.predictor.task.summary(model.predictor.probs(texts), truth)["macro_f1"]
    )
    with pytest.raises(DataError, match="task.allow_none"):
        sodaops.train(rows, label="tags", task="multi_label", model="tiny", overrides=["trainer.max_epochs=1"])


def test_annotated_rows_come_back(tagged, workdir, run):
    from sodaops.annotation.exchange import export_file, import_file
    from sodaops.annotation.store import Store
    from tests.annotation import task

    def made_store(name):
        store = Store.create(name, LABELS, MultiLabel(allow_none=True))
        store.add_tasks("some", [task(text, why="random") for text in ("a cheap and clean room", "nothing of the kind")])
        return store

    store = made_store("store")
    session = store.session("ann")
    for each, answer in zip(store.state().tasks, (["clean", "cheap"], []), strict=True):
        session.answer(each.task, answer)
    shutil.copy(tagged / "table.parquet", "table.parquet")
    for name in ("answers.csv", "answers.json"):
        export_file(store, name)
        other = made_store(f"of-{name}")
        assert import_file(other, name) == (0, 2)
        assert list(other.state().answers.values()) == [{"ann": '["cheap", "clean"]'}, {"ann": "[]"}]
    assert 'choice="multiple"' in Path("answers.xml").read_text()
    more = ["data.added=added", "annotate.store=store", "annotate.near_test=1.0"]
    for form in ([], ["data.label_column=joined", 'task.separator=";"'], ["task.columns=[cheap,clean,late,rude]"]):
        shutil.rmtree("added", ignore_errors=True)
        code, _, err = run("annotate", "merge", *overrides(workdir), *form, *more)
        assert code == 0, err
        assert run("preprocess", *overrides(workdir), *form, "data.added=added")[0] == 0
        splits = pa.concat_tables([read_split("splits", name) for name in ("train", "val")])
        rows = {row["text"]: row["label"] for row in splits.to_pylist()}
        assert rows["a cheap and clean room"] == "cheap, clean" and rows["nothing of the kind"] == "(none)"


def test_splits_of_another_task_are_refused(tagged, workdir, run):
    words = ["data=csv", f"data.path={tagged / 'table.parquet'}", "data.label_column=city", "evaluate.splits_dir=splits"]
    assert run("preprocess", *words)[0] == 0
    code, _, err = run("evaluate", tagged / "run/bundle", "evaluate.splits_dir=splits")
    assert code == 2 and err.startswith("ConfigError") and "task=" in err and "MultiLabel" in err


def test_a_damaged_threshold_is_refused(tagged, tmp_path):
    from sodaops.errors import BundleError
    from tests.serving import refresh_info

    bundle = shutil.copytree(tagged / "run/bundle", tmp_path / "bundle")
    info = layout.read_info(bundle)
    refresh_info(bundle, task={**info.task, "thresholds": {**info.task["thresholds"], "late": 7}})
    with pytest.raises(BundleError, match=r"task\.thresholds\.late"):
        Predictor(bundle)
