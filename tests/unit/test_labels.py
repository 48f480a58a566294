"""Suspected errors in labels: their ranking, the models behind it, and their way through annotation into the data."""

import csv
import html
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from sodaops.annotation.store import Store
from sodaops.data.preprocess import preprocess, read_manifest, read_split
from sodaops.data.splits import SPLITS
from sodaops.errors import ConfigError, DataError
from sodaops.labels.check import check_labels, read_suspects
from sodaops.labels.folds import assign_folds
from sodaops.labels.ranking import rank_labels, suspicious_slices
from sodaops.tasks.ordinal import Ordinal
from sodaops.text.near import near_pairs
from tests.conftest import TWEETS, configured, lazy, make_rows, table

pipeline = lazy("sodaops.pipeline")
LABELS = ["negative", "neutral", "positive"]
KEYS = (
    "data.path=t.csv", "data.added=added", "evaluate.splits_dir=splits", "data.slice_columns=[channel]", "model=tiny",
    "labels.folds=3",
)  # fmt: skip
FLIPPED = range(0, 300, 5)


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def tweets(workdir):
    """The first 300 tweets; every fifth came through the channel app, and has a wrong label, which its votes contradict."""
    rows = rows_of(TWEETS)[:300]
    for i, row in enumerate(rows):
        row["channel"] = "web"
        if i in FLIPPED:
            row["channel"], row["sentiment"] = "app", LABELS[(LABELS.index(row["sentiment"]) + 1) % 3]
    Path("t.csv").write_text(table([list(row.values()) for row in rows], list(rows[0])), encoding="utf-8")
    return [row["text"] for row in rows]


@pytest.fixture
def model(trained):
    """In place of a training of each fold: a bundle that exists; ``calls`` has the configurations."""

    def train(config):
        train.calls.append(config)
        if len(train.calls) == train.stop_at:
            raise KeyboardInterrupt
        shutil.copytree(trained / "run/bundle", Path(config.run_dir) / "bundle")

    train.calls, train.stop_at = [], 0
    return train


def test_the_ranking_finds_flips_and_says_why():
    rng = np.random.default_rng(0)
    clean = rng.integers(0, 3, 300)
    truth = np.where(np.arange(300) < 30, (clean + 1) % 3, clean)
    probs = np.where(np.eye(3)[clean] > 0, 0.8, 0.1) + rng.uniform(-0.05, 0.05, (300, 3))
    probs[299] = np.nan
    texts = ["", *(" ".join(map(str, rng.integers(0, 10**6, 9))) for _ in range(298)), ""]
    texts[0], texts[299] = (
        "the train is late again and nobody cares at all",
        "The train is late again, and nobody cares at all!",
    )
    votes: list[list[int] | None] = [None] * 300
    votes[1] = (np.eye(3, dtype=int)[clean[1]] * 9).tolist()
    truth[299] = clean[299] = clean[0]
    ranking = rank_labels(pa.table({"text": texts, "votes": pa.array(votes, pa.list_(pa.int64()))}), probs, truth, 0.7)
    assert set(np.argsort(-ranking.scores)[:30]) <= {*range(30), 299} and np.isfinite(ranking.scores).all()
    assert (ranking.suggested[:30] == clean[:30]).all() and (ranking.suggested != truth).all()
    assert np.flatnonzero(ranking.contradicts["model"]).tolist() == list(range(30))
    assert np.flatnonzero(ranking.contradicts["votes"]).tolist() == [1]
    assert np.flatnonzero(ranking.contradicts["duplicate"]).tolist() == [0, 299]
    assert ranking.duplicates[[0, 1, 299]].tolist() == [299, -1, 0]


@pytest.mark.slow
def test_near_pairs_are_those_of_all_comparisons():
    texts = [row["text"] for row in rows_of(TWEETS)[:150]]
    texts += [text[:-7] for text in texts[:40]] + ["", "!", "ok"]

    def grams(text):
        (pair,) = [list(pairs) for pairs in [near_pairs([text], 0.5)]]
        assert pair == []
        padded = f" {' '.join(''.join(c if c.isalnum() else ' ' for c in text.lower()).split()) or text} "
        return {padded[i : i + 5] for i in range(max(1, len(padded) - 4))}

    sets = [grams(text) for text in texts]
    for near in (0.3, 0.7, 1.0):
        expected = {
            (j, i)
            for i, j in itertools.combinations(range(len(sets)), 2)
            if len(sets[i] & sets[j]) >= near * len(sets[i] | sets[j])
        }
        assert set(near_pairs(texts, near)) == expected
    assert len(list(near_pairs([f"{i} made from the one and only template" for i in range(1000)], 0.7))) < 10**6 / 4


def test_a_slice_is_suspicious_only_beyond_chance():
    channel = ["web"] * 900 + ["app"] * 100
    rows = pa.table({"source": ["t.csv"] * 1000, "slice_channel": channel})
    everywhere, in_app = np.arange(1000) % 10 == 0, np.arange(1000) >= 930
    assert suspicious_slices(rows, everywhere) == []
    (found,) = suspicious_slices(rows, in_app)
    assert (found["column"], found["value"], found["n_rows"], found["n_suspected"]) == ("channel", "app", 100, 70)


def test_folds_are_even_in_each_label_whatever_the_order():
    texts, truth = [f"text {i}" for i in range(100)], np.arange(100) % 7 % 3
    fold = assign_folds(texts, truth, 4, LABELS)
    for label in range(3):
        counts = np.bincount(fold[truth == label], minlength=4)
        assert counts.max() - counts.min() <= 1
    assert assign_folds(texts[::-1], truth[::-1], 4, LABELS)[::-1].tolist() == fold.tolist()


def test_a_label_with_fewer_rows_than_folds_is_named_before_any_training(tweets, model):
    rows = [*make_rows(200), ("one of two odd texts", "odd"), ("another odd text", "odd")]
    Path("t.csv").write_text(table(rows), encoding="utf-8")
    with pytest.raises(DataError, match=r"labels\.folds=3.*odd"):
        check_labels(configured("data=csv", *KEYS[:3], "data.fractions=[0.9,0.05,0.05]", *KEYS[4:]), model)
    assert model.calls == []


@pytest.mark.parametrize(("keys", "named"), [
    (["experiment=ratings"], "task=regression"), (["task=multi_label", "data.vote_columns=null"], "task=multi_label"),
    (["teacher=somewhere"], "teacher"),
])  # fmt: skip
def test_what_cannot_be_checked_is_refused_with_its_key(keys, named, model, workdir):
    with pytest.raises(ConfigError, match=named):
        check_labels(configured(*keys), model)
    assert model.calls == [] and not any(workdir.iterdir())


@pytest.mark.slow
def test_a_stopped_check_goes_on_and_a_damaged_fold_is_trained_again(tweets, model, caplog):
    config = configured(*KEYS)
    model.stop_at = 2
    with pytest.raises(KeyboardInterrupt):
        check_labels(config, model)
    stopped = Path(model.calls[-1].run_dir)
    assert (stopped.parent / "train.parquet").is_file() and not Path("outputs/labels").exists()
    first = check_labels(config, model)
    assert len(model.calls) == 4 and model.calls[2].run_dir == str(stopped) and model.calls[2].ckpt_path == "last"
    assert not stopped.parent.exists()  # only what it answered is kept
    content = Path("outputs/labels/labels.csv").read_bytes()
    (damaged,) = Path(".splits.labels").glob("*/1.parquet")
    damaged.write_bytes(damaged.read_bytes()[:40])
    assert check_labels(config, model) == first and len(model.calls) == 5
    assert str(damaged) in caplog.text and Path("outputs/labels/labels.csv").read_bytes() == content
    check_labels(configured(*KEYS, "optim.lr=1e-3"), model)
    assert len(model.calls) == 8
    assert not any(text in caplog.text for text in tweets)


def test_each_fold_learns_from_the_other_rows_only(tweets, model):
    seen = []

    def train(config):
        folder = Path(config.evaluate.splits_dir)
        seen.append({split: set(read_split(folder, split)["text"].to_pylist()) for split in SPLITS})
        assert config.evaluate.promises == {}, "val of a fold is too small for them"
        model(config)

    summary = check_labels(configured(*KEYS, "evaluate.target_accuracy=0.95"), train)
    test = set(read_split("splits", "test")["text"].to_pylist())
    known = {text for split in ("train", "val") for text in read_split("splits", split)["text"].to_pylist()}
    assert set().union(*(fold["test"] for fold in seen)) == known and sum(len(fold["test"]) for fold in seen) == len(known)
    for fold in seen:
        assert set().union(*fold.values()) == known and not known & test
        assert sum(map(len, fold.values())) == len(known) and len(fold["val"]) == pytest.approx(len(known) / 15, rel=0.5)
    assert summary["n_rows"] == {
        "train": len(known) - summary["n_rows"]["val"],
        "val": summary["n_rows"]["val"],
        "test": len(test),
    }
    (found,) = summary["slices"]
    assert (found["column"], found["value"]) == ("channel", "app")
    page, first = html.unescape(Path("outputs/labels/labels.html").read_text()), rows_of("outputs/labels/labels.csv")[0]
    assert first["text"] in page and first["why"].split("; ")[0] in page and summary["warnings"] == []


@pytest.fixture
def checked(tweets, model):
    check_labels(configured(*KEYS), model)
    return {row["text"]: row for row in rows_of("outputs/labels/labels.csv")}


def answer_all(given):
    """Answers what is suspected with the label that is suggested, but confirms the first."""
    tasks = Store("s").state().tasks
    for i, task in enumerate(tasks):
        Store("s").session("ann").answer(task.task, given[task.text]["label" if i == 0 else "suggested"])
    return tasks


@pytest.mark.slow
def test_from_the_ranking_to_corrected_rows(checked, run):
    raw, before = Path("t.csv").read_bytes(), {split: read_split("splits", split).to_pylist() for split in SPLITS}
    code, out, _ = run("annotate", "pick", "--from", "labels", "annotate.store=s", "annotate.n=10", *KEYS[:4])
    assert code == 0 and "s: 10 " in out
    tasks = answer_all(checked)
    usable = [text for text, row in checked.items() if row["split"] != "test"]
    assert [task.text for task in tasks] == usable[:10] and {(task.label, task.why) for task in tasks} == {(None, "label")}
    code, out, _ = run("annotate", "merge", "annotate.store=s", *KEYS[:4])
    (path,) = Path("added").glob("*.csv")
    assert code == 0 and str(path) in out and "1 confirmed" in out and Path("t.csv").read_bytes() == raw
    corrections = rows_of(path)
    assert [row["text"] for row in corrections] == usable[1:10]
    first = checked[usable[1]]
    expected = {"sentiment": first["suggested"], "label_before": first["label"], "corrects": f"t.csv row {first['row']}"}
    assert {name: corrections[0][name] for name in expected} == expected and corrections[0]["channel"] in ("app", "web")
    assert json.loads(path.with_suffix(".json").read_text())["warnings"] == []
    manifest = preprocess(configured(*KEYS).data, "splits")
    assert manifest["dropped"]["replaced"]["n_rows"] == 9 and sum(manifest["added"][str(path)].values()) == 9
    for split in SPLITS:
        after = {row["text"]: row for row in read_split("splits", split).to_pylist()}
        assert after.keys() == {row["text"] for row in before[split]}
        changed = {row["text"] for row in before[split] if row["label"] != after[row["text"]]["label"]}
        assert changed == {text for text in usable[1:10] if checked[text]["split"] == split}
    code, out, _ = run("annotate", "merge", "annotate.store=s", *KEYS[:4])
    assert code == 0 and "10 confirmed" in out and len(list(Path("added").glob("*.csv"))) == 1
    code, _, err = run("annotate", "pick", "--from", "labels", "annotate.store=s", *KEYS[:4])
    assert code == 2 and "labels.output_dir" in err


@pytest.mark.slow
def test_texts_of_several_columns_come_back_whole_and_a_log_needs_a_bundle(tweets, model, run):
    keys = [*KEYS, "data.text_column=[text,id]"]
    check_labels(configured(*keys), model)
    assert {"text_text", "text_id"} < rows_of("outputs/labels/labels.csv")[0].keys()
    assert run("annotate", "pick", "--from", "labels", "annotate.store=s", *keys)[0] == 0
    known = {text for split in ("train", "val") for text in read_split("splits", split)["text"].to_pylist()}
    assert len(Store("s").state().tasks) > 50 and {task.text for task in Store("s").state().tasks} <= known
    code, _, err = run("annotate", "pick", "annotate.store=s")
    assert code == 2 and "bundle" in err


def test_a_long_text_comes_back_whole(tmp_path):
    (tmp_path / "labels.json").write_text('{"data": {"fingerprint": "f"}}')
    (tmp_path / "labels.csv").write_text(table([("x" * 200_000, "good")]))
    (row,) = read_suspects(str(tmp_path), {"fingerprint": "f"}, ["text"])
    assert row["text"] == "x" * 200_000


@pytest.mark.slow
def test_test_rows_are_changed_only_when_they_are_asked_for(checked, model, run):
    everything = ["annotate.store=s", "annotate.n=500", "labels.test=true", *KEYS[:4]]
    assert check_labels(configured(*KEYS, "labels.test=true"), model)["warnings"] and len(model.calls) == 3
    assert run("annotate", "pick", "--from", "labels", *everything)[0] == 0
    tasks, n_test = answer_all(checked), sum(row["split"] == "test" for row in checked.values())
    assert len(tasks) == len(checked) and n_test > 5
    code, out, _ = run("annotate", "merge", "annotate.store=s", *KEYS[:4])
    (path,) = Path("added").glob("*.csv")
    assert code == 0 and f"{n_test} in test" in out and len(rows_of(path)) == len(checked) - n_test - 1
    test = read_split("splits", "test").to_pylist()
    preprocess(configured(*KEYS).data, "splits")
    assert read_split("splits", "test").to_pylist() == test
    code, out, _ = run("annotate", "merge", *everything)
    (second,) = set(Path("added").glob("*.csv")) - {path}
    assert code == 0 and len(rows_of(second)) == n_test
    assert json.loads(second.with_suffix(".json").read_text())["warnings"]
    preprocess(configured(*KEYS).data, "splits")
    after = {row["text"]: row["label"] for row in read_split("splits", "test").to_pylist()}
    assert len(after) == len(test) and sum(after[row["text"]] != row["label"] for row in test) == n_test


def test_the_last_correction_counts_and_one_of_no_row_is_dropped(write):
    rows = make_rows(200)
    write("t.csv", table(rows))
    Path("added").mkdir()
    other = {"good": "bad", "bad": "good"}
    (text, label), (second, _) = rows[:2]
    write("added/1.corrections.csv", table([(text, other[label]), (second, "good"), ("in no other table", "good")]))
    write("added/2.corrections.csv", table([(text, label)]))
    before = {split: [] for split in SPLITS}
    preprocess(configured("data=csv", "data.path=t.csv", "data.added=null").data, "before")
    manifest = preprocess(configured("data=csv", "data.path=t.csv", "data.added=added").data, "splits")
    assert manifest["n_kept"] == 200 and manifest["dropped"]["replaced"]["n_rows"] == 4
    for split in before:
        labels = [
            {row["text"]: row["label"] for row in read_split(folder, split).to_pylist()} for folder in ("before", "splits")
        ]
        assert labels[0] == labels[1]
    assert read_manifest("splits")["splits"] != read_manifest("before")["splits"]


def test_a_merged_label_of_a_binned_number_is_in_its_bin():
    task, data = Ordinal([-1.5, -0.5, 0.5, 1.5]), configured("experiment=ordinal").data
    for place, label in enumerate(task.labels_without_data(data)):
        (cell,) = task.table_cells(label, data).values()
        assert task.read_cells("t.csv", {str(cell): 1}, data).ids.tolist() == [place]


@pytest.mark.slow
def test_a_real_fold_and_the_command(tweets, model, run):
    keys = [*KEYS, "trainer.max_epochs=1"]

    def train(config):
        model.calls.append(config)
        (model if len(model.calls) > 1 else pipeline.train)(config)

    summary = check_labels(configured(*keys), train)
    assert summary["reasons"]["votes"] >= 50 and not list(Path(".splits.labels").glob("*/*/run"))
    code, out, err = run("labels", "check", *keys)  # the folds are finished
    assert code == 0 and "channel=app" in out and "outputs/labels/labels.html" in out
    assert json.loads(Path("outputs/labels/labels.json").read_text()) == summary
    assert not any(text in out + err for text in tweets)
    first = rows_of("outputs/labels/labels.csv")[:20]
    assert np.mean([int(row["row"]) - 1 in FLIPPED for row in first]) > 0.7
