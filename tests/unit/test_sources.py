import gzip

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sodaops.data.sources import column_names, read_table, write_table
from sodaops.errors import DataError

ROWS = {"text": ["one, two", 'say "hi"', "line\nbreak", ""], "label": ["1", "2", "", "1"]}


def cells(path, columns=("text", "label")):
    return read_table(path, columns).to_pydict()


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_what_is_written_is_read(workdir, kind):
    write_table(pa.table(ROWS), f"t.{kind}", kind)
    assert cells(f"t.{kind}") == ROWS
    assert column_names(f"t.{kind}") == ["text", "label"]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_gzip(workdir, kind):
    write_table(pa.table(ROWS), f"t.{kind}", kind)
    with open(f"t.{kind}", "rb") as plain, gzip.open(f"t.{kind}.gz", "wb") as packed:
        packed.write(plain.read())
    assert cells(f"t.{kind}.gz") == ROWS


def test_integers_with_gaps_stay_integers(workdir):
    pq.write_table(pa.table({"text": ["a", "b", "c"], "label": pa.array([1, None, 2], pa.int64())}), "i.parquet")
    pq.write_table(pa.table({"text": ["a", "b", "c"], "label": pa.array([1.0, None, 2.0])}), "f.parquet")
    assert cells("i.parquet")["label"] == cells("f.parquet")["label"] == ["1", "", "2"]
    with open("t.csv", "w") as file:
        file.write("text,label\na,1\nb,\nc,2\n")
    assert cells("t.csv")["label"] == ["1", "", "2"]


def test_a_bom_is_fine(write):
    assert cells(write("t.csv", b"\xef\xbb\xbftext,label\nx,1\n")) == {"text": ["x"], "label": ["1"]}


def test_windows_line_ends(write):
    assert cells(write("t.csv", "text,label\r\nx,1\r\n")) == {"text": ["x"], "label": ["1"]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "", "t.csv"),
        ("t.jsonl", "", "t.jsonl"),
        ("t.csv", "text,label\n", "t.csv"),
        ("t.csv", "texts,label\nx,1\n", r"t.csv: .* text \(did you mean texts\?\).* texts, label"),
        ("t.csv", "text,label,text\nx,1,y\n", "t.csv: column text "),
        ("t.jsonl", '{"text": "x"}\n', "t.jsonl: .*label"),
        ("t.parquet", "not parquet", "t.parquet: .*parquet"),
    ],
)
def test_bad_tables(write, name, content, message):
    with pytest.raises(DataError, match=message):
        cells(write(name, content))


def test_cells_that_are_no_text(workdir):
    pq.write_table(pa.table({"text": pa.array([b"caf\xe9"]), "label": [float("inf")]}), "t.parquet")
    with pytest.raises(DataError, match="t.parquet: .*rows 1 to 1"):
        cells("t.parquet")
    assert cells("t.parquet", ["label"]) == {"label": ["inf"]}
    pq.write_table(pa.table({"text": ["x"], "label": [1e300]}), "t.parquet")
    assert cells("t.parquet")["label"] == ["1e+300"]


def test_broken_gzip(write):
    write("t.csv.gz", gzip.compress(b"text,label\n" + b"abc,1\n" * 1000)[:-20])
    write("u.csv.gz", b"no gzip")
    spoiled = bytearray(gzip.compress(b"text,label\n" + b"abc,1\n" * 1000))
    spoiled[10] = 0xFF  # a block of no kind, which zlib tells and not gzip
    write("v.csv.gz", bytes(spoiled))
    for name in ("t.csv.gz", "u.csv.gz", "v.csv.gz"):
        with pytest.raises(DataError, match=name):
            cells(name)
    with pytest.raises(DataError, match="v.csv.gz"):
        column_names("v.csv.gz")


def test_a_column_of_lists(workdir):
    pq.write_table(pa.table({"text": [["a", "b"]], "label": ["1"]}), "t.parquet")
    with pytest.raises(DataError, match="t.parquet: column text .*list<element: string>"):
        cells("t.parquet")


def test_a_missing_file_names_its_neighbours(write):
    write("tweets.csv", "text,label\nx,1\n")
    with pytest.raises(DataError, match=r"tweet.csv: .*\(did you mean tweets.csv\?\)"):
        cells("tweet.csv")
