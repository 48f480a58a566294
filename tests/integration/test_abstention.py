"""A bundle with thresholds: exported, evaluated, served, logged, predicted with, and annotated first."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from sodaops.bundle import layout
from sodaops.errors import BundleError, ConfigError
from sodaops.inference.predictor import Predictor
from sodaops.request_log.window import read_window
from tests.conftest import TWEETS, configured, run_overrides
from tests.requests import log_rows, write_log_part
from tests.serving import detail, rewrite_info

TEXTS = pyarrow.csv.read_csv(TWEETS)["text"].slice(600, 80).to_pylist()
PROMISES = {"target_accuracy": 0.05, "set_coverage": 0.8}  # what the tiny model can promise


def with_thresholds(bundle, folder):
    """A copy of a bundle that abstains from half of ``TEXTS``."""
    shutil.copytree(bundle, folder)
    info = layout.read_info(bundle)
    variants = {}
    for variant in info.onnx:
        threshold = float(np.median(Predictor(bundle, variant).probs(TEXTS).max(axis=1)))
        variants[variant] = {
            "model": info.files[layout.ONNX[variant]], "thresholds": dict.fromkeys(info.labels, threshold),
            "cutoffs": dict.fromkeys(info.labels, 0.3),
        }  # fmt: skip
    rewrite_info(folder, abstention={"target_accuracy": 0.9, "set_coverage": 0.8, "variants": variants})
    return folder


@pytest.fixture(scope="module")
def abstaining(trained, tmp_path_factory):
    return with_thresholds(trained / "run/bundle", tmp_path_factory.mktemp("abstaining") / "run/bundle")


def test_export_chooses_thresholds_for_each_variant_and_again_after_a_change(trained, run, bundle):
    from sodaops.export.abstention import add_promises

    before = layout.read_info(bundle)
    assert before.abstention is None and "abstention" not in (bundle / layout.INFO).read_text()
    info = add_promises(bundle, trained / "splits", PROMISES)
    assert info == layout.read_info(bundle) and info.bundle_id != before.bundle_id
    models = {variant: levels["model"] for variant, levels in info.abstention["variants"].items()}
    assert models == {variant: info.files[layout.ONNX[variant]] for variant in before.onnx} and len(models) == 2
    code, out, err = run("export", bundle, f"evaluate.splits_dir={trained / 'splits'}", "export.variants=[float32]")
    assert code == 0, err
    again = layout.read_info(bundle)
    assert again.bundle_id in out and [*again.abstention["variants"]] == ["float32"]
    assert {key: again.abstention[key] for key in PROMISES} == PROMISES  # it keeps its targets
    with pytest.raises(ConfigError, match=r"evaluate\.target_accuracy=0\.9\b.*best"):
        add_promises(bundle, trained / "splits", {"target_accuracy": 0.9})
    assert layout.read_info(bundle) == again


def test_export_refuses_too_few_rows_before_it_changes_anything(trained, run, bundle):
    before = (bundle / layout.INFO).read_bytes()
    code, _, err = run("export", bundle, f"evaluate.splits_dir={trained / 'splits'}", "evaluate.target_accuracy=0.99")
    assert code == 2 and "evaluate.target_accuracy=0.99" in err and "299" in err
    assert (bundle / layout.INFO).read_bytes() == before


def test_a_training_checks_the_rows_first_and_is_not_lost_without_a_threshold(run, small_tweets, workdir):
    words = run_overrides(
        workdir, small_tweets, "trainer.max_epochs=1", "+trainer.limit_train_batches=2", "export.variants=[float32]"
    )
    code, _, err = run("train", *words, "evaluate.target_accuracy=0.99")
    assert code == 2 and "evaluate.target_accuracy=0.99" in err and "299" in err
    assert not (workdir / "run/checkpoints").exists()
    code, out, err = run("train", *words, "evaluate.target_accuracy=0.9")
    assert code == 0, err
    assert "evaluate.target_accuracy=0.9" in err and "evaluate.target_accuracy" in out  # why, and that it has none
    assert layout.read_info(workdir / "run/bundle").abstention is None
    metrics = json.loads((workdir / "run/evaluation/metrics.json").read_text())
    assert any("evaluate.target_accuracy" in warning for warning in metrics["warnings"])


@pytest.mark.parametrize("change", [{"model": "0" * 64}, {"cutoffs": {"other": 0.5}}, {"thresholds": {"negative": 0.5}}])
def test_thresholds_of_another_bundle_are_refused(abstaining, bundle, change):
    abstention = json.loads((abstaining / layout.INFO).read_text())["abstention"]
    rewrite_info(bundle, abstention=abstention)
    assert layout.read_info(bundle).abstention == abstention
    for levels in abstention["variants"].values():
        levels |= change
    rewrite_info(bundle, abstention=abstention)
    with pytest.raises(BundleError, match="abstention"):
        layout.read_info(bundle)


def test_an_evaluation_reports_coverage_accuracy_and_sets(trained, abstaining, tmp_path):
    from sodaops.evaluation.evaluate import evaluate_split
    from sodaops.evaluation.result import describe_abstention

    settings = configured(
        f"evaluate.splits_dir={trained / 'splits'}", "evaluate.n_bootstrap=200", "evaluate.baselines=false",
        f"evaluate.output_dir={tmp_path / 'evaluation'}",
    )  # fmt: skip
    result = evaluate_split(settings, abstaining)
    written = json.loads((tmp_path / "evaluation/metrics.json").read_text())["test"]["abstention"]
    predictor = Predictor(abstaining, "float32")
    table = pq.read_table(trained / "splits/test.parquet")
    probs, truth = predictor.probs_of_cleaned(table["text"].to_pylist()), predictor.task.truth(table)
    stays = np.array([predictor.reason(predictor.prediction(row)) is None for row in probs])
    coverage, accuracy = written["answered"][""]["coverage"], written["answered"][""]["accuracy"]
    assert coverage["share"] == stays.mean() and accuracy["share"] == (probs.argmax(1) == truth)[stays].mean()
    assert accuracy["low"] <= accuracy["share"] <= accuracy["high"] < 0.9
    assert written["sets"]["labels"]["neutral"]["share"] == (probs[truth == 1, 1] >= 0.3).mean()
    assert any("0.9" in warning for warning in result.warnings)  # the tiny model misses it
    assert (tmp_path / "evaluation/plots/risk_coverage.png").stat().st_size > 10_000
    page = (tmp_path / "evaluation/report.html").read_text()
    assert all(line[1:] in page for line in describe_abstention(written))


def test_an_evaluation_of_a_bundle_without_thresholds_says_so(trained, tmp_path):
    from sodaops.evaluation.evaluate import evaluate_split

    settings = configured(
        f"evaluate.splits_dir={trained / 'splits'}", "evaluate.n_bootstrap=200", "evaluate.baselines=false",
        f"evaluate.output_dir={tmp_path / 'evaluation'}", "evaluate.target_accuracy=0.9",
    )  # fmt: skip
    assert any("evaluate.target_accuracy" in warning for warning in evaluate_split(settings, trained / "run/bundle").warnings)


def test_the_service_answers_with_abstention_and_sets_if_asked(serve, abstaining, bundle):
    plain, configured_on = serve(abstaining), serve(abstaining, abstain=True)
    body = {"texts": TEXTS[:30]}
    before = plain.post("/predict/batch", json=body).json()["predictions"]
    asked = plain.post("/predict/batch", json={**body, "abstain": True, "sets": True}).json()["predictions"]
    assert [{key: answer[key] for key in before[0]} for answer in asked] == before and set(before[0]) == {
        "label",
        "score",
        "probs",
    }
    abstained = [answer["abstain"] for answer in asked]
    assert 5 < sum(abstained) < 25 and [answer["reason"] is not None for answer in asked] == abstained
    assert all(answer["label_set"] == [label for label, prob in answer["probs"].items() if prob >= 0.3] for answer in asked)
    assert [a["abstain"] for a in configured_on.post("/predict/batch", json=body).json()["predictions"]] == abstained
    assert "abstain" in configured_on.get("/predict", params={"text": TEXTS[0]}).json()
    assert "abstain" not in configured_on.post("/predict", json={"text": TEXTS[0], "abstain": False}).json()
    assert f"sodaops_abstained_total {float(2 * sum(abstained))}" in plain.get("/metrics").text
    without = serve(bundle)
    for key, of in (("abstain", "target_accuracy"), ("sets", "set_coverage")):
        assert of in detail(without.post("/predict", json={"text": TEXTS[0], key: True}), 422)
    fields = [
        {*schemas["LabelResponse"]["properties"], *schemas["TextRequest"]["properties"], *schemas["BatchRequest"]["properties"]}
        for schemas in (of.get("/openapi.json").json()["components"]["schemas"] for of in (plain, without))
    ]
    assert fields[0] - fields[1] == {"abstain", "reason", "sets", "label_set"} and {"text", "probs"} <= fields[1]


def test_a_canary_without_thresholds_leaves_requests_that_need_them_to_the_bundle_in_use(serve, abstaining, bundle):
    client = serve(abstaining, shadow=str(bundle), shadow_share=0.0, canary=1.0)
    challenger = layout.read_info(bundle).bundle_id
    for asked, is_canary in (({}, True), ({"abstain": False}, True), ({"abstain": True}, False), ({"sets": True}, False)):
        answer = client.post("/predict", json={"text": TEXTS[0], **asked}).raise_for_status().json()
        assert (answer["bundle_version"] == challenger) is is_canary, asked


def test_a_service_that_abstains_needs_thresholds(serve, bundle, abstaining, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        serve(bundle, abstain=True)
    assert stopped.value.code == ConfigError.exit_code and "SODAOPS_ABSTAIN" in capsys.readouterr().err
    shutil.copytree(abstaining, tmp_path / "source")
    client = serve(tmp_path / "source", abstain=True, admin_keys=["root"])
    shutil.rmtree(tmp_path / "source")
    shutil.copytree(bundle, tmp_path / "source")
    assert "SODAOPS_ABSTAIN" in detail(client.post("/admin/reload", headers={"x-api-key": "root"}), 409)
    assert client.get("/readyz").json()["bundle_version"] == layout.read_info(abstaining).bundle_id


def test_drift_compares_how_often_the_bundle_abstains(drift_bundle, tmp_path):
    from sodaops.drift.check import check_drift
    from tests.watching import RECENTLY, replaced, tweets

    folder, log = with_thresholds(drift_bundle, tmp_path / "bundle"), str(tmp_path / "log")
    rows = log_rows(Predictor(folder), tweets()[2000:2200], RECENTLY)
    settings = configured(f"drift.output_dir={tmp_path / 'drift'}", "drift.n_permutations=1000").drift
    results = {}
    for name, part in {
        "same": rows, "all": replaced(rows, "abstained", True), "older": rows.drop_columns("abstained"),
    }.items():  # fmt: skip
        shutil.rmtree(log, ignore_errors=True)
        write_log_part(tmp_path / "log", part)
        results[name] = check_drift(settings, str(folder), log)
    rates = {name: [one for one in of.features if one.name == "abstained"] for name, of in results.items()}
    assert not rates["older"] and not rates["same"][0].drifted and rates["all"][0].drifted
    assert rates["same"][0].bins[0].current == pytest.approx(np.mean(rows["abstained"].to_pylist()))
    assert [cause.name for cause in results["all"].causes] == ["confidence"] and not results["same"].drifted


def test_abstained_texts_are_annotated_first(abstaining, tmp_path):
    from sodaops.annotation.pick import pick_tasks
    from sodaops.annotation.store import Store
    from sodaops.bundle.reference import read_reference

    predictor = Predictor(abstaining)
    rows = log_rows(predictor, TEXTS)
    wanted = rows.filter(pc.less(rows["score"], pc.quantile(rows["score"], 0.9)[0]))["request_id"].to_pylist()[-3:]
    flags = pa.array([name in wanted for name in rows["request_id"].to_pylist()])  # not those with the lowest confidence
    rows = rows.set_column(rows.column_names.index("abstained"), "abstained", flags)
    store = Store.create(tmp_path / "store", predictor.info.labels, predictor.task)
    shares = {"uncertain": 1.0, "drifted": 0.0, "diverse": 0.0, "random": 0.0}
    reference = read_reference(abstaining, predictor.info)
    picked = pick_tasks(predictor.info, reference, rows, store, set(), 3, shares).tasks
    assert {task["request_id"] for task in picked} == {*wanted}


def test_predictions_say_whether_the_model_abstains(abstaining, run, bundle):
    import sodaops

    Path("t.csv").write_text("text\n" + "\n".join(f'"{text.replace(chr(34), "")}"' for text in TEXTS) + "\n\n")
    predictor = Predictor(abstaining)
    code, _, err = run("predict", abstaining, "--file=t.csv", "--output=out.parquet", "--abstain")
    assert code == 0, err
    rows = pq.read_table("out.parquet")
    reasons = [predictor.reason(one) for one in predictor.predict(rows["text"].to_pylist()[: len(TEXTS)])]
    assert rows["abstain"].to_pylist()[: len(TEXTS)] == [reason is not None for reason in reasons] and len({*reasons}) > 5
    assert run("predict", abstaining, "--file=t.csv", "--output=b.csv")[0] == 0
    assert "abstain" not in Path("b.csv").read_text().partition("\n")[0]
    shown = run("predict", abstaining, "--abstain", TEXTS[0], TEXTS[1])[1].splitlines()
    assert [("abstains:" in line) for line in shown] == [reason is not None for reason in reasons[:2]]
    for words in (["a text"], ["--file=t.csv", "--output=c.csv"]):
        code, _, err = run("predict", bundle, "--abstain", *words)
        assert code == 2 and "--abstain" in err and not Path("c.csv").exists()
    model = sodaops.load(abstaining)
    prediction = model.predict([TEXTS[0]])[0]
    assert model.reason(prediction) == reasons[0]
    assert model.label_set(prediction) == [label for label, prob in prediction.probs.items() if prob >= 0.3]


def test_the_log_has_the_abstentions_and_older_parts_are_read(serve, abstaining, bundle, tmp_path):
    logs = []
    for source, name in ((abstaining, "a"), (bundle, "b")):
        client = serve(source, request_log=str(tmp_path / name))
        answers = client.post("/predict/batch", json={"texts": TEXTS[:20]} | ({"abstain": True} if name == "a" else {}))
        lines = "".join(path.read_text() for path in (tmp_path / name / "journal").glob("*.jsonl")).splitlines()
        logs.append(([one.get("abstain") for one in answers.json()["predictions"]], [json.loads(line) for line in lines]))
    (asked, rows), (_, without) = logs
    assert [row["abstained"] for row in rows] == asked and len(without) == 20 and not any("abstained" in row for row in without)
    table = log_rows(Predictor(abstaining), TEXTS[:20])
    for name, part in (("c", table), ("d", table.drop_columns("abstained"))):
        write_log_part(tmp_path / name, part)
    columns = [read_window(str(tmp_path / name), 100).rows["abstained"] for name in ("c", "d")]
    assert columns[0].to_pylist() == asked and columns[1].null_count == 20
