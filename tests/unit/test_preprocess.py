import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sodaops.cli import main
from sodaops.data.preprocess import ensure_splits, preprocess, read_split
from sodaops.errors import DataError
from tests.conftest import REPO, configured, make_rows, table


def data_config(*overrides):
    return configured("data=csv", "data.path=t.csv", *overrides).data


def made(*overrides):
    return preprocess(data_config(*overrides), "splits")


def rows_of(split):
    return read_split("splits", split).to_pylist()


def test_tweets_manifest(tmp_path):
    manifest = preprocess(configured(f"data.path={REPO / 'data/raw/tweets.csv'}").data, tmp_path / "tweets")
    assert manifest["n_read"] == manifest["n_kept"] == 4200 and manifest["dropped"] == {}
    labels = [manifest["splits"][split]["labels"] for split in ("train", "val", "test")]
    assert {name: sum(part[name] for part in labels) for name in labels[0]} == {
        "negative": 1087,
        "neutral": 768,
        "positive": 2345,
    }
    assert manifest["splits"]["train"]["chars"]["min"] >= 1


def test_amazon_drops_what_it_says(workdir):
    config = configured("data=amazon", f"data.path={REPO / 'data/raw/amazon_reviews.csv'}")
    manifest = preprocess(config.data, "splits")
    dropped = sum(entry["n_rows"] for entry in manifest["dropped"].values())
    assert set(manifest["dropped"]) == {"repeated_text", "two_labels"} and 0 < dropped < 30
    assert manifest["n_kept"] == manifest["n_read"] - dropped
    texts = [row["text"] for split in ("train", "val", "test") for row in rows_of(split)]
    assert len(texts) == len(set(texts)) == manifest["n_kept"]


def test_rows_keep_their_split_as_the_table_grows(write):
    write("t.csv", table(make_rows(200)))
    made()
    before = {row["text"]: split for split in ("train", "val", "test") for row in rows_of(split)}
    write("t.csv", table(make_rows(400)[::-1]))
    made()
    after = {row["text"]: split for split in ("train", "val", "test") for row in rows_of(split)}
    assert len(after) == 400 and all(after[text] == split for text, split in before.items())


def test_schema_and_slices_and_votes(write):
    rows = [(text, label, "" if i % 3 else "x", i % 5, "") for i, (text, label) in enumerate(make_rows())]
    write("t.csv", table(rows, ("text", "label", "party", "v_bad", "v_good")))
    made("data.slice_columns=[party]", "data.labels=[good,bad]", "data.vote_columns={bad: v_bad, good: v_good}")
    schema = pq.read_schema("splits/train.parquet")
    assert [f"{field.name}:{field.type}" for field in schema] == [
        "source:string", "row:int64", "text:string", "label:string", "label_id:int32",
        "votes:list<element: int64>", "slice_party:string",
    ]  # fmt: skip
    for row in rows_of("train"):
        place = row["row"] - 1
        assert row["label_id"] == ["good", "bad"].index(row["label"])
        assert row["votes"] == ([0, place % 5] if place % 5 else None)
        assert row["slice_party"] == rows[place][2]


def test_integer_labels_with_a_map(write):
    write("t.csv", table([(text, {"bad": 0, "good": 4}[label]) for text, label in make_rows()]))
    assert made("data.labels=[no,yes]", "data.label_map={0: no, 4: yes}")["labels"] == ["no", "yes"]
    assert {row["label"] for row in rows_of("train")} == {"no", "yes"}
    assert made()["labels"] == ["0", "4"]


def election(write, **changed):
    header = ["tweet_id", "user_handle", "timestamp", "tweet_text", "candidate", "party", "retweets", "likes", "sentiment"]
    Path("data/raw/election").mkdir(parents=True)
    for split, offset in {"train": 0, "val": 100, "test": 200}.items():
        rows = [
            (i, "@u", "2024-11-05", changed.get(f"{split}{i}", f"tweet {i + offset}"), "c", ["A", "B"][i % 2], "", 3, s)
            for i, s in enumerate(["positive", "neutral", "negative"] * 10)
        ]
        write(f"data/raw/election/{split}.csv", table(rows, header))


def test_given_splits_stay_as_given(write):
    election(write)
    manifest = preprocess(configured("data=election").data, "splits")
    assert [manifest["splits"][split]["n_rows"] for split in ("train", "val", "test")] == [30, 30, 30]
    assert {row["text"] for row in rows_of("val")} == {f"tweet {i}" for i in range(100, 130)}
    assert {row["slice_party"] for row in rows_of("test")} == {"A", "B"}


def test_given_splits_that_share_texts(write):
    election(write, test5="tweet 7")
    with pytest.raises(DataError, match=r"1 .*train.csv row 8 .*test.csv row 6"):
        preprocess(configured("data=election").data, "splits")


def test_given_splits_by_keys(write):
    for split, rows in {"train": make_rows(30), "val": make_rows(60)[30:], "test": make_rows(90)[60:]}.items():
        write(f"{split}.csv", table(rows))
    keys = [f"data.files.{split}={split}.csv" for split in ("train", "val", "test")]
    assert preprocess(configured("data=csv", *keys).data, "splits")["splits"]["val"]["n_rows"] == 30


def test_the_summary_names_counts_and_rare_labels(write, capsys):
    write("t.csv", table([*make_rows(), *[(f"odd {i}", "god") for i in range(4)]]))
    assert main(["preprocess", "data=csv", "data.path=t.csv"]) == 0
    shown = capsys.readouterr().out
    assert "t: 124 rows" in shown and "labels: bad 60, god 4, good 60" in shown
    (note,) = [line for line in shown.splitlines() if line.startswith("note: ")]
    assert "god" in note and "data.labels" in note


def test_splits_of_another_table_are_replaced_with_a_warning(write, caplog):
    Path("a").mkdir()
    for path in ("t.csv", "a/t.csv"):
        write(path, table(make_rows(100 + len(path))))
    made()
    write("t.csv", table(make_rows(90)))  # the same table, with other rows
    made("data.cleaning=social")
    assert not caplog.records
    config = configured("data=csv", "data.path=a/t.csv").data
    ensure_splits(config, "splits")
    (warning,) = caplog.messages
    assert all(part in warning for part in ("splits", "t.csv", "a/t.csv", "data.name"))
    ensure_splits(config, "splits")
    Path("a/t.csv").rename("moved.csv")  # the same rows in another place
    preprocess(configured("data=csv", "data.path=moved.csv").data, "splits")
    assert len(caplog.records) == 1


BAD = {
    "unknown label": (
        [*make_rows(), ("odd", "god"), ("odder", "god")],
        ["data.labels=[bad,good]"],
        r"t.csv label='god' .*121.* bad, good \(did you mean good\?\).*2 .*121, 122",
    ),
    "no label": ([*make_rows(), ("odd", "")], [], r"t.csv label='' .*121"),
    "one class": (make_rows(labels=("good",)), [], "t.csv: label .*good"),
    "one class of two": (make_rows(labels=("good",)), ["data.labels=[bad,good]"], "t.csv: train .*bad, good"),
    "class absent from train": (make_rows(), ["data.labels=[bad,good,neutral]"], "t.csv: train .*neutral"),
    "all texts empty": (
        [(" \u200b" + " " * i, "good") for i in range(9)] + [("\n", "bad")],
        [],
        "t.csv: .*10 .*data.text_column",
    ),
    "two labels": (
        [*make_rows(), ("Same ", "good"), (" Same", "bad")],
        [],
        "1 .*t.csv row 121 good, row 122 bad",
    ),
    "a huge cell": ([*make_rows(), ("x" * 1_000_000, "good")], [], "t.csv row 121: text .*1,000,000 .*data.max_chars"),
    "no votes": (
        [(*row, "x", 1) for row in make_rows()],
        ["data.labels=[bad,good]", "data.vote_columns={bad: v0, good: v1}"],
        "t.csv row 1: v0='x'",
    ),
    "an empty split": (make_rows(3), [], "t.csv: .*data.fractions"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows(write, capsys, case):
    rows, overrides, message = BAD[case]
    write("t.csv", table(rows, ("text", "label", "v0", "v1")[: len(rows[0])]))
    with pytest.raises(DataError, match=message):
        made(*overrides)
    assert sorted(path.name for path in Path().iterdir()) == ["t.csv"]
    assert main(["preprocess", "data=csv", "data.path=t.csv", *overrides]) == 2
    error = capsys.readouterr().err
    assert error.startswith("DataError: ") and "Traceback" not in error
    assert not list(Path().glob("data/processed/csv*"))


def test_labels_that_look_the_same_are_named_once(write, caplog):
    write("t.csv", table(make_rows(150, ("Good", "good", "cafe\u0301", "café", "bad"))))
    made()
    [message] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "data.label_map=" in message and "'good'" in message and r"cafe\u0301" in message
    caplog.clear()
    assert made('data.label_map={"good": "Good", "cafe\u0301": "café"}')["labels"] == ["Good", "bad", "café"]
    assert not caplog.records
    with pytest.raises(DataError, match=r"data.label_map=.*\"good\": \"Good\""):
        made("data.labels=[Good,bad,café]")


@pytest.mark.parametrize(("number", "refused"), [
    (lambda i: i / 7, True),
    (lambda i: f"{i}e-3", True),
    (lambda i: i % 90, True),
    (lambda i: i % 40, False),
    (lambda i: (i % 9) / 2, False),
    (lambda i: f"v{i % 40}", False),
])  # fmt: skip
def test_a_column_of_measurements_is_no_label_column(write, number, refused):
    write("t.csv", table([(text, number(i)) for i, (text, _) in enumerate(make_rows(400))]))
    if refused:
        with pytest.raises(DataError, match=r"t.csv: label .*continuous.*low.*data.labels"):
            made()
    else:
        made()


@pytest.mark.parametrize("missing", ["text", "label", "side", "votes"])
def test_a_missing_column_names_its_key(write, missing):
    write(
        "t.csv",
        table([(*row, "x", 1) for row in make_rows()], [n + "s" * (n == missing) for n in ("text", "label", "side", "votes")]),
    )
    key = {"text": "text_column", "label": "label_column", "side": "slice_columns", "votes": "vote_columns"}[missing]
    with pytest.raises(DataError) as caught:
        made("data.slice_columns=[side]", "data.labels=[bad,good]", "data.vote_columns={bad: votes, good: votes}")
    assert f"data.{key}" in str(caught.value) and str(caught.value).count("data.") == 1


@pytest.mark.parametrize(("name", "content", "keys"), [
    ("t.csv", lambda text: text.replace(",", ";"), []),
    ("t.tsv", lambda text: text, []),
    ("t.csv", lambda text: text.replace(",", "#"), ["data.delimiter=#"]),
    ("t.csv", lambda text: text.encode("utf-16"), ["data.encoding=utf-16"]),
    ("t.csv", lambda text: text.replace("number", "café").encode("cp1252"), ["data.encoding=windows-1252"]),
])  # fmt: skip
def test_delimiters_and_encodings(write, name, content, keys):
    write(name, content("text,label\n" + "".join(f"{text},{label}\n" for text, label in make_rows())))
    manifest = preprocess(configured("data=csv", f"data.path={name}", *keys).data, "splits")
    assert manifest["labels"] == ["bad", "good"] and manifest["n_kept"] == 120
    assert {row["text"][:7] for row in rows_of("train")} == {"text ca" if "1252" in str(keys) else "text nu"}


def test_conflicts_can_be_dropped(write):
    write("t.csv", table([*make_rows(), ("same", "good"), ("same", "bad"), ("same", "good"), *make_rows(1)]))
    manifest = made("data.conflicts=drop")
    assert manifest["dropped"]["two_labels"] == {"n_rows": 3, "first": ["t.csv row 121", "t.csv row 122", "t.csv row 123"]}
    assert manifest["dropped"]["repeated_text"]["first"] == ["t.csv row 124"]
    assert manifest["n_kept"] == 120


def test_max_rows_takes_a_sample_that_does_not_depend_on_the_order(write):
    rows = sorted(make_rows(300), key=lambda row: row[1])
    write("t.csv", table(rows))
    manifest = made("data.max_rows=100")
    assert manifest["n_kept"] == 100 and manifest["dropped"]["not_sampled"]["n_rows"] == 200
    first = {split: {row["text"] for row in rows_of(split)} for split in ("train", "val", "test")}
    assert len(first["train"]) > 50 and min(map(len, first.values())) > 2  # a fair sample of every split
    assert {row["label"] for row in rows_of("train")} == {"bad", "good"}
    write("t.csv", table(rows[::-1] + rows[:50]))
    made("data.max_rows=100")
    assert {split: {row["text"] for row in rows_of(split)} for split in first} == first


def test_splits_are_made_again_only_when_stale(write):
    write("t.csv", table(make_rows()))
    config = data_config()
    first = ensure_splits(config, "splits")
    stamp = Path("splits/train.parquet").stat().st_mtime_ns
    assert ensure_splits(config, "splits") == first
    assert Path("splits/train.parquet").stat().st_mtime_ns == stamp
    assert ensure_splits(data_config("data.cleaning=social"), "splits")["fingerprint"] != first["fingerprint"]
    write("t.csv", table(make_rows(121)))
    assert ensure_splits(config, "splits")["n_kept"] == 121
    Path("splits/val.parquet").write_bytes(b"damaged")
    assert ensure_splits(config, "splits")["n_kept"] == 121
    assert len(rows_of("val")) > 0


def test_a_damaged_split_is_not_read(write):
    write("t.csv", table(make_rows()))
    made()
    Path("splits/test.parquet").write_bytes(b"")
    with pytest.raises(DataError, match="splits/test.parquet"):
        rows_of("test")
    with pytest.raises(DataError, match="elsewhere: .*manifest.json"):
        read_split("elsewhere", "test")


def test_a_failed_run_leaves_the_old_splits(write):
    write("t.csv", table(make_rows()))
    first = made()
    write("t.csv", table([*make_rows(), ("same", "good"), ("same", "bad")]))
    with pytest.raises(DataError):
        made()
    assert json.loads(Path("splits/manifest.json").read_text()) == first
