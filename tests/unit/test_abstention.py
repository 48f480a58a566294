"""Thresholds that keep a target and label sets that keep a coverage: the numbers, and what is refused."""

import numpy as np
import pytest

from sodaops.config.compose import compose
from sodaops.errors import ConfigError
from sodaops.tasks.abstention import check_counts, choose_cutoff, choose_levels, choose_threshold, share


def answers(n, seed=0):
    """Confidences between 0.5 and 1, each with that chance of being right: above t the accuracy is (1 + t) / 2."""
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(0.5, 1, n)
    return confidence, rng.random(n) < confidence


def test_a_target_holds_in_95_of_100_draws_and_most_texts_are_answered():
    thresholds = [choose_threshold(*answers(400, seed), 0.85) for seed in range(300)]
    chosen = np.array([1.0 if threshold is None else threshold for threshold in thresholds])
    assert (chosen < 0.7).mean() <= 0.05 + 2 * (0.05 * 0.95 / 300) ** 0.5  # above 0.7 the accuracy is 0.85
    assert 0.7 < np.median(chosen) < 0.85 and (chosen == 1).mean() < 0.15


def test_a_threshold_leaves_out_all_rows_of_an_equal_confidence():
    confidence, is_right = np.repeat([0.9, 0.8, 0.7], 200), np.repeat([True, True, False], 200)
    assert choose_threshold(confidence, is_right, 0.9) == pytest.approx(0.7)  # some rows of 0.7 would pass, but not all
    assert choose_threshold(confidence, np.ones(600, bool), 0.9) == 0.0


def test_no_threshold_reaches_a_target():
    wrong = np.tile([True, True, True, False], 100)
    confidence = np.linspace(0.9, 0.5, 400)
    assert choose_threshold(confidence, wrong, 0.9) is None
    best = max(n / 1000 for n in range(1, 1000) if choose_threshold(confidence, wrong, n / 1000) is not None)
    assert 0.65 < best < 0.75
    probs = np.stack([confidence, 1 - confidence], 1)
    with pytest.raises(ConfigError, match=rf"evaluate\.target_accuracy=0\.9\b.*{best:.3f}"):
        choose_levels({"target_accuracy": 0.9}, probs, np.zeros(400, int), np.where(wrong, 0, 1), ["a", "b"])
    with pytest.raises(ConfigError, match=r"evaluate\.target_accuracy\.a=0\.9\b"):
        choose_levels({"target_accuracy": {"a": 0.9}}, probs, np.zeros(400, int), np.where(wrong, 0, 1), ["a", "b"])


def test_each_label_has_a_threshold_for_its_own_precision():
    confidence, is_right = answers(600)
    probs = np.stack([confidence, 1 - confidence], 1)
    decided = np.tile([0, 1], 300)
    probs[decided == 1] = probs[decided == 1][:, ::-1]
    truth = np.where(is_right, decided, 1 - decided)
    levels = choose_levels({"target_accuracy": {"b": 0.85}}, probs, decided, truth, ["a", "b"])
    own = decided == 1
    assert levels["thresholds"] == {"a": 0.0, "b": choose_threshold(confidence[own], is_right[own], 0.85)}


def test_a_label_set_has_the_right_label_as_often_as_stated():
    rng = np.random.default_rng(0)
    cutoffs = [choose_cutoff(rng.random(50), 0.9) for _ in range(2000)]  # of uniform probabilities: covers 1 - cutoff
    assert 1 - np.mean(cutoffs) == pytest.approx(1 - 5 / 51, abs=0.005)
    assert choose_cutoff(np.array([0.3] * 9), 0.9) == 0.3


@pytest.mark.parametrize(
    ("promises", "n_rows", "key", "needed"),
    [
        ({"target_accuracy": 0.95}, {"a": 29, "b": 29}, "evaluate.target_accuracy=0.95", "59"),
        ({"target_accuracy": {"b": 0.9}}, {"a": 90, "b": 28}, "evaluate.target_accuracy.b=0.9", "29"),
        ({"target_accuracy": {"c": 0.9}}, {"a": 90, "b": 90}, "evaluate.target_accuracy.c", "a, b"),
        ({"set_coverage": 0.95}, {"a": 18, "b": 90}, "evaluate.set_coverage=0.95", "19"),
    ],
)
def test_too_few_rows_and_unknown_labels(promises, n_rows, key, needed):
    with pytest.raises(ConfigError) as raised:
        check_counts(promises, ["a", "b"], n_rows)
    assert key in str(raised.value) and needed in str(raised.value)


def test_enough_rows_are_accepted():
    check_counts({"target_accuracy": 0.95, "set_coverage": 0.95}, ["a", "b"], {"a": 19, "b": 40})


@pytest.mark.parametrize("n_rows", [0, 8])
def test_a_label_of_too_few_answers_is_in_every_set(n_rows):
    """Rows without tokens have no answer, so fewer may be left than were counted."""
    assert choose_cutoff(np.linspace(0.5, 0.9, n_rows), 0.9) == 0


def test_shares_have_intervals():
    assert share(np.arange(10) < 8) == pytest.approx({"n": 10, "share": 0.8, "low": 0.49016, "high": 0.94332}, abs=1e-4)
    assert share(np.zeros(0, bool)) == {"n": 0, "share": None, "low": 0.0, "high": 1.0}


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (["task=multi_label", "data=csv", "data.path=a.csv", "evaluate.target_accuracy=0.9"], ["evaluate.target_accuracy"]),
        (["task=regression", "data=csv", "data.path=a.csv", "evaluate.set_coverage=0.9"], ["evaluate.set_coverage"]),
        (["evaluate.target_accuracy=1.0"], ["evaluate.target_accuracy"]),
        (["evaluate.target_accuracy={positive: 95}"], ["evaluate.target_accuracy"]),
        (["evaluate.target_accuracy=0.9", "export.variants=[]", "evaluate.split=none"], ["evaluate.target_accuracy"]),
    ],
)
def test_the_configuration_refuses(overrides, keys):
    with pytest.raises(ConfigError) as raised:
        compose(overrides)
    assert all(key in str(raised.value) for key in keys)
