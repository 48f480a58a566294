import os
from pathlib import Path

import pytest

from sodaops.errors import StorageError
from sodaops.io import storage


def names():
    return sorted(path.name for path in Path().iterdir())


def test_a_file_is_whole_or_as_before(workdir):
    storage.write_text("a.txt", "old")
    with pytest.raises(RuntimeError), storage.atomic_path("a.txt") as path:
        path.write_text("half")
        raise RuntimeError
    assert Path("a.txt").read_text() == "old" and names() == ["a.txt"]
    storage.write_json("sub/b.json", {"é": 1})
    with pytest.raises(ValueError):
        storage.write_json("sub/b.json", {"x": float("nan")})
    assert Path("sub/b.json").read_text(encoding="utf-8") == '{\n  "é": 1\n}\n'


def test_a_folder_is_whole_or_as_before(workdir):
    for content in ("old", "new"):
        with storage.atomic_folder("f", ["x"]) as folder:
            (folder / "x").write_text(content)
    assert Path("f/x").read_text() == "new"
    with pytest.raises(RuntimeError), storage.atomic_folder("f", ["x"]) as folder:
        (folder / "x").write_text("half")
        raise RuntimeError
    assert Path("f/x").read_text() == "new" and names() == ["f"]


def test_what_killed_processes_left_is_deleted_and_what_others_write_is_not(workdir):
    for name in (".a.abcd1234.tmp", ".f.abcd_123.tmp/x", ".f.abcd1234.old/f/x", ".f.backup01", ".f.abcd1234.tmp~"):
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("old")
    with pytest.raises(RuntimeError), storage.atomic_folder("f", ["x"]):
        assert Path("f/x").read_text() == "old"  # a process was killed before it replaced this folder
        raise RuntimeError
    with storage.atomic_path("a") as one:
        one.write_text("one")
        storage.write_text("a", "other")
        assert one.read_text() == "one"
    assert Path("a").read_text() == "one" and names() == [".f.abcd1234.tmp~", ".f.backup01", "a", "f"]


@pytest.mark.parametrize(("present", "target", "named"), [("f/thesis.tex", "f", "thesis.tex"), ("file", "file/f", "file/f")])
def test_a_folder_that_cannot_be_made(workdir, present, target, named):
    storage.write_text(present, "years of work")
    with pytest.raises(StorageError, match=named), storage.atomic_folder(target, ["x"]):
        pytest.fail("entered")
    assert Path(present).read_text() == "years of work"


def test_a_full_disk(small_disk):
    storage.write_text(small_disk / "old", "x" * 1000)
    for name in ("new", "old"):
        with pytest.raises(StorageError, match=f"{small_disk / name}: .*No space left on device"):
            storage.write_text(small_disk / name, "x" * 10**6)
    with pytest.raises(StorageError), storage.atomic_folder(small_disk / "folder", []) as folder:
        (folder / "big").write_bytes(b"x" * 10**6)
    assert os.listdir(small_disk) == ["old"] and (small_disk / "old").read_text() == "x" * 1000


def test_a_full_disk_while_preprocessing_and_saving(small_disk, trained, small_tweets):
    from sodaops.bundle.save import load_bundle, save_bundle
    from sodaops.data.preprocess import preprocess, read_manifest
    from tests.conftest import configured

    config = configured("model=tiny", f"data.path={small_tweets}")
    bundle = load_bundle(trained / "run/bundle")
    manifest = read_manifest(trained / "splits")
    with pytest.raises(StorageError, match=f"{small_disk}/bundle"):
        save_bundle(small_disk / "bundle", bundle.model, bundle.tokenizer, 0, config, manifest, {})
    (small_disk / "ballast").write_bytes(b"x" * 250_000)
    with pytest.raises(StorageError, match=r"splits\.work\S+: .*No space left on device"):
        preprocess(config.data, small_disk / "splits")
    assert os.listdir(small_disk) == ["ballast"]


def test_hashes(workdir):
    Path("x").write_bytes(b"abc")
    assert storage.sha256_of("x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
