"""task=multi_label: reading, thresholds, metrics and answers."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from sodaops.config.compose import compose
from sodaops.data.preprocess import ensure_splits, read_split
from sodaops.errors import ConfigError, DataError
from sodaops.tasks import label_sets, make_task
from sodaops.tasks.multi_label import LabelSet, MultiLabel
from tests.conftest import configured, lazy

losses = lazy("sodaops.modeling.losses")
own_metrics = lazy("sodaops.modeling.metrics")
sk = lazy("sklearn.metrics")
torch = lazy("torch")
LABELS = ["a", "b", "c"]
FLAGS = [flags.replace(" ", "\x1f") for flags in ("1 1 0", "1 True 0", "0 0 0", "0 false 0", "0 0 1")]


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["task.separator="], "task.separator"),
        (['task.separator=";"', "task.columns=[a,b]"], "task.columns"),
        (["task.columns=[a]"], "task.columns"),
        (["task.columns=[a,a,b]"], "task.columns"),
        (["task.columns=a"], "task.columns"),
        (["task.thresholds={a:1.5}"], "task.thresholds.a"),
        (["task.thresholds={a:high}"], "task.thresholds.a"),
        (["task.thresholds=[0.5]"], "task.thresholds"),
        (["task.allow_none=maybe"], "task.allow_none"),
        (["loss=cross_entropy"], "loss=binary_cross_entropy"),
        (["checkpoint.monitor=val/accuracy"], "val/average_precision"),
        (["data=tweets"], "data.vote_columns"),
    ],
)
def test_settings_that_are_refused(overrides, key):
    with pytest.raises(ConfigError, match=re.escape(key)):
        compose(["data=csv", "data.path=t.csv", "task=multi_label", *overrides])


def read(task, cells, **data):
    given = {"label_column": "tags", "labels": None, "label_map": None}
    config = configured("data=csv", "data.path=t.csv").data.model_copy(update=given | data)
    return task.read_cells("t.csv", dict.fromkeys(cells, 3), config), config


def sets(targets):
    return targets.columns["label"].to_pylist()


@pytest.mark.parametrize(
    ("task", "cells"),
    [
        (MultiLabel(allow_none=True), ['["b", "a"]', '["a","b"]', "[]", "", '["c", "c"]']),
        (MultiLabel(";", allow_none=True), ["b;a", " a; b ;", "", ";", "c"]),
        (MultiLabel(columns=["a", "b", "c"], allow_none=True), FLAGS),
    ],
    ids=["lists", "separator", "columns"],
)  # fmt: skip
def test_equal_sets_are_one_target(task, cells):
    targets, _ = read(task, cells)
    assert targets.labels == LABELS and targets.ids.tolist() == [0, 0, 1, 1, 2]
    assert sets(targets) == ["a, b", "(none)", "c"]
    table = pa.table({"label_set": targets.columns["label_set"].take(pa.array([2, 0, 0]))})
    assert task.truth(table).astype(int).tolist() == [[0, 0, 1], [1, 1, 0], [1, 1, 0]]
    assert task.truth(table.slice(1)).sum() == 4 and task.truth(table.slice(0, 0)).shape == (0, 3)
    assert task.label_counts(targets, np.array([0, 0, 2])) == {"a": 2, "b": 2, "c": 1}


def test_cells_of_columns_and_label_maps():
    assert MultiLabel(columns=[2019, 2020]).form.columns == ["2019", "2020"]
    task = MultiLabel(columns=["is_a", "is_b"])
    raw = pa.record_batch({"text": ["x", "y"], "is_b": ["1", "0"], "is_a": ["0", "1"]})
    cells = task.cells(raw, None).to_pylist()
    targets, config = read(task, cells, label_map={"is_a": "a", "is_b": "b"})
    assert targets.labels == ["a", "b"] and sets(targets) == ["b", "a"]
    assert task.table_columns(config) == {"is_a": "task.columns", "is_b": "task.columns"}
    assert task.table_cells('["b"]', config) == {"is_a": 0, "is_b": 1}
    assert sets(read(MultiLabel(), ["[1, 2.50]", "[true]"])[0]) == ["1, 2.50"]
    assert read(MultiLabel("|"), ["x|b", "b"], labels=["b", "a"], label_map={"x": "a"})[0].ids.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("task", "cells", "parts"),
    [
        (MultiLabel(";"), ["a;b", ""], ["no label", "task.allow_none=true", "row 7"]),
        (MultiLabel(), ['["a", "b"]', "[]"], ["no label", "task.allow_none=true"]),
        (MultiLabel(), ['["a", "b"]', "a;b"], ["'a;b'", "task.separator"]),
        (MultiLabel(), ['["a", "b"]', '["a", null]'], ["null", "list of labels"]),
        (MultiLabel(), ['["a", "b"]', '{"a": 1}'], ["list of labels"]),
        (MultiLabel(columns=["a", "b"]), ["1\x1f0", "0\x1f2"], ["a, b", "0 or 1", "2"]),
        (MultiLabel(columns=["a", "b"]), ["1\x1f0", "0\x1f"], ["0 or 1"]),
    ],
)
def test_cells_that_are_refused(task, cells, parts):
    targets, config = read(task, cells)
    assert targets.ids.tolist() == [0, -1]
    error = str(task.bad_cells("t.csv tags", [cells[1]], [7], targets.labels, config))
    assert all(part in error for part in [*parts, "t.csv", "row 7"]), error


def test_labels_in_no_list():
    targets, config = read(MultiLabel(";"), ["a;b", "a;bb", "c"], labels=["a", "b"])
    assert targets.ids.tolist() == [0, -1, -1]
    error = MultiLabel(";").bad_cells("t.csv tags", ["a;bb", "c"], [2, 3], targets.labels, config)
    assert isinstance(error, DataError) and "'bb'" in str(error) and "row 2" in str(error)
    with pytest.raises(ConfigError, match=r"task\.thresholds\.aa.*did you mean"):
        read(MultiLabel(";", thresholds={"aa": 0.5}), ["aaa;b"])
    assert read(MultiLabel(thresholds={"a": 0.5}), ["a;b"])[0].ids.tolist() == [-1], "the cells are the fault"
    for cells in (["a", "a;a"], ["", ";"]):
        with pytest.raises(DataError, match="tags.*expected at least two"):
            read(MultiLabel(";", allow_none=True), cells)


def test_a_label_that_train_lacks():
    task = MultiLabel(";")
    targets, config = read(task, ["a;b", "c"])
    with pytest.raises(DataError, match="label c"):
        task.check_train("t.csv", targets, np.array([0, 0]), config)


def scores(n=400, n_labels=3, seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.random((n, n_labels)) < [0.5, 0.2, 0.05][:n_labels]
    return np.clip(rng.random((n, n_labels)) * 0.6 + truth * 0.25, 0, 1), truth


def test_thresholds_have_the_highest_f1():
    probs, truth = scores()
    found = label_sets.best_thresholds(probs, truth)
    for i, threshold in enumerate(found):
        best = max(sk.f1_score(truth[:, i], probs[:, i] >= cut) for cut in np.unique(probs[:, i]))
        assert sk.f1_score(truth[:, i], probs[:, i] >= threshold) == pytest.approx(best)
    task = MultiLabel(thresholds={"b": 0.9}).fitted(probs, truth, LABELS)
    assert task.levels(3).tolist() == [found[0], 0.9, found[2]]
    again = make_task(json.loads(json.dumps(task.section())))
    assert (again.decide(probs) == task.decide(probs)).all() and (MultiLabel().decide(probs) == (probs >= 0.5)).all()
    assert label_sets.best_thresholds(np.full((4, 2), 0.3), np.array([[False, True]] * 4)).tolist() == [0.5, 0.15]


def test_thresholds_do_not_make_the_splits_again(write):
    rows = [json.dumps({"text": f"text {i}", "tags": ["a", "bc"[i % 2]][: 1 + i % 3]}) for i in range(60)]
    config = compose(["data=csv", f"data.path={write('t.jsonl', chr(10).join(rows))}", "data.label_column=tags"]).data
    made = ensure_splits(config, "splits", MultiLabel())
    before = Path("splits/train.parquet").stat().st_mtime_ns
    assert ensure_splits(config, "splits", MultiLabel(thresholds={"b": 0.9})) == made
    assert Path("splits/train.parquet").stat().st_mtime_ns == before
    assert ensure_splits(config, "splits", MultiLabel(allow_none=True))["fingerprint"] != made["fingerprint"]
    with pytest.raises(ConfigError, match=r"task\.thresholds\.bb"):  # splits that exist are not read for their labels
        MultiLabel(thresholds={"bb": 0.9}).targets(read_split("splits", "val"), made["labels"], None)


@pytest.mark.parametrize("name", ["MulticlassF1Score", "MulticlassMatthewsCorrCoef", "MulticlassExactMatch"])
def test_metrics_for_one_label_per_text_are_refused(name):
    kept = {"kept": {"_target_": "torchmetrics.classification.MultilabelRankingLoss"}}
    own_metrics.OwnMetrics(kept, 3, MultiLabel())
    with pytest.raises(ConfigError, match=rf"metrics\.x: .*{name}.*task=multi_label"):
        own_metrics.OwnMetrics({**kept, "x": {"_target_": f"torchmetrics.classification.{name}"}}, 3, MultiLabel())


def test_thresholds_of_other_labels_are_refused():
    task = MultiLabel(thresholds={"a": 0.3, "b": 0.5})
    task.check_labels(["a", "b"])
    for labels in (["b", "a"], ["a", "b", "c"], ["a"]):
        with pytest.raises(ConfigError, match=r"task\.thresholds"):
            task.check_labels(labels)
    probs, truth = scores()
    fitted = MultiLabel(thresholds={"c": 0.2, "other": 0.5}).fitted(probs, truth, LABELS)
    assert list(fitted.thresholds) == LABELS and fitted.thresholds["c"] == 0.2


def test_another_model_is_compared_by_its_own_thresholds():
    probs, truth = scores()
    own, other = (MultiLabel(thresholds=dict.fromkeys(LABELS, level)) for level in (0.5, 0.25))
    assert own.score(own.as_of_own(probs, other), truth) == other.score(probs, truth) != own.score(probs, truth)


def test_moved_probabilities_keep_decisions_and_order():
    probs, _ = scores()
    own, to = np.array([0.2, 0.5, 0.9]), np.array([0.7, 0.5, 0.1])
    changed = label_sets.moved(probs, own, to)
    assert ((changed >= to) == (probs >= own)).all() and (changed.argsort(0) == probs.argsort(0)).all()


def test_metrics_are_those_of_scikit_learn():
    probs, truth = scores()
    decided = probs >= 0.5
    measured = label_sets.summary(truth, decided)
    known = {
        f"{kind}_f1": sk.f1_score(truth, decided, average=average) for kind, average in (("macro", "macro"), ("micro", "micro"))
    }
    assert measured["hamming_loss"] == pytest.approx(sk.hamming_loss(truth, decided))
    assert {name: measured[name] for name in known} == pytest.approx(known)
    sample = sk.f1_score(truth, decided, average="samples", zero_division=1)
    assert measured["sample_f1"] == pytest.approx(sample)
    settings = configured().evaluate
    of = MultiLabel().measure(probs, truth, LABELS, settings)
    assert of["average_precision"] == pytest.approx(sk.average_precision_score(truth, probs, average="macro"))
    assert {metric.name for metric in MultiLabel.metrics} <= of.keys() and of["labels"]["b"]["threshold"] == 0.5
    low, high = of["interval_95"]["macro_f1"].values()
    assert low < of["macro_f1"] < high and high - low < 0.2
    assert MultiLabel().calibration_error(truth.astype(float), truth) == 0


def test_gains_are_those_of_drawing_rows():
    (better, truth), (worse, _) = scores(), scores(seed=1)
    gains = MultiLabel().gains(truth, better, worse, 2000)
    task = MultiLabel()
    drawn = super(MultiLabel, task).gains(truth, better, worse, 300)
    assert gains.mean() == pytest.approx(drawn.mean(), abs=0.01) and gains.std() == pytest.approx(drawn.std(), rel=0.2)
    assert (task.gains(truth, better, better, 50) == 0).all()


def test_answers():
    task = MultiLabel(thresholds={"a": 0.3, "b": 0.5, "c": 0.9}, allow_none=True)
    assert task.prediction([0.3, 0.4, 0.95], LABELS) == LabelSet(["a", "c"], {"a": 0.3, "b": 0.4, "c": 0.95})
    probs = np.array([[0.3, 0.4, 0.95], [0.1, 0.2, 0.1]])
    columns = task.columns(probs, LABELS)
    assert columns["labels"].to_pylist() == [["a", "c"], []] and columns["prob_b"].to_pylist() == [0.4, 0.2]
    none = task.prediction(probs[1].tolist(), LABELS)
    assert task.shown(none)[0] == "(none)" and task.logged(none) == ("[]", pytest.approx(0.8))
    assert task.explained(none, LABELS) == 1 and task.counted(none) == ([], None)
    assert task.meets(task.prediction(probs[0].tolist(), LABELS), "a") and task.meets(none, "not a")
    assert task.agreement(probs, probs[::-1]) == 0 and task.agreement(probs, probs) == 1
    assert task.drift_values(probs, LABELS)["labels"].tolist() == [[True, False, True], [False] * 3]
    assert task.uncertainty(np.array([[0.31, 0, 0], [0.0, 0.0, 0.0]])).argmax() == 0
    assert task.is_valid(probs) and not task.is_valid(probs * 2) and not task.is_valid(probs * np.nan)


def test_answers_of_people():
    task = MultiLabel(allow_none=True)
    for answer in (["c", "a"], '["c","a"]', ["a", "c", "a"]):
        assert task.check_answer(answer, LABELS) == '["a", "c"]'
    assert task.check_answer("b", LABELS) == '["b"]' and task.check_answer([], LABELS) == "[]"
    for wrong in (["x"], "x", 3, [3], None, '["x"]', "[", {"a": 1}):
        with pytest.raises(DataError, match="labels="):
            task.check_answer(wrong, LABELS)
    assert MultiLabel(";").check_answer("c; a", LABELS) == MultiLabel(";").check_answer(["c", "a"], LABELS)
    with pytest.raises(DataError, match="allow_none"):
        MultiLabel().check_answer([], LABELS)
    assert task.merged(['["a"]', '["a", "b"]', "[]"]) == '["a"]' and task.merged(['["a"]', "[]"]) is None
    assert task.merged([]) is None and task.merged(["[]", "[]"]) == "[]"
    assert MultiLabel().merged(['["a"]', '["b"]', '["c"]']) is None
    assert task.check_answer("[a]", ["[a]", "b"]) == '["[a]"]'


def test_the_loss_is_the_binary_cross_entropy():
    logits, targets = torch.randn(5, 3), torch.tensor([[1.0, 0, 0]] * 5)
    probs, weights = logits.sigmoid(), torch.tensor([2.0, 1, 1])
    expected = -(weights * targets * probs.log() + (1 - targets) * (1 - probs).log()).mean()
    assert losses.BinaryCrossEntropyLoss(weights)(logits, targets) == pytest.approx(float(expected), rel=1e-5)
    each = losses.BinaryCrossEntropyLoss(weights).validate(logits, targets.bool())
    assert each.shape == (5,) and each.mean() == pytest.approx(
        float(losses.BinaryCrossEntropyLoss()(logits, targets)), rel=1e-5
    )
    assert MultiLabel().balanced_weights(np.array([[True, False], [False] * 2, [False] * 2]), 2).tolist() == [2, 3]
