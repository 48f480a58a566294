"""Files and folders at gs://, on an emulated bucket, and what is said when they cannot be had."""

import json
import socket
import sys
import time
from pathlib import Path

import fsspec
import pytest

from sodaops.errors import StorageError
from sodaops.io import remote
from sodaops.training import upload
from tests.conftest import configured
from tests.gcs import emulated_bucket, forget_clients, refusing


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """The address of an emulated bucket."""
    with emulated_bucket(tmp_path_factory.mktemp("gcs")) as address:
        yield address


@pytest.fixture
def cloud():
    """The bucket, as another program sees it."""
    return fsspec.core.url_to_fs("gs://bucket", token="anon", use_listings_cache=False)[0]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Copies go to a folder of this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def copies(folder):
    return sorted(path.read_text() for path in (folder / "cache").rglob("*") if path.is_file())


def test_a_copy_is_loaded_once_for_each_state(bucket, cloud, tmp_path, monkeypatch):
    cloud.pipe("bucket/copies/a.csv.gz", b"one")
    first = remote.local_copy(f"{bucket}/copies/a.csv.gz")
    assert first.name == "a.csv.gz" and first.read_text() == "one"
    assert (tmp_path / "cache/sodaops").stat().st_mode & 0o777 == 0o700
    with monkeypatch.context() as patch:
        patch.setattr(remote, "fetch_file", None)
        assert remote.local_copy(f"{bucket}/copies/a.csv.gz") == first
    cloud.pipe("bucket/copies/a.csv.gz", b"two")
    assert remote.local_copy(f"{bucket}/copies/a.csv.gz").read_text() == "two" and copies(tmp_path) == ["one", "two"]
    assert remote.local_copy("a.csv") == Path("a.csv")
    with pytest.raises(StorageError, match="copies: is a folder there"):
        remote.local_copy(f"{bucket}/copies")


def test_a_copy_that_is_another_is_refused(bucket, cloud, tmp_path):
    cloud.pipe("bucket/copies/b.csv", b"as it was")

    def changed(method, path, body):
        if "alt=media" in path or "/download/" in path:
            cloud.pipe("bucket/copies/b.csv", b"otherwise")
        return False

    with refusing(changed), pytest.raises(StorageError, match="b.csv: what came is not what is stored there"):
        remote.local_copy(f"{bucket}/copies/b.csv")
    assert copies(tmp_path) == []


def test_a_folder_is_whole_when_its_last_file_is_there(bucket, cloud, tmp_path):
    folder = tmp_path / "folder"
    (folder / "plots").mkdir(parents=True)
    for name, content in (("a.json", "{}"), ("plots/b.svg", "<svg/>"), ("z.bin", "z")):
        (folder / name).write_text(content)
    cloud.pipe({"bucket/whole/old.html": b"old", "bucket/whole/mine.txt": b"mine", "bucket/whole/a.json": b"old"})
    with refusing(lambda method, path, body: b'"whole/z.bin"' in body), pytest.raises(StorageError, match="whole: could not"):
        remote.publish(folder, f"{bucket}/whole", "a.json", ["a.json", "old.html", "never.html"])
    assert sorted(cloud.find("bucket/whole")) == ["bucket/whole/mine.txt", "bucket/whole/plots/b.svg"]
    remote.publish(folder, f"{bucket}/whole/", "a.json")
    assert cloud.cat("bucket/whole/a.json") == b"{}" and len(cloud.find("bucket/whole")) == 4


def test_rights(bucket, cloud):
    cloud.pipe("bucket/mine", b"x")
    who = "you@example.com does not have storage.objects.get access to the Google Cloud Storage object."
    with refusing(said=who):
        with pytest.raises(StorageError) as read:
            remote.local_copy(f"{bucket}/mine")
        with pytest.raises(StorageError) as written, remote.open_anywhere(f"{bucket}/mine", "wb") as file:
            file.write(b"x")
    for error, role in ((read, "roles/storage.objectViewer"), (written, "roles/storage.objectUser")):
        assert who in str(error.value) and f"lacks {role} there. Is it the right account?" in str(error.value)
        assert f"add-iam-policy-binding gs://bucket --member=serviceAccount:NAME --role={role}`" in str(error.value)
    who = "Anonymous caller does not have storage.objects.get access"
    with refusing(status=401, said=who), pytest.raises(StorageError, match=f"{who}.*Sign in with.*needs roles/storage.objectV"):
        remote.read_if_there(f"{bucket}/mine")


def test_what_is_not_there(bucket):
    assert remote.read_if_there(f"{bucket}/nothing") is None
    with pytest.raises(StorageError, match="gs://bucket/nothing.csv: could not be read; there is no such object"):
        remote.local_copy(f"{bucket}/nothing.csv")
    for ask in (remote.read_if_there, remote.local_copy, lambda path: remote.send_file(Path(__file__), path)):
        with pytest.raises(StorageError, match="no-bucket/a.csv: there is no bucket no-bucket. Check the name, or make it"):
            ask("gs://no-bucket/a.csv")


@pytest.fixture
def impatient(monkeypatch):
    """Clients that ask as often as always, and wait hardly at all."""
    monkeypatch.setattr("gcsfs.retry.min", lambda *_: 0, raising=False)
    monkeypatch.setattr(remote, "_READ_S", 0.1)
    yield
    forget_clients()


def test_no_connection(impatient, monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"could not be read \(Cannot connect to host 127.0.0.1:9.*the connection"):
        remote.local_copy("gs://bucket/a.csv")


def test_nobody_answers(impatient, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(StorageError, match=r"could not be read \(no answer in time.; check the address, the access and"):
            remote.local_copy("gs://bucket/a.csv")


def test_a_package_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "aiohttp", None)  # of gcsfs
    with pytest.raises(StorageError, match=r"is not installed; get it with `pip install 'sodaops\[gs\]'`"):
        remote.local_copy("gs://bucket/a.csv")


def test_a_run_lands_when_it_can_again(bucket, cloud, workdir, monkeypatch, caplog):
    monkeypatch.setattr(upload, "_INTERVAL_S", 0.05)
    until = time.monotonic() + 120
    with upload.uploading(configured(f"run_dir={bucket}/land")) as here:
        checkpoints = Path(here.run_dir) / "checkpoints"
        checkpoints.mkdir(parents=True)
        with refusing(said="quota"):
            for name in ("best.ckpt", "last.ckpt"):
                (checkpoints / name).write_text("one")
            while "quota" not in caplog.text and time.monotonic() < until:
                time.sleep(0.05)
        while not cloud.exists("bucket/land/checkpoints/last.ckpt") and time.monotonic() < until:
            time.sleep(0.05)
        assert cloud.cat("bucket/land/checkpoints/best.ckpt") == b"one" and "Forbidden" in caplog.text
    assert json.loads(cloud.cat("bucket/land/landed.json"))["whole"] is True
