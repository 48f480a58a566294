"""From the request log to texts that people label, and from their labels to a table that training takes in."""

import csv
import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from sodaops.annotation.merge import NearTexts, merge
from sodaops.annotation.pick import pick
from sodaops.annotation.store import Store
from sodaops.bundle import reference
from sodaops.cli import main
from sodaops.config.schema import SharesConfig
from sodaops.data.preprocess import preprocess, read_manifest, read_split
from sodaops.data.splits import SPLITS, text_hash
from sodaops.errors import DataError
from sodaops.inference.predictor import Predictor
from tests.conftest import REPO, configured, many, table
from tests.requests import log_rows, write_log_part

SHARES = SharesConfig().model_dump()
LABELS = ["negative", "neutral", "positive"]


@pytest.fixture(scope="module")
def asked(trained):
    """What a predictor was asked: known tweets, unknown ones, and reviews."""
    predictor = Predictor(trained / "run/bundle")
    tweets, reviews = (
        pa.csv.read_csv(REPO / f"data/raw/{name}.csv")["text"].to_pylist() for name in ("tweets", "amazon_reviews")
    )
    return predictor, log_rows(predictor, [*tweets[500:900], *reviews[:300], *reviews[:50]])


def picked(asked, store, **changes):
    predictor, rows = asked
    known = reference.read_reference(changes.pop("folder"), predictor.info)
    given = {"known": set(), "n": 40, "shares": SHARES, **changes}
    return pick(predictor.info, known, given.pop("rows", rows), store, **given)


def known_hashes(trained):
    return {text_hash(text) for split in SPLITS for text in read_split(trained / "splits", split)["text"].to_pylist()}


def test_a_share_of_each_kind_and_nothing_that_is_known(trained, asked, tmp_path):
    store, known = Store.create(tmp_path / "store", LABELS), known_hashes(trained)
    found = picked(asked, store, folder=trained / "run/bundle", known=known)
    whys = [task["why"] for task in found.tasks]
    assert {why: whys.count(why) for why in SHARES} == {"uncertain": 12, "drifted": 12, "diverse": 8, "random": 8}
    digests = [task["text_sha256"] for task in found.tasks]
    assert len(set(digests)) == 40 and not known & set(digests) and found.n_known > 90
    assert whys != sorted(whys)  # nobody labels a block of one kind
    assert store.add_tasks("first", found.tasks) == 40
    again = picked(asked, store, folder=trained / "run/bundle", known=known)
    assert not {task["text_sha256"] for task in again.tasks} & set(digests) and again.n_candidates == found.n_candidates - 40


def test_each_kind_is_what_its_name_says(trained, asked, tmp_path):
    store, (_, rows) = Store.create(tmp_path / "store", LABELS), asked
    by_hash = {digest: np.sort(p)[-1] - np.sort(p)[-2] for digest, p in
               zip(rows["text_sha256"].to_pylist(), rows["probs"].to_pylist(), strict=True)}  # fmt: skip
    only = {why: {**dict.fromkeys(SHARES, 0.0), why: 1.0} for why in SHARES}
    sure = picked(asked, store, folder=trained / "run/bundle", shares=only["uncertain"])
    assert max(by_hash[task["text_sha256"]] for task in sure.tasks) == sorted(by_hash.values())[39]
    drifted = picked(asked, store, folder=trained / "run/bundle", shares=only["drifted"])
    places = {row["request_id"] for row in drifted.tasks}
    spread = {why: _spread(rows, picked(asked, store, folder=trained / "run/bundle", shares=only[why])) for why in SHARES}
    assert spread["diverse"] > 1.3 * spread["random"], spread
    assert len(places) == 40
    by_chance = picked(asked, store, folder=trained / "run/bundle", shares=only["random"], n=300)
    share = np.mean([int(task["request_id"][1:]) >= 400 for task in by_chance.tasks])
    assert 0.33 < share < 0.53  # 300 reviews among 700 texts


def _spread(rows, found):
    chosen = rows.filter(pc.is_in(rows["request_id"], pa.array([task["request_id"] for task in found.tasks])))
    sketches = np.array(chosen["sketch"].to_pylist())
    return float(np.linalg.norm(sketches[:, None] - sketches[None], axis=2).mean())


def test_feedback_on_a_request_becomes_a_task_with_its_answer(trained, asked, tmp_path):
    store = Store.create(tmp_path / "store", LABELS)
    store.append_feedback("r450", 0, "negative")
    store.append_feedback("nobody", 0, "negative")
    found = picked(asked, store, folder=trained / "run/bundle", known=known_hashes(trained), n=4)
    assert [task["request_id"] for task in found.tasks if task["why"] == "feedback"] == ["r450"]
    store.add_tasks("first", found.tasks)
    assert list(store.state().answers.values()) == [{"feedback": "negative"}]
    assert store.feedback_without_task() == {("nobody", 0)}


def test_what_cannot_be_picked_from(trained, asked, tmp_path):
    store, (_, rows) = Store.create(tmp_path / "store", LABELS), asked
    hidden = rows.set_column(rows.column_names.index("text"), "text", pa.nulls(len(rows), pa.string()))
    with pytest.raises(DataError, match=r"holds hashes and no texts; serve with serve.log_texts=true"):
        picked(asked, store, folder=trained / "run/bundle", rows=hidden)
    with pytest.raises(DataError, match="no request that bundle .* answered"):
        picked(asked, store, folder=trained / "run/bundle", rows=rows.slice(0, 0))
    old = rows.set_column(rows.column_names.index("sketch"), rows.field("sketch"), pa.nulls(len(rows), rows["sketch"].type))
    found = picked(asked, store, folder=trained / "run/bundle", rows=old)
    assert {task["why"] for task in found.tasks} == {"uncertain", "random"}
    assert picked(asked, store, folder=trained / "run/bundle", rows=rows.slice(0, 3)).tasks


def base(write, n=300):
    """A data set of generated texts, and a store of its labels."""
    write("t.csv", table(many(n)))
    config = configured("data=csv", "data.path=t.csv").data
    return config, Store.create("store", ["bad", "good"])


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


def test_accepted_labels_become_a_table_that_training_takes_and_test_stays(write):
    config, store = base(write)
    before = preprocess(config, "splits")
    test = read_split("splits", "test").to_pylist()
    texts = [f"a quite new text about thing {i}, said by someone" for i in range(60)]
    labelled(store, *[(text, "good", "good", "bad") for text in texts])
    found = merge(store, config, Path("splits"), 1, 0.7)
    assert found.counts == {"good": 60} and found.path.parent == Path("data/raw/added/csv")
    (row, *_) = rows_of(found.path)
    assert row["text"] == texts[0] and row["label"] == "good" and (row["votes_good"], row["votes_bad"]) == ("2", "1")
    assert row["annotators"] == "a b c" and row["source"] == "annotation"
    after = preprocess(config, "splits")
    assert after["fingerprint"] != before["fingerprint"]
    assert read_split("splits", "test").to_pylist() == test
    added = after["added"][str(found.path)]
    assert added.keys() == {"train", "val"} and sum(added.values()) == 60 and 0 < added["val"] < 20
    assert after["splits"]["train"]["n_rows"] == before["splits"]["train"]["n_rows"] + added["train"]
    sources = read_split("splits", "train")["source"].to_pylist()
    assert sources.count(str(found.path)) == added["train"] and sources.count("t.csv") == before["splits"]["train"]["n_rows"]
    again = merge(store, config, Path("splits"), 1, 0.7)
    assert again.path is None and again.known == 60 and "60 texts are in the data already" in again.describe()


def test_two_merges_at_once_write_each_text_once(write):
    config, store = base(write)
    preprocess(config, "splits")
    labelled(store, *[(f"a quite new text about thing {i}, said by someone", "good") for i in range(40)])
    with ThreadPoolExecutor(4) as threads:
        merges = [
            threads.submit(merge, Store.create(store.folder, store.labels), config, Path("splits"), 1, 0.7) for _ in "1234"
        ]
    assert sorted(sum(one.result().counts.values()) for one in merges) == [0, 0, 0, 40]


def test_what_is_not_merged_is_counted_and_named(write):
    config, store = base(write)
    preprocess(config, "splits")
    (test,) = read_split("splits", "test")["text"].to_pylist()[:1]
    train = read_split("splits", "train")["text"].to_pylist()[0]
    labelled(
        store, (f"{test.upper()} !!", "good"), (train, "good"), ("an utterly different sentence", "good", "bad"),
        ("not seen by anybody",), ("one that was skipped", None), ("something about trains and their delays", "bad"),
    )  # fmt: skip
    found = merge(store, config, Path("splits"), 1, 0.7)
    assert found.counts == {"bad": 1} and found.known == 1 and found.open == 3 and found.tied == 1
    assert found.leaking == [(f"{test.upper()} !!", test)]
    said = found.describe()
    assert "1 texts are nearly a text of the test split, and refused" in said and f"(test: {test!r})" in said
    assert merge(store, config, Path("splits"), 2, 0.7).counts == {}


def test_labels_that_the_data_do_not_have(write):
    config, _ = base(write)
    with pytest.raises(DataError, match="store2: label fine is none of csv's: bad, good"):
        merge(Store.create("store2", ["bad", "fine"]), config, Path("splits"), 1, 0.7)
    with pytest.raises(DataError, match="data.added is null"):
        merge(Store.create("store", ["bad", "good"]), config.model_copy(update={"added": None}), Path("splits"), 1, 0.7)


def test_an_added_row_never_overrules_the_first_table(write):
    config, _ = base(write)
    preprocess(config, "splits")
    test, train = (read_split("splits", split).to_pylist()[0] for split in ("test", "train"))
    rows = [(row["text"], "bad" if row["label"] == "good" else "good") for row in (test, train)]
    Path("data/raw/added/csv").mkdir(parents=True)
    write("data/raw/added/csv/x.csv", table([*rows, ("new one", "good")]))
    before = {split: read_split("splits", split).to_pylist() for split in SPLITS}
    manifest = preprocess(config, "splits")
    assert manifest["dropped"]["known_text"]["n_rows"] == 2 and sum(manifest["added"]["data/raw/added/csv/x.csv"].values()) == 1
    assert read_split("splits", "test").to_pylist() == before["test"]
    assert [row for row in read_split("splits", "train").to_pylist() if row["source"] == "t.csv"] == before["train"]


def test_no_added_folder_leaves_the_fingerprint_as_it_was(write):
    config, _ = base(write)
    first = preprocess(config, "splits")
    assert (
        first["added"] == {}
        and first["fingerprint"] == preprocess(config.model_copy(update={"added": None}), "s2")["fingerprint"]
    )
    Path("data/raw/added/csv").mkdir(parents=True)
    assert preprocess(config, "splits")["fingerprint"] == first["fingerprint"]
    write("data/raw/added/csv/README.md", "no table")
    assert read_manifest("splits")["fingerprint"] == preprocess(config, "splits")["fingerprint"]


def test_near_texts():
    found = NearTexts(["So happy with my new phone, best day ever", "ok"], 0.7)
    assert found.find("so happy with my new phone best day ever!!") and found.find("OK") == "ok"
    assert found.find("So unhappy with her old phone, worst week ever") is None and found.find("no") is None
    assert found.find("") is None and NearTexts([], 0.7).find("anything") is None


def test_the_verbs(trained, asked, workdir, capsys):
    _, rows = asked
    write_log_part(workdir / "log", rows)
    bundle, splits = trained / "run/bundle", f"evaluate.splits_dir={trained / 'splits'}"
    pick_it = [
        "annotate",
        "pick",
        str(bundle),
        f"drift.request_log={workdir / 'log'}",
        splits,
        "annotate.n=20",
        "annotate.store=s",
    ]
    assert main(pick_it) == 0
    said = capsys.readouterr().out
    assert "s: 20 new texts (" in said and "texts in the data or tasks already" in said
    assert main(["annotate", "status", "annotate.store=s"]) == 0 and "s: 20 texts, 0 with a label" in capsys.readouterr().out
    digest = Store("s").state().tasks[0].text_sha256
    assert main(["log", "forget", f"--text-hash={digest}", pick_it[3], "annotate.store=s"]) == 0
    assert "1 texts to annotate deleted" in capsys.readouterr().out and len(Store("s").state().tasks) == 19
    assert main([*pick_it[:3], "drift.request_log=none", splits]) == 2
    assert "none: no such request log" in capsys.readouterr().err
    assert main([*pick_it, "annotate.shares.random=0.5"]) == 2
    assert "they sum to 1.3; expected 1" in capsys.readouterr().err


def test_shares_that_round_up_pick_no_more_than_asked(trained, asked, tmp_path):
    store = Store.create(tmp_path / "store", LABELS)
    shares = {"uncertain": 0.3, "drifted": 0.3, "diverse": 0.4, "random": 0.0}
    for n in (1, 7, 25):
        assert len(picked(asked, store, folder=trained / "run/bundle", shares=shares, n=n).tasks) == n
    every = {row["text_sha256"] for row in asked[1].select(["text_sha256"]).to_pylist()}
    assert picked(asked, store, folder=trained / "run/bundle", known=every).tasks == []  # nothing is left


def test_feedback_on_a_text_that_was_asked_twice_or_under_a_shared_id(trained, asked, tmp_path):
    store, (_, rows) = Store.create(tmp_path / "store", LABELS), asked
    twice = pa.concat_tables([rows.slice(450, 1), rows.slice(450, 1).set_column(1, "request_id", pa.array(["again"]))])
    shared = rows.slice(500, 2).set_column(1, "request_id", pa.array(["fixed", "fixed"]))
    store.append_feedback("again", 0, "negative")
    store.append_feedback("fixed", 0, "negative")
    found = picked(asked, store, folder=trained / "run/bundle", rows=pa.concat_tables([twice, shared]))
    assert store.add_tasks("t", found.tasks) == len(found.tasks) == 3
    answered = store.state().answers
    assert list(answered.values()) == [{"feedback": "negative"}]  # of the text asked twice; the shared id tells nothing
    known = known_hashes(trained)
    test = rows.filter(pc.is_in(rows["text_sha256"], pa.array(sorted(known)))).slice(0, 1)
    store.append_feedback(test["request_id"][0].as_py(), 0, "negative")
    assert picked(asked, store, folder=trained / "run/bundle", rows=test, known=known).tasks == []


def test_a_redacted_test_text_is_known_by_its_hash(write):
    rows = [*many(300), *[(f"mail me at person{i}@mail.example.org today, number {i}", "good") for i in range(40)]]
    write("t.csv", table(rows))
    config, store = configured("data=csv", "data.path=t.csv").data, Store.create("store", ["bad", "good"])
    preprocess(config, "splits")
    test = next(text for text in read_split("splits", "test")["text"].to_pylist() if text.startswith("mail me"))
    store.add_tasks("t", [{"text": "mail me at <email> today, that is all there is to say about it, dear reader",
                           "text_sha256": text_hash(test), "why": "random"}])  # fmt: skip
    store.session("ann").answer(text_hash(test)[:16], "bad")
    found = merge(store, config, Path("splits"), 1, 0.7)
    assert found.path is None and found.known == 1
