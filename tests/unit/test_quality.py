"""Quality without labels in a drift check, and drift by segment."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from sodaops.bundle import reference
from sodaops.config.schema import DriftConfig
from sodaops.drift.features import Feature
from sodaops.inference.predictor import Predictor
from sodaops.request_log.window import Window
from sodaops.tasks.regression import Regression
from sodaops.tasks.single_label import SingleLabel
from tests.conftest import lazy
from tests.requests import log_rows
from tests.watching import SOURCES, reviews as all_reviews, truth, tweets

check = lazy("sodaops.drift.check")
measure = lazy("sodaops.drift.measure")
quality = lazy("sodaops.drift.quality")
segments = lazy("sodaops.drift.segments")

pytestmark = pytest.mark.slow
SETTINGS = DriftConfig(n_permutations=1000)


@pytest.fixture(scope="module")
def predictor(drift_bundle):
    return Predictor(drift_bundle)


@pytest.fixture(scope="module")
def known(drift_bundle, predictor):
    return reference.read_reference(drift_bundle, predictor.info)


@pytest.fixture(scope="module")
def fresh(predictor):
    return log_rows(predictor, tweets()[2000:3200])


@pytest.fixture(scope="module")
def reviews(predictor):
    return log_rows(predictor, all_reviews()[:150])


@pytest.fixture(scope="module")
def judge(predictor):
    """A drift check of the rows of some tables."""

    def go(known, *tables, **settings):
        rows, changed = pa.concat_tables(tables), SETTINGS.model_copy(update=settings)
        return measure.measure_drift(changed, predictor.info, known, Window(rows, len(rows)))[0]

    return go


def sent(rows, *values, column="source"):
    """Rows with a context, with these values in turns."""
    cells = [json.dumps({column: values[i % len(values)]}) for i in range(len(rows))]
    return rows.set_column(rows.column_names.index("context"), "context", pa.array(cells, pa.string()))


def test_the_estimate_is_that_of_the_labels(judge, predictor, known, fresh):
    found, labels = judge(known, fresh.slice(0, 600)), np.array(predictor.info.labels)
    right = fresh["label"].to_numpy()[:600] == labels[truth()[2000:2600]]
    accuracy = found.quality.metrics["accuracy"]
    assert found.quality.withheld is None and accuracy.low <= right.mean() <= accuracy.high
    assert accuracy.value == pytest.approx(right.mean(), abs=0.04) and accuracy.high - accuracy.low < 0.15
    assert f"accuracy {accuracy.value:.3f} (" in check.format_result(found)


def positives(rows, n):
    """Rows with more positive labels than at random."""
    first = rows.filter(pc.equal(rows["label"], "positive")).slice(0, n)
    return pa.concat_tables([first, rows.filter(pc.not_equal(rows["label"], "positive")).slice(0, n // 2)])


@pytest.mark.parametrize(("reason", "rows", "changes", "settings"), [
    ("drift", lambda fresh, reviews: [reviews], {}, {}),
    ("labels", lambda fresh, reviews: [positives(fresh, 120)], {}, {"min_effect": 1.0}),
    ("rows", lambda fresh, reviews: [fresh.slice(0, 40)], {}, {}),
    ("rows", lambda fresh, reviews: [fresh.slice(0, 49)] * 2, {}, {"max_repeated": 1.0}),
    ("rows", lambda fresh, reviews: [fresh.slice(0, 60).set_column(
        fresh.column_names.index("probs"), "probs", pa.nulls(60, pa.list_(pa.float32())))], {}, {}),
    ("reference", lambda fresh, reviews: [fresh.slice(0, 100)], {"truth": None}, {}),
    ("reference", lambda fresh, reviews: [fresh.slice(0, 100)], {"answers": None}, {}),
])  # fmt: skip
def test_estimates_are_withheld(judge, known, fresh, reviews, reason, rows, changes, settings):
    found = judge(replace(known, **changes), *rows(fresh, reviews), **settings)
    assert found.quality.withheld == reason and found.quality.message and not found.quality.metrics
    assert found.quality.message in check.format_result(found)


@pytest.mark.parametrize(("task", "n_labels"), [(Regression(), 1), (SingleLabel(), 101)])
def test_a_task_without_labels_or_with_very_many_has_no_estimate(known, task, n_labels):
    assert quality.estimate_quality(SETTINGS, task, known, np.zeros((100, n_labels)), []).withheld == "task"


@pytest.mark.parametrize("n_rows", [60, 200, 5000])
def test_windows_like_val_exceed_the_largest_difference_at_the_given_rate(n_rows):
    rng, shares = np.random.default_rng(3), np.array([0.2, 0.5, 0.3])
    counts, exceeded = rng.multinomial(400, shares, size=300), []
    for val in counts:
        window = rng.multinomial(n_rows, shares)
        exceeded.append(np.abs(val / 400 - window / n_rows).sum() / 2 > quality.largest_difference(val, n_rows, 0.05))
    assert 0.02 < np.mean(exceeded) < 0.09


def test_drift_in_one_segment(judge, known, fresh, reviews):
    web, app = sent(fresh.slice(0, 900), "web"), sent(reviews.slice(0, 60), "app")
    found = {segment.value: segment for segment in judge(known, web, app).segments}
    assert found["app"].drifted and "embedding" in found["app"].features and found["web"].drifted is False
    assert (found["app"].n_texts, found["web"].n_texts) == (60, 900)
    assert found["app"].level == 0.01 / 8 / 2 < 1 / 1001  # below the lowest p-value of 1,000 permutations
    assert found["app"].title == "source=app"
    assert judge(known, web, app).quality.withheld == "drift"


def test_segments_like_their_part_of_the_reference(judge, known, fresh):
    found = judge(known, sent(fresh.slice(0, 400), *SOURCES, "tv", "\x1b[1m"), fresh.slice(400, 100))
    by_value = {segment.value: segment for segment in found.segments}
    assert by_value["app"].drifted is by_value["web"].drifted is False and found.quality.metrics
    assert by_value["tv"].drifted is None and (by_value["tv"].n_texts, by_value["tv"].n_val) == (100, 0)
    lines = check.format_result(found)
    assert "source=tv" in lines and "\x1b" not in lines
    assert not judge(known, sent(fresh.slice(0, 100), "app", column="other")).segments
    assert {each.drifted for each in judge(replace(known, segments=None), sent(fresh.slice(0, 100), "app")).segments} == {None}


def test_false_alarms_do_not_grow_with_the_segments(known, fresh):
    """With uniform p-values, alarms in any of the segments are as frequent as in a single window: 5 %."""
    rng, alarms = np.random.default_rng(5), 0
    rows = sent(fresh.slice(0, 400), *"abcdefg", "rare" * 9)
    known = replace(known, segments=np.array([*"abcdefg", "rare" * 9])[np.arange(2000) % 8, None])

    def compare(part, rows, level):
        assert len(rows) == 50 and len(part.seen) == len(part.sketches) == 250
        return [Feature("letters", p := float(rng.random()), None, p < level, None, None)]

    for _ in range(200):
        found = segments.compare_segments(["source"], known, rows, 50, 0.05, compare)
        alarms += any(segment.drifted for segment in found)
    assert len(found) == 8 and 2 <= alarms <= 19


def test_many_values_are_bounded(known, fresh):
    rows = sent(fresh.slice(0, 1000), *(f"v{n}" for n in range(300)))
    found = segments.compare_segments(["source"], known, rows, 50, 0.05, None)
    assert len(found) == segments.MAX_SEGMENTS and all(segment.drifted is None for segment in found)
