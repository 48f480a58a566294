"""Rows from a user's function, ``data.source``: the same splits as from a table, and what may go wrong in it."""

import json
import sqlite3
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given as any_of, settings, strategies as st

from sodaops.config.compose import compose
from sodaops.data import streams
from sodaops.data.preprocess import ensure_splits, preprocess, read_split
from sodaops.data.splits import SPLITS
from sodaops.errors import ConfigError, DataError
from tests.conftest import configured, make_rows

GIVEN = []  # functions, of which the last is the source


def given(**arguments):
    return GIVEN[-1](**arguments)


class Rows(Iterable):
    def __init__(self, n: int = 120) -> None:
        self.n = n

    def __iter__(self):
        yield from batches_of(rows_table(self.n), 50)


def rows_table(n=120):
    return pa.table(dict(zip(("text", "label"), map(list, zip(*make_rows(n), strict=True)), strict=True)))


def batches_of(rows, size):
    return rows.to_batches(max_chunksize=size)


def of_source(function, *overrides):
    GIVEN.append(function)
    return configured("data=base", f"+data.source._target_={__name__}.given", *overrides).data


def splits_of(folder):
    """The splits without the name of the table, and the manifest without what depends on it."""
    manifest = json.loads((Path(folder) / "manifest.json").read_text())
    rows = {split: read_split(folder, split).drop_columns("source").to_pylist() for split in SPLITS}
    dropped = {why: entry["n_rows"] for why, entry in manifest["dropped"].items()}
    return rows, {**{key: manifest[key] for key in ("labels", "n_read", "n_kept")}, "dropped": dropped}


CELLS = st.sampled_from(["a text", " a  text", "", "\u200b", "x" * 40, "é&amp;", "@ann", None, *map(str, range(40))])
TYPES = st.sampled_from([pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])


@pytest.mark.slow
@settings(max_examples=12, deadline=None, derandomize=True)
@any_of(
    st.lists(st.tuples(CELLS, st.sampled_from([1, 2])), max_size=120),
    TYPES,
    st.sampled_from([pa.int8(), pa.float64()]),
    st.integers(1, 60),
)
def test_any_table_gives_the_same_splits_through_a_source(tmp_path_factory, rows, text_type, label_type, size):
    folder = tmp_path_factory.mktemp("splits")
    texts, labels = zip(*rows, *[(text, 1 + (label == "good")) for text, label in make_rows(60)], strict=True)
    columns = {"text": pa.array(texts, pa.string()).cast(text_type), "label": pa.array(labels).cast(label_type)}
    table = pa.table({**columns, "other": [0] * len(texts)})
    pq.write_table(table, folder / "t.parquet")
    config = of_source(lambda: iter(batches_of(table, size)), "data.conflicts=drop")
    preprocess(config, folder / "of_source")
    preprocess(config.model_copy(update={"source": None, "path": str(folder / "t.parquet")}), folder / "of_path")
    assert splits_of(folder / "of_source") == splits_of(folder / "of_path")


@pytest.mark.parametrize("function", [
    rows_table,
    lambda: batches_of(rows_table(), 9),
    lambda: rows_table().to_reader(),
    lambda: pa.record_batch(rows_table().to_pydict()),
    lambda: iter([rows_table().slice(0, 50), rows_table().slice(50)]),
    lambda: rows_table().to_pandas(),
    Rows,
], ids=["table", "batches", "reader", "batch", "tables", "frame", "class"])  # fmt: skip
def test_streams_of_every_kind_have_one_fingerprint(workdir, monkeypatch, function):
    expected = preprocess(of_source(rows_table), "expected")
    monkeypatch.setattr("sodaops.data.user_source.MAX_BATCH_ROWS", 7)
    manifest = preprocess(of_source(function), "splits")
    assert manifest["fingerprint"] == expected["fingerprint"] and manifest["splits"] == expected["splits"]
    assert manifest["sources"] == expected["sources"] and manifest["source"] == {"_target_": f"{__name__}.given"}


def test_the_splits_are_made_again_when_the_source_or_its_section_changes(workdir):
    calls = []

    def numbered(n=120, **rest):
        calls.append(n)
        return rows_table(n)

    first = ensure_splits(of_source(numbered), "splits")
    assert len(calls) == 2  # to hash the rows, and to make the splits
    assert ensure_splits(of_source(numbered), "splits") == first and len(calls) == 3
    assert ensure_splits(of_source(numbered, "+data.source.n=121"), "splits")["n_read"] == 121
    assert ensure_splits(of_source(numbered, "+data.source.n=121", "+data.source.why=x"), "splits")["source"]["why"] == "x"
    changed = ensure_splits(of_source(lambda: rows_table(122)), "splits")
    assert changed["n_read"] == 122 and changed["fingerprint"] != first["fingerprint"]


def raising():
    yield from batches_of(rows_table(), 50)
    raise OSError("connection lost")


once = iter([rows_table()])
grown = iter(range(120, 200))


@pytest.mark.parametrize(("function", "named"), [
    (raising, "OSError after row 120: connection lost"),
    (lambda: "text", "gave str of str"),
    (lambda: [{"text": "a"}], "gave list of dict"),
    (lambda: None, "gave NoneType"),
    (lambda: [rows_table(), None], "gave list of NoneType"),
    (lambda: rows_table().rename_columns(["txt", "label"]), r"no column text \(did you mean txt\?\).*data.text_column"),
    (lambda: [rows_table(), rows_table().drop_columns("label")], "no column label"),
    (list, "no rows"),
    (lambda: rows_table().slice(0, 0), "no rows"),
    (lambda: once, "no rows"),
    (lambda: rows_table(next(grown)), "other rows"),
    (lambda: pa.table({"text": [b"\xff"], "label": ["a"]}), "column text cannot be read as text"),
    (lambda: pa.table({"text": [["a"]], "label": ["a"]}), "column text holds list"),
    (lambda: pa.chunked_array([["a"]]), "raised ArrowInvalid after row 0"),
])  # fmt: skip
def test_a_faulty_source(workdir, function, named):
    with pytest.raises(DataError, match=f"data.source={__name__}.given: .*{named}"):
        ensure_splits(of_source(function), "splits")
    assert not list(Path().rglob("*.parquet"))


def test_faults_of_rows_name_the_source_and_the_row(workdir):
    rows = pa.concat_tables([rows_table(), pa.table({"text": ["odd"], "label": ["god"]})])
    with pytest.raises(DataError, match=rf"data.source={__name__}.given label='god' at row 121"):
        preprocess(of_source(lambda: rows, "data.labels=[bad,good]"), "splits")


@pytest.mark.parametrize(("section", "named"), [
    ("no.such.Source", r"data\.source\._target_=no\.such\.Source"),
    ("no_path", r"data\.source="),
    (f"{__name__}.Rows,m:1", r"data\.source\.m is not an argument"),
    (f"{__name__}.Rows,n:x", "TypeError"),
    (f"{__name__}.Rows,db:{{password:s3cret}}", r"data\.source .*\(password\)"),
    (f"{__name__}.Rows,uri:'postgresql://me:s3cret@host/db'", r"data\.source .*password"),
])  # fmt: skip
def test_a_faulty_section(workdir, section, named):
    with pytest.raises((ConfigError, DataError), match=named) as caught:
        preprocess(configured("data=base", f"+data.source={{_target_:{section}}}").data, "splits")
    assert "s3cret" not in str(caught.value)


def test_a_source_beside_a_path(workdir):
    with pytest.raises(ConfigError, match="data.path.*data.source"):
        configured(f"+data.source._target_={__name__}.given")


def test_a_stream_is_not_held_in_memory(workdir, monkeypatch):
    """Batches are freed as the next ones come."""
    alive = []

    def stream():
        before = pa.total_allocated_bytes()
        for i in range(40):
            yield pa.record_batch({"text": [f"{i} {j} " + "x" * 1000 for j in range(1000)], "label": ["a", "b"] * 500})
            alive.append(pa.total_allocated_bytes() - before)

    monkeypatch.setattr(streams, "MAX_BATCH_ROWS", 100)
    preprocess(of_source(stream), "splits")
    assert len(alive) == 80 and max(alive) < 15 * 2**20  # of 38 MiB


def test_sql_from_a_package_outside_the_repository(run, extensions, monkeypatch):
    """One Python file and one YAML file, with ``--config-dir``."""
    with sqlite3.connect("reviews.db") as database:
        database.execute("CREATE TABLE reviews (id INTEGER PRIMARY KEY, body TEXT, stars INTEGER, country TEXT)")
        rows = [(text, 1 + 4 * (label == "good"), "dk") for text, label in make_rows()]
        database.executemany("INSERT INTO reviews (body, stars, country) VALUES (?, ?, ?)", rows)
    code, out, err = run("preprocess", "--config-dir", extensions, "data=reviews")
    assert code == 0, err
    assert "labels: 1 60, 5 60" in out
    manifest = json.loads(Path("data/processed/reviews/manifest.json").read_text())
    config = compose(["data=reviews"], extra_dir=str(extensions)).model_dump(mode="json")
    Path("params.yaml").write_text(yaml.safe_dump(config))  # as DVC runs it
    assert run("preprocess", "--params", "params.yaml")[0] == 0
    assert json.loads(Path("data/processed/reviews/manifest.json").read_text()) == manifest
    assert {row["slice_country"] for row in read_split("data/processed/reviews", "train").to_pylist()} == {"dk"}
    code, _, err = run("preprocess", "--config-dir", extensions, "data=reviews", "data.source.sql=SELECT * FROM review")
    assert code == 2 and err.startswith("DataError: data.source=textlab.database.query: ") and "no such table" in err


def folder_of_datasets(folder):
    from datasets import load_from_disk

    return load_from_disk(folder).with_format("arrow").iter(50)


def test_a_folder_of_hugging_face_datasets(workdir):
    datasets = pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")
    datasets.Dataset(rows_table()).shuffle(seed=1).save_to_disk("saved")
    config = configured("data=base", f"+data.source._target_={__name__}.folder_of_datasets", "+data.source.folder=saved").data
    preprocess(config, "splits")
    preprocess(of_source(rows_table), "expected")
    texts = [
        {split: {row["text"] for row in read_split(name, split).to_pylist()} for split in SPLITS}
        for name in ("splits", "expected")
    ]
    assert texts[0] == texts[1]
