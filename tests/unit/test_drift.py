"""Drift detection: false alarms and power of the tests, the causes that are named, and windows of the request log."""

import hashlib
import itertools
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from sodaops.bundle import layout, reference
from sodaops.config.schema import DriftConfig
from sodaops.errors import BundleError, ConfigError, StorageError
from sodaops.inference.predictor import Predictor
from sodaops.request_log.window import Window, read_window
from tests.conftest import lazy
from tests.requests import START, log_rows, refused_rows, write_log_part
from tests.watching import reviews as all_reviews, tweets

measure = lazy("sodaops.drift.measure")
statistics = lazy("sodaops.drift.statistics")

pytestmark = pytest.mark.slow
SETTINGS = DriftConfig(n_permutations=1000)
NOW = START + timedelta(days=2)
GERMAN = [
    f"{a} {b}"
    for a, b in itertools.product(
        ("Die Lieferung war leider", "Der neue Fernseher ist wirklich", "Gestern fanden wir das Essen",
         "Meine Schwester hält ihn für",
         "Das Gespräch mit dem Kundendienst blieb", "Unser Ausflug nach Thüringen wurde", "Die Verpackung erschien mir"),
        ("außergewöhnlich schlecht verarbeitet", "überraschend gemütlich geworden", "vollkommen unzuverlässig",
         "ziemlich enttäuschend, schade", "ausgezeichnet und empfehlenswert", "zweifelhaft", "so fröhlich wie noch nie zuvor",
         "unglaublich langweilig gewesen", "verspätet, aber vollständig"),
    )
]  # fmt: skip
RUSSIAN = [
    f"{a} {b}"
    for a, b in itertools.product(
        ("Сегодня поезд", "Мой новый телефон", "Этот фильм", "Наш обед", "Вчерашний концерт", "Погода", "Книга"),
        ("меня очень разочаровала", "оказался прекрасным", "опять опоздал на час", "работает плохо", "был слишком дорогим",
         "понравилась всем друзьям", "закончился слишком рано", "стоит своих денег"),
    )
]  # fmt: skip


@pytest.fixture(scope="module")
def predictor(drift_bundle):
    return Predictor(drift_bundle)


@pytest.fixture(scope="module")
def known(drift_bundle, predictor):
    return reference.read_reference(drift_bundle, predictor.info)


@pytest.fixture(scope="module")
def fresh(predictor):
    """Tweets of the same source that the reference does not know, as requests."""
    return log_rows(predictor, tweets()[2000:4000])


@pytest.fixture(scope="module")
def reviews(predictor):
    return log_rows(predictor, all_reviews()[:600])


def judge(predictor, known, *tables, **settings):
    rows = pa.concat_tables(tables)
    found, _ = measure.measure_drift(SETTINGS.model_copy(update=settings), predictor.info, known, Window(rows, len(rows)))
    return found


def names(found):
    return [cause.name for cause in found.causes]


@pytest.mark.slow
def test_the_reference_is_small_holds_no_text_and_is_the_same_each_time(trained, tmp_path):
    file = trained / "run/bundle" / layout.DRIFT
    known = reference.read_reference(trained / "run/bundle", layout.read_info(trained / "run/bundle"))
    train, val = (pq.read_table(trained / f"splits/{split}.parquet")["text"].to_pylist() for split in ("train", "val"))
    assert file.stat().st_size < 100_000 and known.descriptors.shape == (len(train) + len(val), 5)
    assert known.seen.sum() == len(train) and known.descriptors[:, 0].tolist() == [len(text) for text in train + val]
    val_truth = pq.read_table(trained / "splits/val.parquet")["label_id"].to_pylist()
    assert known.truth.tolist() == [-1] * len(train) + val_truth and known.answers.shape == (len(known.truth), 3)
    assert (known.answers.argmax(1) == known.label_ids).all() and known.segments is None
    sketches = known.sketches[known.seen].astype(float)
    np.testing.assert_allclose(sketches.mean(axis=0), 0, atol=0.01)
    np.testing.assert_allclose(sketches.std(axis=0), 1, atol=0.01)
    reference.write_reference(tmp_path, known)
    assert (tmp_path / layout.DRIFT).read_bytes() == file.read_bytes()


def test_a_reference_that_is_missing_or_no_reference(predictor, tmp_path):
    info = predictor.info
    fields = vars(info) | {"files": {name: digest for name, digest in info.files.items() if name != layout.DRIFT}}
    with pytest.raises(BundleError, match="sodaops export"):
        reference.read_reference(tmp_path, layout.BundleInfo(**fields))
    np.savez(tmp_path / layout.DRIFT, format=np.array([{}], dtype=object))  # a pickle within
    digest = hashlib.sha256((tmp_path / layout.DRIFT).read_bytes()).hexdigest()
    with pytest.raises(BundleError, match=r"drift\.npz"):
        reference.read_reference(tmp_path, layout.BundleInfo(**(vars(info) | {"files": {layout.DRIFT: digest}})))


@pytest.mark.parametrize("mix", [(0.5, 0.5), (0.5, 0.9)], ids=["same mix of labels", "another mix of labels"])
def test_the_embeddings_test_keeps_its_level(mix):
    """Of 400 windows without a shift within labels, 20 are flagged on average at level 0.05; 10 to 31 in 99 % of cases."""
    rng, alarms = np.random.default_rng(7), 0
    for _ in range(400):
        labels = [rng.random(n) < share for n, share in zip((60, 40), mix, strict=True)]
        sides = [rng.normal(size=(len(ids), 4)) + 3 * ids[:, None] for ids in labels]
        alarms += statistics.embedding_test(*sides, *(ids.astype(int) for ids in labels), n_permutations=99).p <= 0.05
    assert 9 < alarms < 32


def test_the_embeddings_test_sees_a_shift_within_a_label():
    rng = np.random.default_rng(1)
    labels = np.arange(200) % 2
    old, new = rng.normal(size=(2, 200, 8)).astype(np.float32)
    new[labels == 1] += 1.0
    found = statistics.embedding_test(old, new, labels, labels, n_permutations=999)
    assert found.p == 0.001
    shifted = labels[found.indices[np.argsort(-found.scores)[:40]]]
    assert shifted.mean() > 0.9  # the shifted texts have the highest scores
    scores = statistics.drift_scores(old, new, new)
    assert scores[labels == 1].mean() > 0 > scores[labels == 0].mean()


def test_distances_are_those_of_scipy():
    from scipy.stats import chi2_contingency, ks_2samp

    rng = np.random.default_rng(0)
    a, b = rng.normal(size=80), rng.normal(size=50) + 0.3
    assert statistics.ks_distance(a, b) == pytest.approx(ks_2samp(a, b).statistic)
    counts = np.array([[50, 30, 0, 20], [30, 40, 0, 9]])
    assert statistics.chi_square_p(*counts) == pytest.approx(chi2_contingency(counts[:, [0, 1, 3]]).pvalue)
    assert statistics.chi_square_p(np.array([5, 0]), np.array([9, 0])) == 1.0
    assert statistics.total_variation(np.array([1, 3]), np.array([3, 1])) == 0.5


@pytest.mark.slow
def test_fresh_texts_of_the_same_source_are_no_drift(predictor, known, fresh):
    for first in range(0, 2000, 200):
        found = judge(predictor, known, fresh.slice(first, 200))
        assert found.judged and not found.drifted and not found.causes and found.n_texts == 200, found.message


@pytest.mark.slow
def test_reviews_in_place_of_tweets_are_named(predictor, known, reviews):
    for first in (0, 200, 400):
        found = judge(predictor, known, reviews.slice(first, 200))
        assert found.drifted and names(found) == ["texts"], found.message
        assert found.examples and all(example.text for example in found.examples)


@pytest.mark.slow
def test_causes_are_named(predictor, known, fresh):
    bundle_id = predictor.info.bundle_id
    mixed = fresh.slice(0, 200)
    assert names(judge(predictor, known, log_rows(predictor, GERMAN))) == ["language"]
    assert names(judge(predictor, known, log_rows(predictor, RUSSIAN))) == ["language"]
    outage = judge(predictor, known, mixed, refused_rows(100, bundle_id))
    assert names(outage) == ["empty"] and outage.empty == pytest.approx(1 / 3) and outage.n_rows == 300
    bot = judge(predictor, known, mixed, log_rows(predictor, ["buy followers now"] * 100))
    assert names(bot) == ["repeated"] and "33%" in bot.message and bot.repeated_text == "buy followers now"
    only_a_bot = judge(predictor, known, log_rows(predictor, ["buy followers now"] * 200))
    assert names(only_a_bot) == ["repeated"] and only_a_bot.n_texts == 1
    all_alike = judge(predictor, known, refused_rows(200, bundle_id))
    assert names(all_alike) == ["empty"] and all_alike.n_texts == 0


@pytest.mark.slow
def test_another_mix_of_labels_is_named(predictor, known, fresh):
    shares = {entry["values"]: entry["counts"] for entry in pc.value_counts(fresh["label"]).to_pylist()}
    rare = sorted(shares, key=shares.get)[-2]
    few, many = (fresh.filter(kept(fresh["label"], rare)) for kept in (pc.equal, pc.not_equal))
    assert len(few) > 40
    found = judge(predictor, known, few.slice(0, 100), many.slice(0, 40))
    assert names(found) == ["labels"] and f"{rare} " in found.message, found.message


@pytest.mark.slow
def test_lower_confidence_is_named(predictor, known, fresh):
    scores = fresh["score"].to_numpy() * 0.6
    unsure = fresh.set_column(fresh.column_names.index("score"), "score", pa.array(scores, pa.float32())).slice(0, 200)
    found = judge(predictor, known, unsure)
    assert names(found) == ["confidence"] and "less" in found.message


def test_a_log_of_hashes(predictor, known, reviews):
    hidden = reviews.set_column(reviews.column_names.index("text"), "text", pa.nulls(len(reviews), pa.string()))
    found = judge(predictor, known, hidden)
    assert names(found) == ["texts"] and found.examples
    assert all(example.text is None and len(example.text_sha256) == 64 for example in found.examples)


def test_an_older_log_without_sketches_and_descriptors(predictor, known, fresh):
    kept = ("time", "request_id", "bundle_id", "label", "score", "text_sha256", "labels", "probs", "n_tokens", "place")
    old = pa.Table.from_arrays(
        [fresh[f.name] if f.name in kept else pa.nulls(len(fresh), f.type) for f in fresh.schema], schema=fresh.schema
    )
    found = judge(predictor, known, old.slice(0, 200))
    assert {f.name for f in found.features if f.p is None} == {
        "n_chars", "letters", "non_ascii", "pieces_per_word", "unknown", "embedding"
    }  # fmt: skip
    assert found.judged and not found.drifted


def test_too_few_to_judge(predictor, known, fresh):
    for n in (1, 49):
        found = judge(predictor, known, fresh.slice(0, n))
        assert not found.judged and not found.drifted
        assert str(n) in found.message and "50" in found.message


def test_another_bundles_rows_are_judged_apart(predictor, known, fresh, reviews):
    def answered_by(table, bundle_id):
        return table.set_column(table.column_names.index("bundle_id"), "bundle_id", pa.array([bundle_id] * len(table)))

    found = judge(
        predictor, known, fresh.slice(0, 200), answered_by(reviews, "b2"), answered_by(fresh.slice(300, 20), "b3"),
        answered_by(fresh.slice(400, 300), "b4"),
    )  # fmt: skip
    assert found.n_rows == 200 and not found.drifted
    assert found.others["b2"]["n_rows"] == 600 and "letters" in found.others["b2"]["drifted"]
    assert found.others["b3"] == {"n_rows": 20, "drifted": None} and found.others["b4"] == {"n_rows": 300, "drifted": []}
    alone = judge(predictor, known, answered_by(fresh.slice(0, 200), "b2"))
    assert not alone.judged and alone.n_rows == 0 and list(alone.others) == ["b2"]


def test_the_newest_rows_over_days_and_parts(tmp_path, fresh):
    for day in range(5):
        for part in range(3):
            times = pa.array([START + timedelta(days=day, hours=part, seconds=i) for i in range(40)], pa.timestamp("us", "UTC"))
            write_log_part(tmp_path, fresh.slice(40 * (3 * day + part), 40).set_column(0, "time", times), f"p{part}")
    found = read_window(str(tmp_path), 100, now=START + timedelta(days=9)).rows
    newest = [START + timedelta(days=4, hours=h, seconds=i) for h in range(3) for i in range(40)][-100:]
    assert found["time"].to_pylist() == newest
    across = read_window(str(tmp_path), 200, now=START + timedelta(days=9)).rows
    assert len(across) == 200 and across["time"][0].as_py() == START + timedelta(days=3, hours=1)


def test_a_part_that_reaches_into_the_next_day(tmp_path, fresh):
    late = [datetime(2026, 11, 20, 23, 59, tzinfo=UTC) + timedelta(seconds=2 * i) for i in range(60)]
    write_log_part(tmp_path, fresh.slice(0, 60).set_column(0, "time", pa.array(late, pa.timestamp("us", "UTC"))))
    early = [datetime(2026, 11, 21, 0, 0, tzinfo=UTC) + timedelta(seconds=2 * i) for i in range(30)]
    write_log_part(tmp_path, fresh.slice(60, 30).set_column(0, "time", pa.array(early, pa.timestamp("us", "UTC"))), "b")
    assert read_window(str(tmp_path), 10, now=NOW).rows["time"].to_pylist() == sorted(late + early)[-10:]
    elsewhere = read_window(str(tmp_path), 10, until="2026-11-20T19:00:30-05:00", now=NOW).rows
    until = datetime(2026, 11, 21, 0, 0, 30, tzinfo=UTC)
    assert elsewhere["time"].to_pylist() == [time for time in sorted(late + early) if time < until]
    span = read_window(str(tmp_path), 10, since="2026-11-21", until="2026-11-21T00:00:30", now=NOW).rows
    assert span["time"].to_pylist() == [t for t in sorted(late + early) if t.day == 21 and t.second < 30 and t.minute == 0]


def test_a_long_span_is_sampled(tmp_path, fresh):
    for part in range(2):
        write_log_part(tmp_path, fresh.slice(1000 * part, 1000), f"p{part}")
    window = read_window(str(tmp_path), 10, since="2026-11-20", max_rows=1000, now=NOW)
    assert len(window.rows) == 1000 and window.n_found == 2000
    n_of_first = sum(int(i[1:]) < 1000 for i in window.rows["request_id"].to_pylist())
    assert 430 < n_of_first < 570  # 500 expected; each bound is four standard deviations off


def test_a_clock_that_is_ahead(tmp_path, fresh):
    write_log_part(tmp_path, fresh.slice(0, 100))
    future = pa.array([NOW + timedelta(hours=1, seconds=i) for i in range(30)], pa.timestamp("us", "UTC"))
    write_log_part(tmp_path, fresh.slice(100, 30).set_column(0, "time", future), "b")
    window = read_window(str(tmp_path), 1000, now=NOW)
    assert len(window.rows) == 100 and window.ahead == 30


def test_parts_that_cannot_be_read_are_named(tmp_path, fresh):
    good = write_log_part(tmp_path, fresh.slice(0, 100))
    cut = good.with_name("cut.parquet")
    cut.write_bytes(good.read_bytes()[:-20])
    foreign = good.with_name("foreign.parquet")
    pq.write_table(pa.table({"x": [1]}), foreign)
    (good.parent / "empty.parquet").touch()
    window = read_window(str(tmp_path), 1000, now=NOW)
    assert len(window.rows) == 100 and len(window.skipped) == 3
    assert "without bundle_id, label" in window.skipped[str(foreign)] and str(cut) in window.skipped


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({"since": "yesterday"}, r"drift\.since='yesterday'"),
        ({"since": "2026-11-21", "until": "2026-11-20"}, r"drift\.since=2026-11-21.*drift\.until=2026-11-20"),
    ],
)
def test_refused_times(tmp_path, options, keys):
    with pytest.raises(ConfigError, match=keys):
        read_window(str(tmp_path), 10, **options)


def test_a_missing_log(tmp_path):
    with pytest.raises(StorageError, match="none"):
        read_window(str(tmp_path / "none"), 10)
