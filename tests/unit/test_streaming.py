"""Tables that are read in batches: the splits do not depend on the batches, errors name the row, and runs resume."""

import contextlib
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sodaops.cli import main
from sodaops.data import parts, preprocess as preprocessing, streams, workers
from sodaops.data.preprocess import preprocess, read_split
from sodaops.data.sources import read_table, write_table
from sodaops.data.splits import SPLITS, assign_split
from sodaops.errors import DataError, StorageError
from sodaops.tasks import SINGLE_LABEL
from sodaops.tasks.single_label import SingleLabel
from sodaops.text.cleaning import clean
from tests.conftest import REPO, configured, file_size_limit, make_rows, table

COLUMNS = ["text", "label"]
SCRIPT_WITHOUT_GUARD = """
import sys
sys.path.insert(0, REPO)
from sodaops.data import parts, workers
from sodaops.data.preprocess import preprocess
from sodaops.tasks import SINGLE_LABEL
from sodaops.tasks.single_label import SingleLabel
from tests.conftest import configured
workers.LOCAL_ROWS, workers._n_workers, parts.PART_ROWS = 1, lambda: 2, 50
preprocess(configured("data=csv", "data.path=t.csv").data, "splits")
""".replace("REPO", repr(str(REPO)))


def config_of(path="t.csv", *overrides):
    return configured("data=csv", f"data.path={path}", *overrides).data


def read_splits(splits="splits"):
    return {split: read_split(splits, split).to_pylist() for split in SPLITS}


def temporary_files():
    return sorted(path.name for path in Path().iterdir() if path.name.startswith("."))


@pytest.fixture
def tiny_batches(monkeypatch):
    monkeypatch.setattr(streams, "BLOCK_BYTES", 400)
    monkeypatch.setattr(streams, "MAX_BLOCK_BYTES", 100_000)
    monkeypatch.setattr(streams, "MAX_BATCH_ROWS", 11)
    monkeypatch.setattr(parts, "PART_ROWS", 7)


def split_row_by_row(first, added):
    """The expected splits and dropped rows, computed row by row; tables are given as path -> [(text, label)]."""
    rows = [
        (path, i, clean(text), label, path in added)
        for path, cells in (first | added).items()
        for i, (text, label) in enumerate(cells, 1)
    ]
    known = {text for *_, text, _, is_added in rows if not is_added}
    dropped, seen, splits, labels_of = {}, set(), {split: [] for split in SPLITS}, {}
    for _, _, text, label, is_added in rows:
        if text and not (is_added and text in known):
            labels_of.setdefault(text, set()).add(label)
    for path, i, text, label, is_added in rows:
        reason = "empty_text" if not text else "known_text" if is_added and text in known else None
        reason = reason or ("two_labels" if len(labels_of[text]) > 1 else "repeated_text" if text in seen else None)
        if reason:
            dropped.setdefault(reason, []).append(f"{path} row {i}")
            continue
        seen.add(text)
        split = assign_split(text)
        splits["train" if is_added and split == "test" else split].append((path, i, text, label))
    return splits, {reason: {"n_rows": len(places), "first": places[:5]} for reason, places in dropped.items()}


@pytest.mark.parametrize("seed", range(3))
def test_batches_give_the_same_splits_as_single_rows(write, tiny_batches, monkeypatch, seed):
    monkeypatch.setattr("sodaops.data.rows._CHUNK_ROWS", 50)
    rng = random.Random(seed)
    texts = [f"text {i} &amp;  more" for i in range(150)] + ["", " \u200b", "&#32;", "é" * 30]

    def rows(n):
        return [(text, "good" if len(text) % 3 else "bad") for text in rng.choices(texts, k=n)]

    conflict = [("text 3 &amp; more", "good"), ("text 3 & more", "bad")]
    first = {"t.csv": [*rows(300), *conflict, *rows(5)]}
    added = {"added/x.csv": rows(90), "added/y.csv": [*rows(40), *[(f"new {i}", "bad") for i in range(30)] * 2]}
    Path("added").mkdir()
    for path, cells in (first | added).items():
        write(path, table(cells))
    manifest = preprocess(config_of("t.csv", "data.added=added", "data.conflicts=drop"), "splits")
    expected, dropped = split_row_by_row(first, added)
    found = {split: [(r["source"], r["row"], r["text"], r["label"]) for r in rows] for split, rows in read_splits().items()}
    assert found == expected
    assert manifest["dropped"] == dropped and len(dropped) == 4
    assert manifest["n_kept"] == sum(map(len, expected.values())) and manifest["n_read"] == 307 + 90 + 100


@pytest.mark.slow
def test_batch_sizes_do_not_change_the_splits(write, monkeypatch):
    rows = [(text, label, i % 4 or "", "ab"[i % 2]) for i, (text, label) in enumerate(make_rows(500))]
    write("t.csv", table([*rows, *rows[:9]], ("text", "label", "votes", "side")))
    config = config_of(
        "t.csv", "data.labels=[good,bad]", "data.vote_columns={bad: votes, good: votes}", "data.slice_columns=[side]"
    )
    manifest = preprocess(config, "splits")
    before = read_splits()
    monkeypatch.setattr(streams, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(parts, "PART_ROWS", 3)
    monkeypatch.setattr("sodaops.data.split_files._GROUP_ROWS", 40)
    assert preprocess(config, "splits2")["dropped"] == manifest["dropped"]
    assert read_splits("splits2") == before and pq.ParquetFile("splits2/train.parquet").num_row_groups > 5
    again = json.loads(Path("splits2/manifest.json").read_text())
    assert {**again, "splits": 0} == {**manifest, "splits": 0}
    assert [{**entry, "sha256": 0} for entry in again["splits"].values()] == [
        {**entry, "sha256": 0} for entry in manifest["splits"].values()
    ]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet", "csv.gz", "jsonl.gz"])
def test_every_format_in_small_blocks(workdir, tiny_batches, kind):
    rows = pa.table(
        {"text": [f'line {i}\nnext, "q" é' * (1 + i % 4) for i in range(300)], "label": [str(i % 3) for i in range(300)]}
    )
    write_table(rows, f"t.{kind.split('.')[0]}", kind.split(".")[0])
    if kind.endswith(".gz"):
        subprocess.run(["gzip", f"t.{kind[:-3]}"], check=True)
    assert read_table(f"t.{kind}", COLUMNS).to_pydict() == rows.to_pydict()


def test_json_numbers_stay_as_they_are_written(write, tiny_batches):
    cells = ["1", "1.0", "2.50", "1e400", "-0", "12345678901234567891", '"2024-11-05"', "true", "null", "NaN", '""']
    write("t.jsonl", "".join(f'{{"text": "{i}", "label": {cell}}}\n' for i, cell in enumerate(cells * 20)))
    expected = [{"null": ""}.get(cell, cell.strip('"')) for cell in cells * 20]
    assert read_table("t.jsonl", COLUMNS)["label"].to_pylist() == expected


def test_parquet_floats_are_read_as_integers_only_if_all_are_whole(workdir, tiny_batches):
    numbers = [1.0, None, 2.0] * 40
    pq.write_table(pa.table({"text": ["x"] * 121, "label": [*numbers, 3.0]}), "whole.parquet")
    pq.write_table(pa.table({"text": ["x"] * 121, "label": [*numbers, 0.5]}), "broken.parquet", row_group_size=10)
    assert read_table("whole.parquet", COLUMNS)["label"].to_pylist() == ["1", "", "2"] * 40 + ["3"]
    assert read_table("broken.parquet", COLUMNS)["label"].to_pylist()[-2:] == ["2", "0.5"]


N_VALID = 900
INVALID = {
    "ragged": ("t.csv", lambda rows: rows + b"1,2,3\n" + rows[11:] + b"1\n", r"2 rows .* 2 .*row 901 \(3 .*row 1802 \(1 "),
    "not UTF-8": ("t.csv", lambda rows: rows + b"caf\xe9,good\n" + rows[11:], "t.csv line 902, byte 4: 0xe9"),
    "JSON not UTF-8": ("t.jsonl", lambda rows: rows + b'{"text": "caf\xe9"}\n', "t.jsonl line 901, byte 14: 0xe9"),
    "broken JSON": ("t.jsonl", lambda rows: rows + b"{broken}\n", "t.jsonl: .*in row 901"),
    "a list": ("t.jsonl", lambda rows: rows + b'{"text": "x", "label": [1]}\n', "t.jsonl: .*in row 901 .*label .*list"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", INVALID)
def test_errors_name_an_invalid_row_in_a_later_block(write, tiny_batches, case):
    name, corrupt, message = INVALID[case]
    texts = make_rows(N_VALID)
    csv_rows = "text,label\n" + "".join(f"{text},{label}\n" for text, label in texts)
    json_rows = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in texts)
    write(name, corrupt((csv_rows if name == "t.csv" else json_rows).encode()))
    with pytest.raises(DataError, match=message):
        preprocess(config_of(name), "splits")
    assert os.listdir() == [name]


@pytest.mark.slow
def test_truncated_and_damaged_parquet_files(workdir, tiny_batches, capsys):
    rows = pa.table({"text": [f"text {i} {random.random()}" for i in range(3000)], "label": ["good", "bad"] * 1500})
    pq.write_table(rows, "t.parquet", row_group_size=500)
    whole = Path("t.parquet").read_bytes()
    Path("t.parquet").write_bytes(whole[: len(whole) // 2])
    assert main(["preprocess", "data=csv", "data.path=t.parquet", "evaluate.splits_dir=splits"]) == 2
    assert capsys.readouterr().err.startswith("DataError: t.parquet: ")
    middle = len(whole) // 2
    Path("t.parquet").write_bytes(whole[:middle] + b"\xff" * 3000 + whole[middle + 3000 :])
    with pytest.raises(DataError, match="t.parquet: .* row [1-9]"):
        preprocess(config_of("t.parquet"), "splits")
    assert os.listdir() == ["t.parquet"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_very_long_text(workdir, kind):
    rows = [*make_rows(300), ("huge " * 2_000_000, "good"), *[(f"after {text}", label) for text, label in make_rows(300)]]
    write_table(pa.table({"text": [text for text, _ in rows], "label": [label for _, label in rows]}), f"t.{kind}", kind)
    with pytest.raises(DataError, match=f"t.{kind} row 301: text .*10,000,000 .*100,000 .*301.*data.max_chars"):
        preprocess(config_of(f"t.{kind}"), "splits")
    assert preprocess(config_of(f"t.{kind}", "data.max_chars=20_000_000"), "splits")["n_kept"] == 601
    lengths = {row["row"]: len(row["text"]) for rows in read_splits().values() for row in rows}
    assert lengths[301] == 9_999_999 and len(lengths) == 601


def test_a_full_disk_leaves_only_the_old_splits(write, monkeypatch):
    write("t.csv", table(make_rows(200)))
    first = preprocess(config_of(), "splits")
    write("t.csv", table([(f"{text} {random.random()}", label) for text, label in make_rows(5000)]))
    for n_bytes, n_rows in ((2000, 5000), (12_000, 50)):  # too small for a part; large enough for parts, not for splits
        monkeypatch.setattr(parts, "PART_ROWS", n_rows)
        with file_size_limit(n_bytes), pytest.raises(StorageError, match=r"splits\S*: .*File too large"):
            preprocess(config_of(), "splits")
        assert temporary_files() == [] and json.loads(Path("splits/manifest.json").read_text()) == first


def test_a_folder_that_cannot_be_created(write):
    write("t.csv", table(make_rows()))
    write("taken", "a file")
    with pytest.raises(StorageError, match="taken/splits: "):
        preprocess(config_of(), "taken/splits")
    assert sorted(os.listdir()) == ["t.csv", "taken"]


@pytest.fixture
def two_workers(write, monkeypatch):
    """A table of 3,000 rows in 60 parts, all but the first of which two worker processes make."""
    monkeypatch.setattr(workers, "LOCAL_ROWS", 1)
    monkeypatch.setattr(workers, "_n_workers", lambda: 2)
    monkeypatch.setattr(parts, "PART_ROWS", 50)
    write("t.csv", table(make_rows(3000)))


@pytest.mark.slow
def test_worker_processes_give_the_same_splits(two_workers, monkeypatch):
    manifest = preprocess(config_of(), "splits")
    monkeypatch.setattr(workers, "LOCAL_ROWS", 10**9)
    assert preprocess(config_of(), "here") == manifest
    assert read_splits() == read_splits("here") and temporary_files() == []


@pytest.mark.slow
def test_errors_in_worker_processes_are_raised(two_workers):
    long = [(f"{i} {random.randbytes(500).hex()}", label) for i, (_, label) in enumerate(make_rows(1000))]
    Path("t.csv").write_text(table([*make_rows(1000), *long]))
    with file_size_limit(15_000), pytest.raises(StorageError, match="File too large"):
        preprocess(config_of(), "splits")
    assert os.listdir() == ["t.csv"]


@pytest.mark.slow
def test_finished_parts_are_kept_if_a_worker_process_is_killed(two_workers):
    stop, earlier = threading.Event(), set(psutil.Process().children())

    def kill():
        while not stop.is_set():
            for child in set(psutil.Process().children()) - earlier:
                with contextlib.suppress(psutil.Error):  # one that ends meanwhile
                    if "popen_loky" in " ".join(child.cmdline()):
                        child.kill()
                        return
            time.sleep(0.01)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(kill)
        try:
            with pytest.raises(parts.PartsKeptError, match="t.csv: .*row [1-9]"):
                preprocess(config_of(), "splits")
        finally:
            stop.set()
    (folder,) = Path().glob(".splits.work.*")
    assert "000-000000000001-000050.arrow" in os.listdir(folder) and not Path("splits").exists()
    assert preprocess(config_of(), "splits")["n_kept"] == 3000
    assert temporary_files() == []


def test_work_folders_of_other_fingerprints_are_deleted(write):
    write("t.csv", table(make_rows()))
    Path(".splits.work.0123456789abcdef").mkdir()
    Path(".splits2.work.0123456789abcdef").mkdir()
    preprocess(config_of(), "splits")
    assert temporary_files() == [".splits2.work.0123456789abcdef"]


@pytest.fixture
def stopped_run(two_workers, monkeypatch):
    """The work folder of a run that was stopped after its first four parts."""
    write_part, n_written = workers.write_part, 0

    def four_parts(path, rows):
        nonlocal n_written
        n_written += 1
        if n_written > 4:
            raise KeyboardInterrupt
        write_part(path, rows)

    monkeypatch.setattr(workers, "LOCAL_ROWS", 10**9)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(workers, "write_part", four_parts)
        preprocess(config_of(), "splits")
    (folder,) = Path().glob(".splits.work.*")
    assert len(os.listdir(folder)) == 4
    return folder


def test_only_a_damaged_part_is_computed_again(stopped_run):
    damaged = stopped_run / "000-000000000101-000050.arrow"
    damaged.write_bytes(damaged.read_bytes()[:200])
    with pytest.raises(DataError, match="000101-000050.arrow"):
        preprocess(config_of(), "splits")
    assert len(os.listdir(stopped_run)) == 59 and not damaged.exists()
    assert preprocess(config_of(), "splits")["n_kept"] == 3000
    assert temporary_files() == []


def test_one_flipped_bit_in_a_part_is_detected(tmp_path):
    """Arrow itself reads four fifths of these files with wrong content and no error, and crashes on a few."""
    part = parts.Part(tmp_path / "0.arrow", "t.csv", 0, 1, 50)
    raw = pa.RecordBatch.from_pydict({"text": [text for text, _ in make_rows(50)], "label": 25 * ["a", "b"]})
    parts.write_part(part.path, parts.prepare_rows(raw, 1, config_of(), SINGLE_LABEL))
    whole, rng = part.path.read_bytes(), random.Random(0)
    assert parts.read_part(part)[0].num_rows == 50
    for place in [0, len(whole) - 1, *rng.sample(range(len(whole)), 300)]:
        corrupted = bytearray(whole)
        corrupted[place] ^= 1 << rng.randrange(8)
        for selection_only in (True, False):
            part.path.write_bytes(corrupted)
            with pytest.raises(parts.PartsKeptError, match="0.arrow"):
                parts.read_part(part, selection_only)
            assert not part.path.exists()


@pytest.mark.slow
@pytest.mark.parametrize("module", preprocessing.PART_CODE, ids=lambda module: module.__name__)
def test_parts_of_other_code_versions_are_deleted(module, stopped_run, workdir, monkeypatch):
    changed = workdir / "changed.py"
    changed.write_bytes(Path(module.__file__).read_bytes() + b"# changed")
    monkeypatch.setattr(module, "__file__", str(changed))
    preprocess(config_of(), "splits")
    assert not stopped_run.exists() and temporary_files() == []


def test_part_code_lists_every_module_that_parts_depend_on():
    known = {module.__name__ for module in preprocessing.PART_CODE} | {
        "sodaops.io.storage",
        "sodaops.config.schema",
        "sodaops.errors",
        "sodaops.data.json_lines",  # it reads rows before they are in parts
        "sodaops.tasks.base",  # the classes of the task are hashed too
        "sodaops.text.trust",
    }
    for module in preprocessing.PART_CODE:
        source = Path(module.__file__).read_text(encoding="utf-8")
        for where, names in re.findall(r"^from (sodaops[.\w]*) import (.+)$", source, re.MULTILINE):
            found = {where} if where in known else {f"{where}.{name.strip()}" for name in names.split(",")}
            assert found <= known, f"{module.__name__} imports {found - known}"


@pytest.mark.slow
def test_a_script_without_a_main_guard(write):
    write("t.csv", table(make_rows(300)))
    write("own.py", SCRIPT_WITHOUT_GUARD)
    subprocess.run([sys.executable, "own.py"], check=True, timeout=300)
    assert sum(map(len, read_splits().values())) == 300


def test_a_label_column_with_too_many_values(write, monkeypatch):
    monkeypatch.setattr(SingleLabel, "max_cells", 40)
    monkeypatch.setattr(parts, "PART_ROWS", 50)
    write("t.csv", table([(text, f"id{i}") for i, (text, _) in enumerate(make_rows(200))]))
    with pytest.raises(DataError, match="t.csv: label .* 40 .* 50 .*data.label_column"):
        preprocess(config_of(), "splits")


@pytest.mark.slow
def test_two_concurrent_runs(write):
    write("t.csv", table(make_rows(2000)))
    code = "import sys; from sodaops.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "preprocess", "data=csv", "data.path=t.csv", "evaluate.splits_dir=splits"]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    assert [(one.communicate(timeout=300)[1], one.returncode) for one in both] == [("", 0), ("", 0)]
    assert sum(map(len, read_splits().values())) == 2000
    assert temporary_files() == []
