"""Answers for a table: what is read and written, what is kept after a stop, and what is refused."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from sodaops.bundle import layout
from sodaops.cli import main
from sodaops.data.sources import write_table
from sodaops.errors import BundleError, DataError, StorageError
from sodaops.inference.bulk import cut
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
    content = pa.BufferReader(Path(path).read_bytes())  # of a file, Arrow lets go some time later
    found = pa.csv.read_csv(content, parse_options=options, convert_options=types).to_pydict()
    return {**found, "label": [label or None for label in found["label"]]}


@pytest.mark.parametrize("given", ["t.csv", "t.tsv", "t.jsonl", "t.parquet", "t.csv.gz", "t.jsonl.gz"])
@pytest.mark.parametrize("output", ["out.csv", "out.tsv", "out.jsonl", "sub/out.parquet"])
def test_formats(workdir, predictor, given, output):
    write_table(pa.table(ROWS), given.removesuffix(".gz"), given.split(".")[1])
    if given.endswith(".gz"):
        Path(given).write_bytes(gzip.compress(Path(given[:-3]).read_bytes()))
    assert predict_table(predictor, given, "text", output) == (7, 0)
    found = cells(output)
    labels = predictor.info.labels
    assert list(found) == ["id", "text", "label", "score", *(f"prob_{label}" for label in labels)]
    assert found["id"] == ROWS["id"] and found["text"] == TEXTS
    for i, text in enumerate(TEXTS):
        values = [found[name][i] for name in list(found)[2:]]
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
    for found in (small, middle, whole):
        assert found.select(["id", "text"]).equals(tweets)
        probs = np.column_stack([found[f"prob_{label}"].to_numpy() for label in predictor.info.labels])
        assert np.abs(probs - expected).max() < 1e-5 and np.ptp(probs, axis=0).min() > 1e-3
        best = [predictor.info.labels[i] for i in probs.argmax(axis=1)]
        assert found["label"].to_pylist() == best and found["score"].to_pylist() == probs.max(axis=1).tolist()


def test_batches_are_cut_into_chunks():
    table = pa.table({"i": range(5000), "text": ["x" * 10] * 5000})
    for sizes in ([5000], [1, 2999, 2000], [700] * 7 + [100]):
        starts = np.cumsum([0, *sizes[:-1]]).tolist()
        batches = [table.slice(start, n).combine_chunks().to_batches()[0] for start, n in zip(starts, sizes, strict=True)]
        assert [len(chunk) for chunk in cut(batches, 2000, 10**9)] == [2000, 2000, 1000]
        small = list(cut(batches, 10**9, 30_000))
        assert pa.concat_tables(small).equals(table) and max(chunk.nbytes for chunk in small) < 60_000


def test_columns_that_are_called_as_the_answers(workdir, predictor):
    write_table(pa.table({"text": ["x"], "label": ["mine"], "predicted_label": ["theirs"], "score": ["1"]}), "t.csv", "csv")
    predict_table(predictor, "t.csv", "text", "out.parquet")
    found = pq.read_table("out.parquet").to_pydict()
    first = predictor.info.labels[0]
    assert list(found)[:7] == [
        "text", "label", "predicted_label", "score", "predicted_predicted_label", "predicted_score", f"prob_{first}"
    ]  # fmt: skip
    assert (found["label"], found["predicted_label"], found["score"]) == (["mine"], ["theirs"], ["1"])
    assert found["predicted_predicted_label"][0] in predictor.info.labels
    predict_table(predictor, "out.parquet", "text", "again.parquet")  # its own output is a table as others
    assert len(set(pq.read_schema("again.parquet").names)) == len(found) + 2 + len(predictor.info.labels)


def test_the_input_may_be_the_output(workdir, predictor):
    write_table(pa.table(ROWS), "t.csv", "csv")
    predict_table(predictor, "t.csv", "text", "t.csv")
    assert cells("t.csv")["text"] == TEXTS and names() == ["t.csv"]


def test_texts_that_are_nothing_or_numbers(workdir, predictor):
    numbers = pa.array([7, None, 9], pa.int64())
    floats = pa.array([1.0, None, 2.5])
    pq.write_table(pa.table({"text": numbers, "f": floats, "none": pa.nulls(3)}), "t.parquet")
    predict_table(predictor, "t.parquet", "text", "out.jsonl")
    found = cells("out.jsonl")
    assert (found["text"], found["f"], found["none"]) == (["7", "", "9"], ["1", "", "2.5"], ["", "", ""])
    assert [label is None for label in found["label"]] == [False, True, False]
    lines = [{"text": 7, "n": 1, "b": True}, {"text": None, "n": 1.5}, {"n": 2.50}, {"text": 12, "b": False}]
    Path("t.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    predict_table(predictor, "t.jsonl", "text", "out.jsonl")
    found = cells("out.jsonl")
    assert (found["text"], found["b"]) == (["7", "", "", "12"], ["true", "", "", "false"])
    assert found["n"] == ["1", "1.5", "2.5", ""]
    assert [label is None for label in found["label"]] == [False, True, True, False]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "", "t.csv: no column text"),
        ("t.csv", "id,text\n", "t.csv: has no rows; expected at least one"),
        ("t.jsonl", "\n\n", "t.jsonl"),
        ("t.csv", "id,text\n1,x\n2,y\n3", r"1 rows do not have the header's 2 cells: row 3 \(1 cells\)"),
        ("t.tsv", "id\ttext\n1\tx\n" + "1\n" * 7, r"7 rows .*row 2 \(1 cells\), .*, row 6 \(1 cells\) and 2 more"),
        ("t.csv", b"id,text\n1,x\n2,caf\xe9\n", "t.csv line 3, byte 6: 0xe9 is not UTF-8.*iconv"),
        ("t.jsonl", b'{"text": "x"}\n{"text": "caf\xe9"}\n', "t.jsonl"),
        ("t.jsonl", '{"text": "x"}\n{"text": "y', "t.jsonl: not a readable jsonl table"),
        ("t.jsonl", '{"text": ["x"]}\n', "t.jsonl.*column text holds a? ?list"),
        ("t.jsonl", '{"text": "\\ud83d"}\n', "t.jsonl"),
        ("t.csv", "id,text,id\n1,x,2\n", "column id stands twice in the header"),
        ("t.csv", "id,texts\n1,x\n", r"no column text \(did you mean texts\?\).*Set --text-column"),
        ("t.csv.gz", gzip.compress(b"id,text\n" + b"1,x\n" * 9000, mtime=0)[:-20], "t.csv.gz: not a readable csv table"),
        ("t.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 9000, mtime=0)[:-20], "t.jsonl.gz: not a readable jsonl table"),
    ],
)
def test_bad_tables(write, predictor, name, content, message):
    with pytest.raises(DataError, match=message):
        predict_table(predictor, write(name, content), "text", "new/out.csv")
    assert names() == [name]


def test_a_parquet_table_that_is_cut_off_empty_or_no_text(workdir, predictor, tweets):
    def refused(message):
        with pytest.raises(DataError, match=message):
            predict_table(predictor, "t.parquet", "text", "out.csv")

    pq.write_table(tweets, "t.parquet")
    whole = Path("t.parquet").read_bytes()
    Path("t.parquet").write_bytes(whole[:-1000])
    refused("t.parquet: not a readable parquet table")
    Path("t.parquet").write_bytes(whole[:2000] + b"\xff" * 8000 + whole[10_000:])
    refused("t.parquet: ")
    pq.write_table(tweets.slice(0, 0), "t.parquet")
    refused("t.parquet: has no rows; expected at least one")
    pq.write_table(pa.table({"text": ["x"], "tags": [["a"]]}), "t.parquet")
    refused("t.parquet: column tags holds list<element: string>; expected text")
    pq.write_table(pa.table({"text": pa.array([b"fine", b"caf\xe9"])}), "t.parquet")
    refused(r"t.parquet: a cell cannot be read as text .*rows 1 to 2")
    assert names() == ["t.parquet"]


@pytest.mark.parametrize("output", ["out.xlsx", "out.csv.gz", "folder.csv"])
def test_outputs_that_cannot_be(write, predictor, output):
    Path("folder.csv").mkdir()
    with pytest.raises(DataError, match=f"--output {output}: expected a file whose name ends in .csv"):
        predict_table(predictor, write("t.csv", "text\nx\n"), "text", output)


@pytest.fixture
def small_disk(workdir):
    """A real file system with 256 KiB of room."""
    Path("disk").mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", "disk"], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a file system needs root")
    yield Path("disk")
    subprocess.run(["umount", "disk"], check=True)


def test_an_output_folder_that_cannot_be_written_to(write, predictor, small_disk):
    write("t.csv", "text\nx\n")
    with pytest.raises(StorageError, match=r"t.csv/out.csv: could not be written .*check that the folder exists"):
        predict_table(predictor, "t.csv", "text", "t.csv/out.csv")
    subprocess.run(["mount", "-o", "remount,ro", "disk"], check=True)
    with pytest.raises(StorageError, match=r"out.csv: could not be written \(Read-only file system\)"):
        predict_table(predictor, "t.csv", "text", "disk/out.csv")


def test_a_full_disk_and_the_same_call_again(predictor, trained, tweets, small_disk, workdir):
    pq.write_table(tweets, "t.parquet")
    ballast = small_disk / "ballast"

    def fill():
        ballast.write_bytes(b"x" * 190_000)
        with pytest.raises(StorageError, match=r"No space left on device\); make room there, then run it again"):
            predict_table(predictor, "t.parquet", "text", "disk/out.csv", chunk_rows=50)
        ballast.unlink()
        [folder] = [path for path in small_disk.iterdir() if path.is_dir()]
        parts = sorted(path.name for path in folder.iterdir())
        assert parts and parts[0] == "000000000000-50.parquet"  # and no half-written one, nor the output
        assert all(name.endswith("-50.parquet") for name in parts) and names() == ["disk", "t.parquet"]
        return folder, len(parts) * 50

    def again(chosen=predictor):
        found = predict_table(chosen, "t.parquet", "text", "disk/out.csv", chunk_rows=50)
        assert os.listdir(small_disk) == ["out.csv"] and cells("disk/out.csv")["id"] == ids
        (small_disk / "out.csv").unlink()
        return found.n_resumed

    ids = tweets["id"].to_pylist()
    _, n_kept = fill()
    assert 0 < n_kept < 500
    assert again() == n_kept
    fill()
    os.utime("t.parquet", ns=(0, 0))  # a changed table
    assert again() == 0
    fill()
    assert again(bulk_predictor(trained / "run/bundle", "float32")) == 0  # the other model
    folder, n_kept = fill()
    (folder / "000000000000-50.parquet").write_bytes(b"damaged")
    assert again() == n_kept - 50
    folder, n_kept = fill()
    part = folder / "000000000000-50.parquet"
    whole = bytearray(part.read_bytes())
    whole[60] ^= 1  # one bit of the first column's numbers
    part.write_bytes(whole)
    assert again() == n_kept - 50


def test_a_resumed_table_is_the_one_that_was_not_stopped(predictor, tweets, small_disk):
    pq.write_table(tweets, "t.parquet")
    predict_table(predictor, "t.parquet", "text", "whole.csv", chunk_rows=50)
    (small_disk / "ballast").write_bytes(b"x" * 190_000)
    with pytest.raises(StorageError):
        predict_table(predictor, "t.parquet", "text", "disk/out.csv", chunk_rows=50)
    (small_disk / "ballast").unlink()
    assert predict_table(predictor, "t.parquet", "text", "disk/out.csv", chunk_rows=50).n_resumed > 0
    assert Path("disk/out.csv").read_bytes() == Path("whole.csv").read_bytes()


def test_one_at_a_time(write, predictor):
    write("t.csv", "text\nx\n")
    code = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); input()"
    command = [sys.executable, "-c", code, ".out.csv.work.lock"]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(StorageError, match=r"out.csv: another process is writing it; wait .* or name another output"):
        predict_table(predictor, "t.csv", "text", "out.csv")
    other.communicate("\n")
    assert predict_table(predictor, "t.csv", "text", "out.csv").n_rows == 1
    assert names() == ["out.csv", "t.csv"]


def test_a_model_that_gives_no_probabilities(write, trained):
    bundle = Path(shutil.copytree(trained / "run/bundle", "bundle"))
    info = layout.read_info(bundle)
    model = onnx.load(bundle / "model.onnx")
    [bias] = [weights for weights in model.graph.initializer if weights.dims == [len(info.labels)]]
    bias.raw_data = np.full(len(info.labels), np.nan, np.float32).tobytes()
    onnx.save(model, bundle / "model.onnx")
    layout.write_info(bundle, **{name: value for name, value in vars(info).items() if name not in ("files", "bundle_id")})
    with pytest.raises(BundleError, match="answers something other than probabilities"):
        predict_table(bulk_predictor(bundle, "float32"), write("t.csv", "text\nx\n"), "text", "out.csv")
    assert names() == ["bundle", "t.csv"]


def test_the_command(write, trained, capsys):
    write("t.csv", "body,label\nso good,1\n")
    bundle = str(trained / "run/bundle")
    arguments = ["predict", bundle, "--file", "t.csv", "--text-column", "body", "--output", "out.csv"]
    assert main([*arguments, "--variant", "float32"]) == 0
    assert capsys.readouterr().out == "out.csv: 1 rows\n"
    assert list(cells("out.csv"))[:4] == ["body", "label", "predicted_label", "score"]
    assert main([*arguments, "--variant", "int4"]) == 2
    assert "has no variant int4" in capsys.readouterr().err
    assert main(["predict", bundle, "so good", "--variant", "int8"]) == 0
