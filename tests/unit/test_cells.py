"""Every cell of a table comes back from `sodaops predict` as it was written, in every format."""

import csv
import gzip
import io
import json
import math
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from sodaops.data.cells import as_json, as_text
from sodaops.data.text_files import layout_of
from sodaops.errors import ConfigError, DataError
from sodaops.inference.table import bulk_predictor, predict_table

N_EXAMPLES = settings(max_examples=12, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n"), max_size=8) | st.sampled_from(
    ["2024-01-01", "2024-01-01T10:00:00+02:00", "007", "NA", "null", "1e5", ' a, "b" ', "true", "x\ty;z", "é", "e\u0301"]
)
NUMBERS = st.integers(-(10**30), 10**30).map(str) | st.sampled_from(["1.0", "1.50", "-0", "1e400", "0.1", "1E-7"])
JSON_VALUES = st.recursive(
    NUMBERS | TEXTS.map(json.dumps) | st.sampled_from(["null", "true", "NaN", r'"\ud83d"', r'"\u0000"']),
    lambda inner: st.lists(inner, max_size=2).map(lambda cells: f"[{','.join(cells)}]") | inner.map('{{"k": {}}}'.format),
    max_leaves=3,
)
COLUMNS = ("id", "", "naïve")


@pytest.fixture(scope="module")
def predictor(trained):
    return bulk_predictor(trained / "run/bundle")


def predicted(predictor, path, output):
    predict_table(predictor, path, "text", output)
    return Path(output)


@pytest.mark.slow
@N_EXAMPLES
@given(rows=st.lists(st.tuples(*[JSON_VALUES | st.none()] * 3), min_size=1, max_size=4), ending=st.sampled_from(["\n", "\r\n"]))
def test_json_lines(workdir, predictor, rows, ending):
    keys = [json.dumps(name, ensure_ascii=False) for name in COLUMNS]
    every = [("0", "0", "0"), *rows]  # the first row gives the order of the columns
    members = [[f"{key}: {cell}" for key, cell in zip(keys, row, strict=True) if cell is not None] for row in every]
    lines = [", ".join(['{"text": "a"', *cells]) for cells in members]
    Path("t.jsonl").write_text("".join(f"{line}}}{ending}" for line in lines), encoding="utf-8", newline="")
    written = predicted(predictor, "t.jsonl", "out.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert [line.partition(', "label": "')[0] for line in written] == lines


@pytest.mark.slow
@N_EXAMPLES
@given(rows=st.lists(st.tuples(TEXTS | NUMBERS, TEXTS, TEXTS), min_size=1, max_size=4), delimiter=st.sampled_from(",;\t|"))
def test_csv(workdir, predictor, rows, delimiter):
    with open("t.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([("text", *COLUMNS), *(("a", *row) for row in rows)])
    content = predicted(predictor, "t.csv", "out.csv").read_text(encoding="utf-8")
    header, *lines = csv.reader(io.StringIO(content, newline=""))
    assert header[:4] == ["text", *COLUMNS] and [tuple(line[1:4]) for line in lines] == rows


def odd_columns():
    """Parquet columns of many types, two rows each."""
    zone = datetime(2024, 1, 1, 10, tzinfo=UTC)
    return {
        "int": pa.array([2**63 - 1, None], pa.int64()), "float": pa.array([1e10, -0.0]),
        "single": pa.array([0.1, math.inf], pa.float32()), "decimal": pa.array([Decimal("12345678901234567890.10"), None]),
        "zone": pa.array([zone, None], pa.timestamp("us", "Europe/Berlin")),
        "naive": pa.array([datetime(2024, 1, 1), None], pa.timestamp("ns")), "day": pa.array([date(2024, 1, 2), None]),
        "duration": pa.array([timedelta(hours=1), None], pa.duration("s")),
        "dictionary": pa.array(["x", None]).dictionary_encode(), "large": pa.array(["é\0", ""], pa.large_string()),
        "struct": pa.array([{"a": [1, 2], "c": "2024-01-01"}, None]),
        "list": pa.array([[0.5, None], []], pa.list_(pa.float32())), "bytes": pa.array([b"\xff\0", b"x"]),
        "old_text": pa.array([b"caf\xc3\xa9", None]), "null": pa.nulls(2),
    }  # fmt: skip


@pytest.fixture
def odd(workdir):
    pq.write_table(pa.table({"text": pa.array(["a", "b"]), **odd_columns()}), "t.parquet")
    return pq.read_table("t.parquet")


def test_parquet_columns_of_every_type_come_back(odd, predictor):
    result = pq.read_table(predicted(predictor, "t.parquet", "out.parquet"))
    assert result.schema.names[: len(odd.schema)] == odd.schema.names
    assert result.select(odd.schema.names).equals(odd) and result.schema.field("zone").type == odd.schema.field("zone").type
    assert str(result["float"][1]) == "-0.0"


def test_parquet_to_json_lines_and_csv(odd, predictor, caplog):
    lines = predicted(predictor, "t.parquet", "out.jsonl").read_text(encoding="utf-8").splitlines()
    first, second = map(json.loads, lines)
    assert "12345678901234567890.10," in lines[0] and '"single": 0.1,' in lines[0] and '"float": -0.0' in lines[1]
    assert (first["int"], first["float"], first["dictionary"], first["large"]) == (2**63 - 1, 1e10, "x", "é\0")
    assert (first["struct"], first["list"]) == ({"a": [1, 2], "c": "2024-01-01"}, [0.5, None])
    assert (second["single"], second["struct"], second["null"], first["old_text"]) == (math.inf, None, None, "café")
    assert first["zone"].startswith("2024-01-01 ") and first["duration"] and first["day"] == "2024-01-02"
    [warning] = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "bytes" in warning.getMessage() and "bytes" not in first
    content = predicted(predictor, "t.parquet", "out.csv").read_text(encoding="utf-8")
    row = next(csv.DictReader(io.StringIO(content, newline="")))
    assert row["struct"] == '{"a": [1, 2], "c": "2024-01-01"}' and row["decimal"] == "12345678901234567890.10"
    assert row["int"] == str(2**63 - 1) and row["dictionary"] == "x" and "bytes" not in row


@pytest.mark.parametrize("output", ["out.csv", "out.jsonl", "out.parquet"])
@pytest.mark.parametrize(
    "content",
    ["text,label,,\na,b,,\n", "text,id,id\na,1,2\n", "text,\na,0\n", "text,label\na,b,,\n", "\ufefftext,id\r\na,1\r\n"],
)
def test_columns_that_are_not_needed_never_stop_a_prediction(write, predictor, caplog, content, output):
    assert predict_table(predictor, write("t.csv", content), "text", output).n_rows == 1
    assert sum(record.levelname == "WARNING" for record in caplog.records) <= 1


def test_other_encodings_and_compressions_are_named(write, predictor):
    text = "text,id\ncafé,1\n"
    for name, content, named in [
        ("a.csv", text.encode("utf-16"), "UTF-16"),
        ("b.csv", text.encode("utf-16-le"), "UTF-16-LE"),
        ("c.csv", gzip.compress(text.encode()), "c.csv.gz"),
        ("d.csv", text.encode("latin-1"), "0xe9"),
        ("e.csv.gz", gzip.compress(text.encode("latin-1")), "0xe9"),
        ("f.csv.gz", text.encode(), "f.csv"),
        ("g.csv", b"PK\x03\x04\0\0", "Excel"),
        ("h.jsonl", '{"text": "café"}'.encode("utf-16"), "UTF-16"),
    ]:
        with pytest.raises(DataError, match=named) as caught:
            predict_table(predictor, write(name, content), "text", "out.csv")
        assert str(caught.value).isprintable()
    with pytest.raises(DataError, match="UTF-16"):
        predict_table(predictor, "a.csv", "text", "out.csv", layout=layout_of(None, "latin-1"))
    assert predict_table(predictor, "a.csv", "text", "out.csv", layout=layout_of(",", "utf-16")).n_rows == 1
    for delimiter, encoding in ((";;", None), (None, "base64"), (None, "nope")):
        with pytest.raises(ConfigError, match=delimiter or encoding):
            layout_of(delimiter, encoding)


@pytest.mark.parametrize(
    ("cell", "text"), [("1e400", "1e400"), ("null", None), (r'"\u00e9"', "é"), ('"null"', "null"), (None, None), ("[1]", "[1]")]
)
def test_json_cells_as_text(cell, text):
    field = pa.field("x", pa.string(), metadata={b"cells": b"json"})
    assert as_text(pa.array([cell], pa.string()), field).to_pylist() == [text]
    assert as_json(pa.array([cell], pa.string()), field) == [cell]
