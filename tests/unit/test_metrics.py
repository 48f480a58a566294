"""Metrics against scikit-learn and by hand, and the baselines."""

import numpy as np
import pytest

from sodaops.errors import DataError
from tests.conftest import lazy

baselines_module = lazy("sodaops.tasks.baselines")
metrics = lazy("sodaops.tasks.metrics")
sk = lazy("sklearn.metrics")

LABELS = ["a", "b", "c"]


def draw(n=500, n_labels=3, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.choice(n_labels, n, p=rng.dirichlet(np.ones(n_labels) * 5))
    logits = rng.normal(size=(n, n_labels)) + 1.5 * np.eye(n_labels)[ids]
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True), ids


@pytest.mark.parametrize("seed", range(3))
def test_against_scikit_learn(seed):
    probs, ids = draw(seed=seed)
    predicted = probs.argmax(1)
    matrix = metrics.confusion(ids, predicted, 3)
    assert matrix.tolist() == sk.confusion_matrix(ids, predicted).tolist()
    result = metrics.summary(matrix)
    assert result["macro_f1"] == pytest.approx(sk.f1_score(ids, predicted, average="macro"))
    assert result["weighted_f1"] == pytest.approx(sk.f1_score(ids, predicted, average="weighted"))
    assert result["accuracy"] == pytest.approx(sk.accuracy_score(ids, predicted))
    precision, recall, f1, n_rows = sk.precision_recall_fscore_support(ids, predicted)
    for i, values in enumerate(metrics.per_label(matrix, LABELS).values()):
        assert list(values.values()) == pytest.approx([precision[i], recall[i], f1[i], n_rows[i]])
    assert metrics.measure(probs, ids, LABELS, 100)["log_loss"] == pytest.approx(sk.log_loss(ids, probs))


def test_curves_belong_to_their_labels():
    probs, ids = draw()
    result = metrics.curves(probs, ids, LABELS)
    for i, label in enumerate(LABELS):
        assert result[label]["roc_auc"] == pytest.approx(sk.roc_auc_score(ids == i, probs[:, i]))
    shuffled = metrics.curves(probs[:, [1, 2, 0]], ids, LABELS)
    assert shuffled["a"]["roc_auc"] < 0.5 < 0.8 < result["a"]["roc_auc"]


def test_a_label_without_rows():
    probs = np.array([[0.7, 0.2, 0.1], [0.2, 0.7, 0.1]])
    result = metrics.measure(probs, np.array([0, 1]), LABELS, 100)
    assert result["macro_f1"] == result["accuracy"] == 1.0
    assert result["labels"]["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "n_rows": 0}


def test_calibration_by_hand():
    probs = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6]])
    ids = np.array([0, 1, 0, 1])
    # Two answers at 0.9, half of them right; two at 0.6, both right.
    assert metrics.expected_calibration_error(probs, ids, 10) == pytest.approx(0.5 * 0.4 + 0.5 * 0.4)
    bins = metrics.reliability(probs, ids, 10)
    assert bins["n_rows"].tolist() == [0, 0, 0, 0, 0, 2, 0, 0, 2, 0]


def test_calibrated_confidence_has_a_small_error():
    rng = np.random.default_rng(0)
    top = rng.uniform(0.5, 1, 100_000)
    ids = (rng.uniform(size=len(top)) > top).astype(int)
    assert metrics.expected_calibration_error(np.stack([top, 1 - top], 1), ids) < 0.01


def test_bootstrapping_cells_is_bootstrapping_rows():
    probs, ids = draw(300)
    predicted = probs.argmax(1)
    rows = np.random.default_rng(1).integers(0, len(ids), (600, len(ids)))
    by_rows = [metrics.summary(metrics.confusion(ids[r], predicted[r], 3))["macro_f1"] for r in rows]
    low, high = metrics.bootstrap(metrics.confusion(ids, predicted, 3), 20_000)["macro_f1"]
    assert np.quantile(by_rows, [0.025, 0.975]) == pytest.approx([low, high], abs=0.012)


def test_intervals_cover_about_95_percent():
    truth = np.array([[40, 6, 4], [5, 20, 5], [6, 6, 58]])
    expected = metrics.summary(truth)["accuracy"]
    rng = np.random.default_rng(0)
    hits = 0
    for sample in rng.multinomial(150, truth.ravel() / truth.sum(), size=300):
        low, high = metrics.bootstrap(sample.reshape(3, 3), 500)["accuracy"]
        hits += low <= expected <= high
    assert 0.9 <= hits / 300 <= 0.98


@pytest.mark.parametrize(
    ("probs", "ids", "named"),
    [
        (np.empty((0, 3)), np.array([], int), r"\(0, 3\).* 0 "),
        (np.ones((2, 3)) / 3, np.array([0]), r"\(2, 3\).* 1 "),
        (np.full((1, 3), np.nan), np.array([0]), "finite"),
        (np.ones((1, 3)) / 3, np.array([3]), "3 to 3.*0 to 2"),
    ],
)
def test_bad_input(probs, ids, named):
    with pytest.raises(DataError, match=named):
        metrics.measure(probs, ids, LABELS)


@pytest.mark.parametrize("right", [True, False])
def test_an_interval_has_a_width_when_every_row_is_right_or_wrong(right):
    """Every bootstrap sample is then the same. By Wilson, 3 rows of a label say less than 60 of all."""
    matrix = np.diag([57, 3]) if right else np.diag([57, 3])[:, ::-1]
    intervals = metrics.bootstrap(matrix, 200)
    widths = {name: high - low for name, (low, high) in intervals.items()}
    assert all((low, high) != (1.0, 1.0) and (high == 1.0) == right for low, high in intervals.values())
    assert widths["accuracy"] == pytest.approx(1.959964**2 / (60 + 1.959964**2)) and widths["macro_f1"] > 0.2


def test_the_bootstrap_of_many_labels_needs_little_memory():
    """300 labels have 90,000 cells, nearly all empty; 2,000 samples of all of them would be 1.4 GB."""
    import tracemalloc

    ids = np.arange(900) % 300
    matrix = metrics.confusion(ids, np.where(np.arange(900) % 7 == 0, (ids + 1) % 300, ids), 300)
    tracemalloc.start()
    low, high = metrics.bootstrap(matrix, 2000)["macro_f1"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.75 < low < high < 0.9 and peak < 200e6


def test_the_most_frequent_label():
    assert baselines_module.most_frequent(np.array([0, 0, 2, 2, 0]), 2, 3).tolist() == [[0.6, 0, 0.4]] * 2


def test_tfidf_finds_rare_labels():
    """95 % of the rows have one label; without class weights and a fitting strength, logistic regression says only that."""
    rng = np.random.default_rng(0)
    ids = (rng.random(600) < 0.05).astype(int) * 2
    texts = [f"{' '.join(rng.choice(list('abcdefghij'), 30))} {'x' if i or rng.random() < 0.04 else 'y'}" for i in ids]
    probs = baselines_module.tfidf((texts[:400], ids[:400]), texts[400:], 3)
    assert probs[:, 1].tolist() == [0] * 200 and probs.sum(1) == pytest.approx(1)
    assert sk.f1_score(ids[400:], probs.argmax(1), average="macro") > 0.7
    assert (baselines_module.tfidf((texts[:400], ids[:400]), texts[400:], 3) == probs).all()


@pytest.mark.parametrize("rare", [0, 1])
def test_tfidf_of_texts_without_words_and_of_a_label_with_one_row(rare):
    ids = np.where(np.arange(12) == 5, rare, 1 - rare)
    probs = baselines_module.tfidf((["😀"] * 12, ids), ["😀", "!", "新"], 2)
    assert probs.argmax(1).tolist() == [1 - rare] * 3


def test_tfidf_of_a_long_table_uses_a_sample_of_its_rows(monkeypatch):
    """A sample by label: the label of 4 among 400 rows stays in it."""
    from sodaops.tasks import baselines

    monkeypatch.setattr(baselines, "_FIT_ROWS", 100)
    ids = np.where(np.arange(400) % 100 == 7, 1, 0)
    probs = baselines_module.tfidf(([f"row {i} {'odd' if i else 'even'}" for i in ids], ids), ["row 7 odd", "row 8 even"], 2)
    assert probs.argmax(1).tolist() == [1, 0]
