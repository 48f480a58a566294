"""Predictions for a table: formats, resuming, and bad input."""

import gzip
import io
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from filelock import FileLock

from sodaops.bundle import layout
from sodaops.data.sources import write_table
from sodaops.errors import BundleError, DataError, StorageError
from sodaops.inference.bulk import PredictionParts, rechunk
from sodaops.inference.table import bulk_predictor, predict_table
from tests.conftest import TWEETS

TEXTS = ["so good, really", "the train is late", "", "line\nbreak", " \u200b ", 'say "hi"', "so good, really"]
ROWS = {"id": [str(i) for i in range(len(TEXTS))], "text": TEXTS}


@pytest.fixture(scope="module")
def predictor(trained):
    return bulk_predictor(trained / "run/bundle")


@pytest.fixture(scope="module")
def tweets():
    """500 distinct texts with an id."""
    table = pa.csv.read_csv(TWEETS).slice(0, 500)
    return pa.table({"id": table["id"].cast(pa.string()), "text": table["text"]})


def names():
    return sorted(path.name for path in Path().iterdir())


def cells(path):
    """A table as Python values, whatever its format."""
    if path.endswith("parquet"):
        return pq.read_table(path).to_pydict()
    if path.endswith("jsonl"):
        rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        return {name: [row[name] for row in rows] for name in rows[0]}
    options = pa.csv.ParseOptions(delimiter="\t" if path.endswith("tsv") else ",", newlines_in_values=True)
    types = pa.csv.ConvertOptions(column_types={"id": pa.string(), "text": pa.string(), "label": pa.string()})
    content = pa.BufferReader(Path(path).read_bytes())  # Arrow would keep a file open for a while
    result = pa.csv.read_csv(content, parse_options=options, convert_options=types).to_pydict()
    return {**result, "label": [label or None for label in result["label"]]}


@pytest.mark.parametrize("texts", [["\u0301"], ["so good", "\u0301", "", "so good"]])
def test_texts_without_tokens_are_empty_ones(predictor, workdir, texts):
    write_table(pa.table({"text": texts}), "t.jsonl", "jsonl")
    predict_table(predictor, "t.jsonl", "text", "out.jsonl")
    labels = cells("out.jsonl")["label"]
    assert [label is None for label in labels] == [text != "so good" for text in texts]
    with pytest.raises(DataError, match=f"text {texts.index(chr(0x301)) + 1}"):
        predictor.predict(texts)


def test_a_batch_with_no_tokens_at_all(predictor):
    """As of a tokenizer without special tokens, when an explanation leaves out the only word."""
    none, some = np.empty(0, dtype=np.int64), predictor.encode("so good")
    alone, together = predictor.run([none]).probs, predictor.run([some, none]).probs
    assert np.isfinite(alone).all() and np.allclose(together, np.concatenate([predictor.run([some]).probs, alone]), atol=1e-4)


@pytest.mark.parametrize("given", ["t.csv", "t.tsv", "t.jsonl", "t.parquet", "t.csv.gz", "t.jsonl.gz"])
@pytest.mark.parametrize("output", ["out.csv", "out.tsv", "out.jsonl", "sub/out.parquet"])
def test_formats(workdir, predictor, given, output):
    write_table(pa.table(ROWS), given.removesuffix(".gz"), given.split(".")[1])
    if given.endswith(".gz"):
        Path(given).write_bytes(gzip.compress(Path(given[:-3]).read_bytes()))
    assert predict_table(predictor, given, "text", output) == (7, 0)
    result = cells(output)
    labels = predictor.info.labels
    assert list(result) == ["id", "text", "label", "score", *(f"prob_{label}" for label in labels)]
    assert result["id"] == ROWS["id"] and result["text"] == TEXTS
    for i, text in enumerate(TEXTS):
        values = [result[name][i] for name in list(result)[2:]]
        if text.strip(" \u200b"):
            expected = predictor.predict([text])[0]
            assert values[0] == expected.label
            assert values[1:] == pytest.approx([expected.score, *expected.probs.values()], abs=1e-5)
        else:
            assert values == [None] * (2 + len(labels))
    assert not [name for name in [*names(), *os.listdir(Path(output).parent)] if name.startswith(".")]


def test_a_table_is_the_same_in_chunks_of_any_size(workdir, predictor, tweets):
    pq.write_table(tweets, "t.parquet", row_group_size=60)
    for n in (7, 100, 1000):
        assert predict_table(predictor, "t.parquet", "text", f"{n}.parquet", chunk_rows=n).n_rows == 500
    small, middle, whole = (pq.read_table(f"{n}.parquet") for n in (7, 100, 1000))
    assert pq.ParquetFile("100.parquet").metadata.num_row_groups == 5
    expected = predictor.probs(tweets["text"].to_pylist())
    for result in (small, middle, whole):
        assert result.select(["id", "text"]).equals(tweets)
        probs = np.column_stack([result[f"prob_{label}"].to_numpy() for label in predictor.info.labels])
        assert np.abs(probs - expected).max() < 1e-5 and np.ptp(probs, axis=0).min() > 1e-3
        best = [predictor.info.labels[i] for i in probs.argmax(axis=1)]
        assert result["label"].to_pylist() == best and result["score"].to_pylist() == probs.max(axis=1).tolist()


def test_batches_are_cut_and_joined_to_chunks():
    table = pa.table({"i": range(5000), "text": ["x" * 10] * 5000})
    for sizes in ([5000], [1, 2999, 2000], [700] * 7 + [100]):
        starts = np.cumsum([0, *sizes[:-1]]).tolist()
        batches = [table.slice(start, n).combine_chunks().to_batches()[0] for start, n in zip(starts, sizes, strict=True)]
        assert [len(chunk) for chunk in rechunk(batches, 2000, 10**9)] == [2000, 2000, 1000]
        small = list(rechunk(batches, 10**9, 30_000))
        assert pa.concat_tables(small).equals(table) and max(chunk.nbytes for chunk in small) < 60_000


def test_columns_with_the_names_of_the_added_ones(workdir, predictor):
    write_table(pa.table({"text": ["x"], "label": ["x"], "predicted_label": ["y"], "score": ["1"]}), "t.csv", "csv")
    predict_table(predictor, "t.csv", "text", "out.parquet")
    result = pq.read_table("out.parquet").to_pydict()
    first = predictor.info.labels[0]
    assert list(result)[:7] == [
        "text", "label", "predicted_label", "score", "predicted_predicted_label", "predicted_score", f"prob_{first}"
    ]  # fmt: skip
    assert (result["label"], result["predicted_label"], result["score"]) == (["x"], ["y"], ["1"])
    assert result["predicted_predicted_label"][0] in predictor.info.labels
    predict_table(predictor, "out.parquet", "text", "again.parquet")  # its own output can be predicted again
    assert len(set(pq.read_schema("again.parquet").names)) == len(result) + 2 + len(predictor.info.labels)


def test_the_input_may_be_the_output(workdir, predictor):
    write_table(pa.table(ROWS), "t.csv", "csv")
    predict_table(predictor, "t.csv", "text", "t.csv")
    assert cells("t.csv")["text"] == TEXTS and names() == ["t.csv"]


def test_texts_that_are_null_or_numbers(workdir, predictor):
    numbers = pa.array([7, None, 9], pa.int64())
    floats = pa.array([1.0, None, 2.5])
    pq.write_table(pa.table({"text": numbers, "f": floats, "none": pa.nulls(3)}), "t.parquet")
    predict_table(predictor, "t.parquet", "text", "out.jsonl")
    result = cells("out.jsonl")
    assert (result["text"], result["f"], result["none"]) == ([7, None, 9], [1.0, None, 2.5], [None] * 3)
    assert [label is None for label in result["label"]] == [False, True, False]
    assert result["score"][0] == pytest.approx(predictor.predict(["7"])[0].score, abs=1e-5)


def test_json_lines_come_back_byte_for_byte(write, predictor):
    side = [
        '"n": 12345678901234567890123, "t": "2024-01-01T10:00:00+02:00", "f": 1.50',
        r'"half": "\ud83d", "zero": "\u0000", "é": "caf\u00e9 😀", "d": "2024-01-01"',
        '"f": 1e400, "g": -0, "nan": NaN, "inf": -Infinity, "no": null, "yes": true',
        '"meta": {"k":[1,  2.0, {"a": null}], "k": 1e-7}, "": []',
    ]
    write("t.jsonl", "\ufeff" + "\r\n\n".join(f'{{"text": "t {i}", {cells}}} ' for i, cells in enumerate(side)))
    predict_table(predictor, "t.jsonl", "text", "out.jsonl")
    lines = Path("out.jsonl").read_text(encoding="utf-8").split("\n")
    for i, (line, cells) in enumerate(zip(lines, [*side, ""], strict=True)):
        assert not cells or line.startswith(f'{{"text": "t {i}", {cells}, "label": "')
    predict_table(predictor, "t.jsonl", "text", "out.parquet")
    rows = pq.read_table("out.parquet").to_pylist()
    assert (rows[0]["n"], rows[0]["f"], rows[1]["half"]) == ("12345678901234567890123", "1.50", "\\ud83d")
    assert rows[3]["meta"] == '{"k":[1,  2.0, {"a": null}], "k": 1e-7}' and rows[2]["no"] is rows[0]["meta"] is None


@pytest.mark.parametrize(("name", "content", "named"), [
    ("t.csv", "", r"t\.csv: .*empty"),
    ("t.csv", "id,text\n", r"t\.csv.*rows"),
    ("t.jsonl", "\n\n", r"t\.jsonl"),
    ("t.csv", "id,text\n1,x\n2,y\n3", r"t\.csv.*row 3"),
    ("t.tsv", "id\ttext\n1\tx\n" + "1\n" * 7, r"t\.tsv.*row 2.*row 6.*2 more"),
    ("t.csv", b"id,text\n1,x\n2,caf\xe9\n", r"t\.csv line 3, byte 6: 0xe9"),
    ("t.jsonl", b'{"text": "x"}\n{"text": "caf\xe9"}\n', r"t\.jsonl"),
    ("t.jsonl", '{"text": "x"}\n{"text": "y', r"t\.jsonl"),
    ("t.jsonl", '{"text": ["x"]}\n', r"t\.jsonl.* text .*list"),
    ("t.jsonl", '{"text": "\\ud83d"}\n', r"t\.jsonl"),
    ("t.csv", "text,id,text\n1,x,2\n", r"t\.csv.* text "),
    ("t.jsonl", '{"text": "x", "text": "y"}\n', r"t\.jsonl.*text occurs twice"),
    ("t.jsonl", '[{"text": "x"}]\n', r"t\.jsonl.* row 1 "),
    ("t.csv", "id,texts\n1,x\n", r"t\.csv.* text .*texts.*--text-column"),
    ("t.csv.gz", gzip.compress(b"id,text\n" + b"1,x\n" * 9000, mtime=0)[:-20], r"t\.csv\.gz"),
    ("t.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 9000, mtime=0)[:-20], r"t\.jsonl\.gz"),
])  # fmt: skip
def test_bad_tables(write, predictor, name, content, named):
    with pytest.raises(DataError, match=named):
        predict_table(predictor, write(name, content), "text", "new/out.csv")
    assert names() == [name]


def test_bad_parquet_tables(workdir, predictor, tweets):
    def refused(named=""):
        with pytest.raises(DataError, match=rf"t\.parquet.*{named}"):
            predict_table(predictor, "t.parquet", "text", "out.csv")

    pq.write_table(tweets, "t.parquet")
    whole = Path("t.parquet").read_bytes()
    for damaged in (whole[:-1000], whole[:2000] + b"\xff" * 8000 + whole[10_000:]):
        Path("t.parquet").write_bytes(damaged)
        refused()
    pq.write_table(tweets.slice(0, 0), "t.parquet")
    refused("rows")
    pq.write_table(pa.table({"text": [["x"]]}), "t.parquet")
    refused("text .*list<element: string>")
    pq.write_table(pa.table({"text": pa.array([b"fine", b"caf\xe9"])}), "t.parquet")
    refused("1 to 2")
    assert names() == ["t.parquet"]


@pytest.mark.parametrize("output", ["out.xlsx", "out.csv.gz", "folder.csv", "gs://bucket/out.csv"])
def test_bad_outputs(write, predictor, output):
    Path("folder.csv").mkdir()
    with pytest.raises(DataError, match=f"--output {output}"):
        predict_table(predictor, write("t.csv", "text\nx\n"), "text", output)


def test_a_table_that_changes_while_it_is_read(write, predictor, monkeypatch):
    monkeypatch.setattr(PredictionParts, "write", lambda *_: os.utime("t.csv", ns=(0, 0)))
    with pytest.raises(DataError, match=r"t\.csv"):
        predict_table(predictor, write("t.csv", "text\nx\n"), "text", "out.csv")
    assert names() == ["t.csv"]


def test_an_output_folder_that_cannot_be_written_to(write, predictor, small_disk):
    write("t.csv", "text\nx\n")
    with pytest.raises(StorageError, match=r"t\.csv/out\.csv"):
        predict_table(predictor, "t.csv", "text", "t.csv/out.csv")
    subprocess.run(["mount", "-o", "remount,ro", "disk"], check=True)
    with pytest.raises(StorageError, match=r"out\.csv.*Read-only file system"):
        predict_table(predictor, "t.csv", "text", "disk/out.csv")


def test_a_full_disk_and_the_same_call_again(predictor, trained, tweets, small_disk, workdir):
    pq.write_table(tweets, "t.parquet")
    predict_table(predictor, "t.parquet", "text", "whole.csv", chunk_rows=50)
    whole = Path("whole.csv").read_bytes()

    def fill():
        """Predicts until the disk is full; returns the first part and how many rows are finished."""
        (small_disk / "ballast").write_bytes(b"x" * 190_000)
        with pytest.raises(StorageError, match=r"No space left on device"):
            predict_table(predictor, "t.parquet", "text", "disk/out.csv", chunk_rows=50)
        (small_disk / "ballast").unlink()
        [folder] = [path for path in small_disk.iterdir() if path.is_dir()]
        parts = sorted(folder.iterdir())  # neither a half-written one nor the output is among them
        assert parts[0].name == "000000000000-50.parquet" and all(path.name.endswith("-50.parquet") for path in parts)
        assert 0 < 50 * len(parts) < 500 and names() == ["disk", "t.parquet", "whole.csv"]
        return parts[0], 50 * len(parts)

    def n_resumed(chosen=predictor):
        result = predict_table(chosen, "t.parquet", "text", "disk/out.csv", chunk_rows=50)
        assert os.listdir(small_disk) == ["out.csv"] and result.n_rows == 500
        assert ((small_disk / "out.csv").read_bytes() == whole) is (chosen is predictor)
        (small_disk / "out.csv").unlink()
        return result.n_resumed

    _, n_kept = fill()
    assert n_resumed() == n_kept
    fill()
    os.utime("t.parquet", ns=(0, 0))  # a changed table
    assert n_resumed() == 0
    fill()
    assert n_resumed(bulk_predictor(trained / "run/bundle", "float32")) == 0  # another model
    part, n_kept = fill()
    part.write_bytes(b"damaged")
    assert n_resumed() == n_kept - 50
    part, n_kept = fill()
    content = bytearray(part.read_bytes())
    content[60] ^= 1  # one bit of the first column's numbers
    part.write_bytes(content)
    assert n_resumed() == n_kept - 50


def test_one_at_a_time(write, predictor):
    write("t.csv", "text\nx\n")
    with FileLock(".out.csv.work.lock"), pytest.raises(StorageError, match=r"out\.csv"):
        predict_table(predictor, "t.csv", "text", "out.csv")
    assert predict_table(predictor, "t.csv", "text", "out.csv").n_rows == 1
    assert names() == ["out.csv", "t.csv"]


def test_a_model_whose_output_is_not_finite(write, trained):
    import onnx

    bundle = Path(shutil.copytree(trained / "run/bundle", "bundle"))
    info = layout.read_info(bundle)
    model = onnx.load(bundle / "model.onnx")
    [bias] = [weights for weights in model.graph.initializer if weights.dims == [len(info.labels)]]
    bias.raw_data = np.full(len(info.labels), np.nan, np.float32).tobytes()
    onnx.save(model, bundle / "model.onnx")
    info = layout.write_info(bundle, **{key: value for key, value in vars(info).items() if key not in ("files", "bundle_id")})
    with pytest.raises(BundleError, match=info.bundle_id):
        predict_table(bulk_predictor(bundle, "float32"), write("t.csv", "text\nx\n"), "text", "out.csv")
    assert names() == ["bundle", "t.csv"]


def test_the_command(write, run, trained):
    write("t.csv", "body,label\nso good,007\n")
    arguments = ["predict", trained / "run/bundle", "--file", "t.csv", "--text-column", "body", "--output", "out.csv"]
    assert run(*arguments, "--variant", "float32")[:2] == (0, "out.csv: 1 rows\n")
    table = cells("out.csv")
    assert list(table)[:4] == ["body", "label", "predicted_label", "score"] and table["label"] == ["007"]
    code, _, error = run(*arguments, "--variant", "int4")
    assert code == 2 and "--variant" in error and "int4" in error
    assert run("predict", trained / "run", "so good", "--variant", "int8")[0] == 0  # a run's folder


@pytest.mark.parametrize(("content", "more"), [
    ("id|text\n1|na\u00efve, so good\n".encode("latin-1"), ["--delimiter", "|", "--encoding", "latin-1"]),
    ("id\ttext\n1\tna\u00efve, so good\n".encode("utf-16"), ["--delimiter", "tab", "--encoding", "utf-16"]),
])  # fmt: skip
def test_the_command_reads_other_layouts(write, run, trained, content, more):
    assert run("predict", trained / "run", "--file", write("t.csv", content), "--output", "out.csv", *more)[0] == 0
    assert cells("out.csv")["text"] == ["na\u00efve, so good"]
    for flag in ("--delimiter", "--encoding"):
        code, _, error = run("predict", trained / "run", "--file", "t.csv", "--output", "out.csv", flag, "wrong")
        assert code == 2 and error.startswith("ConfigError: --") and f"{flag} 'wrong'" in error


def test_the_command_knows_the_text_column(write, run, trained, workdir):
    shutil.copytree(trained / "run/bundle", "bundle")
    info = layout.read_info("bundle")
    fields = {key: value for key, value in vars(info).items() if key not in ("files", "bundle_id")}
    write("t.csv", "body,text\nso good,sad\n")
    answers = []
    for data in ({**info.data, "text_column": "body"}, info.data, {"name": "old", "fingerprint": "0"}):
        layout.write_info(Path("bundle"), **{**fields, "data": data})
        assert run("predict", "bundle", "--file", "t.csv", "--output", "out.csv")[0] == 0
        answers.append(cells("out.csv")["prob_positive"])
    assert answers[0] != answers[1] == answers[2]


def test_the_command_reads_standard_input(run, trained, monkeypatch):
    texts = ["so good", "what a day", "naïve \t tab"]
    by_argument = run("predict", trained / "run", *texts)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfso good\r\n\nwhat a day\n" + texts[2].encode())))
    assert run("predict", trained / "run", "-") == by_argument
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"good\nna\xefve\n")))
    code, _, error = run("predict", trained / "run", "-")
    assert code == 2 and error.startswith("DataError: ") and "line 2" in error and "UTF-8" in error


@pytest.mark.parametrize(("table", "column", "output", "named"), [
    ("no.csv", "text", "o.csv", "no.csv"),
    ("t.csv", "texts", "o.csv", "t.csv"),
    ("t.csv", "text", "o.xls", "--output o.xls"),
    ("t.xls", "text", "o.csv", "t.xls"),
])  # fmt: skip
def test_bad_arguments_of_the_command(write, run, trained, table, column, output, named):
    for name in ("t.csv", "t.xls"):
        write(name, "text\nx\n")
    code, _, error = run("predict", trained / "run/bundle", "--file", table, "--text-column", column, "--output", output)
    assert code == 2 and error.startswith(f"DataError: {named}") and names() == ["t.csv", "t.xls"]
