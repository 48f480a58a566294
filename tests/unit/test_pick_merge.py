"""From the request log to texts that people label, and from their labels to a table that training takes in."""

import csv
import hashlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from sodaops.annotation.merge import NearTexts, merge_answers
from sodaops.annotation.store import Store
from sodaops.bundle.reference import read_reference
from sodaops.config.schema import SharesConfig
from sodaops.data.preprocess import preprocess, read_manifest, read_split
from sodaops.data.splits import SPLITS, text_hash
from sodaops.errors import DataError
from sodaops.inference.predictor import Predictor
from tests.conftest import REPO, configured, lazy, make_rows, table
from tests.requests import log_rows, write_log_part

pick_module = lazy("sodaops.annotation.pick")

SHARES = SharesConfig().model_dump()
LABELS = ["negative", "neutral", "positive"]


@pytest.fixture(scope="module")
def window(trained):
    """A predictor, its reference, and the log of what it was asked: known tweets, unknown ones, and reviews."""
    predictor = Predictor(trained / "run/bundle")
    tweets, reviews = (
        pa.csv.read_csv(REPO / f"data/raw/{name}.csv")["text"].to_pylist() for name in ("tweets", "amazon_reviews")
    )
    rows = log_rows(predictor, [*tweets[500:900], *reviews[:300], *reviews[:50]])
    return predictor.info, read_reference(trained / "run/bundle", predictor.info), rows


@pytest.fixture
def picked(window, tmp_path):
    """Picks 40 texts from the window into a new store, unless the test says otherwise."""
    store = Store.create(tmp_path / "store", LABELS)
    info, reference, rows = window

    def pick(**changes):
        return pick_module.pick_tasks(
            info, reference, **{"rows": rows, "store": store, "known": set(), "n": 40, "shares": SHARES, **changes}
        )

    pick.store = store
    return pick


@pytest.fixture(scope="module")
def known(trained):
    return {text_hash(text) for split in SPLITS for text in read_split(trained / "splits", split)["text"].to_pylist()}


def whys(result):
    return [task["why"] for task in result.tasks]


def test_a_share_of_each_kind_and_nothing_that_is_known(picked, known):
    first = picked(known=known)
    assert Counter(whys(first)) == {"uncertain": 12, "drifted": 12, "diverse": 8, "random": 8}
    hashes = {task["text_sha256"] for task in first.tasks}
    assert len(hashes) == 40 and not known & hashes and first.n_known > 90
    assert whys(first) != sorted(whys(first))  # nobody labels a block of one kind
    assert picked.store.add_tasks("first", first.tasks) == 40
    second = picked(known=known)
    assert not {task["text_sha256"] for task in second.tasks} & hashes and second.n_candidates == first.n_candidates - 40


def test_each_kind_is_what_its_name_says(picked, window):
    *_, rows = window
    probs = [sorted(each) for each in rows["probs"].to_pylist()]
    margins = {digest: p[-1] - p[-2] for digest, p in zip(rows["text_sha256"].to_pylist(), probs, strict=True)}
    only = {why: {**dict.fromkeys(SHARES, 0.0), why: 1.0} for why in SHARES}
    results = {why: picked(shares=only[why]) for why in SHARES}
    assert max(margins[task["text_sha256"]] for task in results["uncertain"].tasks) == sorted(margins.values())[39]
    assert len({task["request_id"] for task in results["drifted"].tasks}) == 40
    assert spread(rows, results["diverse"]) > 1.3 * spread(rows, results["random"])
    by_chance = picked(shares=only["random"], n=300)
    assert 0.33 < np.mean([int(task["request_id"][1:]) >= 400 for task in by_chance.tasks]) < 0.53  # 300 of 700 are reviews


def spread(rows, result):
    chosen = rows.filter(pc.is_in(rows["request_id"], pa.array([task["request_id"] for task in result.tasks])))
    sketches = np.array(chosen["sketch"].to_pylist())
    return float(np.linalg.norm(sketches[:, None] - sketches[None], axis=2).mean())


def test_shares_that_round_up_pick_no_more_than_n(picked, window):
    shares = {"uncertain": 0.3, "drifted": 0.3, "diverse": 0.4, "random": 0.0}
    for n in (1, 7, 25):
        assert len(picked(shares=shares, n=n).tasks) == n
    assert picked(known=set(window[2]["text_sha256"].to_pylist())).tasks == []


def test_windows_without_texts_answers_or_sketches(picked, window):
    *_, rows = window

    def without(column):
        return rows.set_column(rows.column_names.index(column), column, pa.nulls(len(rows), rows[column].type))

    with pytest.raises(DataError, match=r"serve\.log_texts"):
        picked(rows=without("text"))
    with pytest.raises(DataError, match=window[0].bundle_id):
        picked(rows=rows.slice(0, 0))
    assert set(whys(picked(rows=without("sketch")))) == {"uncertain", "random"}
    assert picked(rows=rows.slice(0, 3)).tasks


def test_feedback_on_a_request_becomes_a_task_with_its_answer(picked, known):
    store = picked.store
    store.append_feedback("r450", 0, "negative")
    store.append_feedback("nobody", 0, "negative")
    result = picked(known=known, n=4)
    assert [task["request_id"] for task in result.tasks if task["why"] == "feedback"] == ["r450"]
    store.add_tasks("first", result.tasks)
    assert list(store.state().answers.values()) == [{"feedback": "negative"}]
    assert store.feedback_without_task() == {("nobody", 0)}


def test_feedback_on_a_text_that_was_asked_twice_or_under_a_shared_id(picked, window, known):
    store, rows = picked.store, window[2]
    twice = pa.concat_tables([rows.slice(450, 1), rows.slice(450, 1).set_column(1, "request_id", pa.array(["again"]))])
    shared = rows.slice(500, 2).set_column(1, "request_id", pa.array(["fixed", "fixed"]))
    store.append_feedback("again", 0, "negative")
    store.append_feedback("fixed", 0, "negative")
    result = picked(rows=pa.concat_tables([twice, shared]))
    assert store.add_tasks("t", result.tasks) == len(result.tasks) == 3
    assert list(store.state().answers.values()) == [{"feedback": "negative"}]  # the shared id could mean either text
    test = rows.filter(pc.is_in(rows["text_sha256"], pa.array(sorted(known)))).slice(0, 1)
    store.append_feedback(test["request_id"][0].as_py(), 0, "negative")
    assert picked(rows=test, known=known).tasks == []


def test_the_commands(trained, window, run, workdir):
    write_log_part(workdir / "log", window[2])
    splits, log = f"evaluate.splits_dir={trained / 'splits'}", f"drift.request_log={workdir / 'log'}"
    pick = ["annotate", "pick", trained / "run/bundle", splits, "annotate.n=20", "annotate.store=s"]
    code, out, _ = run(*pick, log)
    assert code == 0 and out.startswith("s: 20 new texts (")
    code, out, _ = run("annotate", "status", "annotate.store=s")
    assert code == 0 and out.startswith("s: 20 texts, 0 ")
    digest = Store("s").state().tasks[0].text_sha256
    code, out, _ = run("log", "forget", f"--text-hash={digest}", log, "annotate.store=s")
    assert code == 0 and "s: 1 texts" in out and len(Store("s").state().tasks) == 19
    for changes, named in ((["drift.request_log=none"], "none"), ([log, "annotate.shares.random=0.5"], "1.3")):
        code, _, err = run(*pick, *changes)
        assert code == 2 and named in err


@pytest.fixture
def config(write):
    """A data set of generated texts, already split."""
    write("t.csv", table(make_rows(300)))
    config = configured("data=csv", "data.path=t.csv").data
    preprocess(config, "splits")
    return config


@pytest.fixture
def store(workdir):
    return Store.create("store", ["bad", "good"])


def labelled(store, *answers):
    """Texts, each with the labels of annotators a, b, c."""
    tasks = [{"text": text, "text_sha256": hashlib.sha256(text.encode()).hexdigest(), "why": "random"} for text, *_ in answers]
    store.add_tasks("t", tasks)
    for task, (_, *labels) in zip(tasks, answers, strict=True):
        for name, label in zip("abc", labels, strict=False):
            store.session(name).answer(task["text_sha256"][:16], label)


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_accepted_labels_become_a_table_that_training_takes_and_test_stays(config, store):
    before = read_manifest("splits")
    test = read_split("splits", "test").to_pylist()
    texts = [f"a quite new text about thing {i}, said by someone" for i in range(60)]
    labelled(store, *[(text, "good", "good", "bad") for text in texts])
    result = merge_answers(store, config, Path("splits"), 1, 0.7)
    assert result.counts == {"good": 60} and result.path.parent == Path("data/raw/added/t")
    (row, *_) = rows_of(result.path)
    assert row["text"] == texts[0] and row["label"] == "good" and (row["votes_good"], row["votes_bad"]) == ("2", "1")
    assert row["annotators"] == "a b c" and row["source"] == "annotation"
    after = preprocess(config, "splits")
    assert after["fingerprint"] != before["fingerprint"]
    assert read_split("splits", "test").to_pylist() == test
    added = after["added"][str(result.path)]
    assert added.keys() == {"train", "val"} and sum(added.values()) == 60 and 0 < added["val"] < 20
    assert after["splits"]["train"]["n_rows"] == before["splits"]["train"]["n_rows"] + added["train"]
    sources = read_split("splits", "train")["source"].to_pylist()
    assert sources.count(str(result.path)) == added["train"] and sources.count("t.csv") == before["splits"]["train"]["n_rows"]
    again = merge_answers(store, config, Path("splits"), 1, 0.7)
    assert again.path is None and again.known == 60


def test_two_merges_at_once_write_each_text_once(config, store):
    labelled(store, *[(f"a quite new text about thing {i}, said by someone", "good") for i in range(40)])
    with ThreadPoolExecutor(4) as threads:
        merges = [threads.submit(merge_answers, Store(store.folder), config, Path("splits"), 1, 0.7) for _ in range(4)]
    assert sorted(sum(one.result().counts.values()) for one in merges) == [0, 0, 0, 40]


def test_what_is_not_merged_is_counted_and_named(config, store):
    (test,) = read_split("splits", "test")["text"].to_pylist()[:1]
    train = read_split("splits", "train")["text"].to_pylist()[0]
    labelled(
        store, (f"{test.upper()} !!", "good"), (train, "good"), ("an utterly different sentence", "good", "bad"),
        ("not seen by anybody",), ("one that was skipped", None), ("something about trains and their delays", "bad"),
        ("\u200b", "bad"),
    )  # fmt: skip
    result = merge_answers(store, config, Path("splits"), 1, 0.7)
    assert result.counts == {"bad": 1} and result.known == 1 and result.open == 3 and result.tied == result.empty == 1
    assert result.leaking == [(f"{test.upper()} !!", test)]
    assert f"(test: {test!r})" in result.describe()
    assert merge_answers(store, config, Path("splits"), 2, 0.7).counts == {}


def test_the_merge_command(config, store, run):
    labelled(store, ("a quite new text, said by someone", "good"))
    merge = ["annotate", "merge", "data=csv", "data.path=t.csv", "evaluate.splits_dir=splits", "annotate.store=store"]
    code, out, _ = run(*merge)
    (path,) = Path("data/raw/added/t").iterdir()
    assert code == 0 and out.startswith(f"{path}: 1 rows (good 1)")
    code, out, _ = run(*merge)
    assert code == 0 and str(path) not in out


def test_labels_that_the_data_do_not_have(config, store):
    with pytest.raises(DataError, match="store2: .*fine.*bad, good"):
        merge_answers(Store.create("store2", ["bad", "fine"]), config, Path("splits"), 1, 0.7)
    with pytest.raises(DataError, match=r"data\.added"):
        merge_answers(store, config.model_copy(update={"added": None}), Path("splits"), 1, 0.7)


def test_an_added_row_never_overrules_the_first_table(config, write):
    test, train = (read_split("splits", split).to_pylist()[0] for split in ("test", "train"))
    rows = [(row["text"], "bad" if row["label"] == "good" else "good") for row in (test, train)]
    Path("data/raw/added/t").mkdir(parents=True)
    write("data/raw/added/t/x.csv", table([*rows, ("new one", "good")]))
    before = {split: read_split("splits", split).to_pylist() for split in SPLITS}
    manifest = preprocess(config, "splits")
    assert manifest["dropped"]["known_text"]["n_rows"] == 2 and sum(manifest["added"]["data/raw/added/t/x.csv"].values()) == 1
    assert read_split("splits", "test").to_pylist() == before["test"]
    assert [row for row in read_split("splits", "train").to_pylist() if row["source"] == "t.csv"] == before["train"]


def test_no_added_folder_leaves_the_fingerprint_as_it_was(config, write):
    first = read_manifest("splits")
    without = preprocess(config.model_copy(update={"added": None}), "s2")
    assert first["added"] == {} and first["fingerprint"] == without["fingerprint"]
    Path("data/raw/added/t").mkdir(parents=True)
    assert preprocess(config, "splits")["fingerprint"] == first["fingerprint"]
    write("data/raw/added/t/README.md", "no table")
    assert read_manifest("splits")["fingerprint"] == preprocess(config, "splits")["fingerprint"]


def test_near_texts():
    texts = NearTexts(["So happy with my new phone, best day ever", "ok"], 0.7)
    assert texts.find("so happy with my new phone best day ever!!") and texts.find("OK") == "ok"
    assert texts.find("So unhappy with her old phone, worst week ever") is None and texts.find("no") is None
    assert texts.find("") is None and NearTexts([], 0.7).find("anything") is None


def test_a_redacted_test_text_is_known_by_its_hash(config, store):
    test = read_split("splits", "test")["text"].to_pylist()[0]
    redacted = "mail me at <email> today, that is all there is to say about it, dear reader"
    store.add_tasks("t", [{"text": redacted, "text_sha256": text_hash(test), "why": "random"}])
    store.session("ann").answer(text_hash(test)[:16], "bad")
    result = merge_answers(store, config, Path("splits"), 1, 0.7)
    assert result.path is None and result.known == 1
