"""Files and folders at gs://, on an emulated bucket, and the errors when they cannot be had."""

import json
import socket
import sys
import time
from pathlib import Path

import pytest

from sodaops.errors import StorageError
from sodaops.io import remote
from tests.conftest import configured, lazy
from tests.gcs import forget_clients, refusing

upload = lazy("sodaops.training.upload")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Copies go to a folder of this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def copies(folder):
    return sorted(path.read_text() for path in (folder / "cache").rglob("*") if path.is_file())


def test_a_copy_is_downloaded_once_for_each_version(bucket, cloud, tmp_path, monkeypatch):
    cloud.pipe("bucket/copies/a.csv.gz", b"one")
    first = remote.local_copy(f"{bucket}/copies/a.csv.gz")
    assert first.name == "a.csv.gz" and first.read_text() == "one"
    assert (tmp_path / "cache/sodaops").stat().st_mode & 0o777 == 0o700
    with monkeypatch.context() as patch:
        patch.setattr(remote, "download", None)
        assert remote.local_copy(f"{bucket}/copies/a.csv.gz") == first
    cloud.pipe("bucket/copies/a.csv.gz", b"two")
    assert remote.local_copy(f"{bucket}/copies/a.csv.gz").read_text() == "two" and copies(tmp_path) == ["one", "two"]
    assert remote.local_copy("a.csv") == Path("a.csv")
    with pytest.raises(StorageError, match=f"{bucket}/copies: .*folder"):
        remote.local_copy(f"{bucket}/copies")


def test_a_copy_that_differs_is_refused(bucket, cloud, tmp_path):
    cloud.pipe("bucket/copies/b.csv", b"as it was")

    def changed(method, path, body):
        if "alt=media" in path or "/download/" in path:
            cloud.pipe("bucket/copies/b.csv", b"otherwise")
        return False

    with refusing(changed), pytest.raises(StorageError, match=f"{bucket}/copies/b.csv"):
        remote.local_copy(f"{bucket}/copies/b.csv")
    assert copies(tmp_path) == []


def test_a_folder_is_complete_when_its_last_file_is_there(bucket, cloud, tmp_path):
    folder = tmp_path / "folder"
    (folder / "plots").mkdir(parents=True)
    for name, content in (("a.json", "{}"), ("plots/b.svg", "<svg/>"), ("z.bin", "z")):
        (folder / name).write_text(content)
    cloud.pipe({"bucket/whole/old.html": b"old", "bucket/whole/mine.txt": b"mine", "bucket/whole/a.json": b"old"})
    with refusing(lambda method, path, body: b'"whole/z.bin"' in body), pytest.raises(StorageError, match=f"{bucket}/whole"):
        remote.upload_folder(folder, f"{bucket}/whole", "a.json", ["a.json", "old.html", "never.html"])
    assert sorted(cloud.find("bucket/whole")) == ["bucket/whole/mine.txt", "bucket/whole/plots/b.svg"]
    remote.upload_folder(folder, f"{bucket}/whole/", "a.json")
    assert cloud.cat("bucket/whole/a.json") == b"{}" and len(cloud.find("bucket/whole")) == 4


def write(path):
    with remote.open_remote(path, "wb") as file:
        file.write(b"x")


@pytest.mark.parametrize(("status", "call", "role"), [
    (403, remote.local_copy, "roles/storage.objectViewer"),
    (403, write, "roles/storage.objectUser"),
    (401, remote.read_if_exists, "roles/storage.objectViewer"),
])  # fmt: skip
def test_missing_rights_name_the_role(bucket, cloud, status, call, role):
    cloud.pipe("bucket/mine", b"x")
    google = "you@example.com does not have storage.objects.get access to the Google Cloud Storage object."
    with refusing(status=status, message=google), pytest.raises(StorageError) as caught:
        call(f"{bucket}/mine")
    assert all(part in str(caught.value) for part in (f"{bucket}/mine", google, role))
    assert ("--member=" if status == 403 else "gcloud auth application-default login") in str(caught.value)


def test_missing_objects_and_buckets(bucket):
    assert remote.read_if_exists(f"{bucket}/nothing") is None
    with pytest.raises(StorageError, match=f"{bucket}/nothing.csv"):
        remote.local_copy(f"{bucket}/nothing.csv")
    for call in (remote.read_if_exists, remote.local_copy, lambda path: remote.upload(Path(__file__), path)):
        with pytest.raises(StorageError, match="no-bucket/a.csv: .* no-bucket.*gcloud storage buckets create gs://no-bucket"):
            call("gs://no-bucket/a.csv")


@pytest.fixture
def impatient(monkeypatch):
    """Clients that try as often as always, but hardly wait."""
    monkeypatch.setattr("gcsfs.retry.min", lambda *_: 0, raising=False)
    monkeypatch.setattr(remote, "_READ_S", 0.1)
    yield
    forget_clients()


@pytest.mark.parametrize("listens", [False, True])
def test_no_answer(impatient, monkeypatch, listens):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        if not listens:
            silent.close()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        with pytest.raises(StorageError, match=r"gs://bucket/a.csv: .*" + ("" if listens else f"127.0.0.1:{port}")):
            remote.local_copy("gs://bucket/a.csv")


def test_a_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "aiohttp", None)  # of gcsfs
    with pytest.raises(StorageError, match=r"gs://bucket/a.csv: aiohttp .*sodaops\[gs\]"):
        remote.local_copy("gs://bucket/a.csv")


def test_a_run_is_uploaded_when_the_bucket_answers_again(bucket, cloud, workdir, monkeypatch, caplog):
    monkeypatch.setattr("sodaops.training.upload._INTERVAL_S", 0.05)
    until = time.monotonic() + 120
    with upload.uploading(configured(f"run_dir={bucket}/land")) as here:
        checkpoints = Path(here.run_dir) / "checkpoints"
        checkpoints.mkdir(parents=True)
        with refusing(message="quota"):
            for name in ("best.ckpt", "last.ckpt"):
                (checkpoints / name).write_text("one")
            while "quota" not in caplog.text and time.monotonic() < until:
                time.sleep(0.05)
        while not cloud.exists("bucket/land/checkpoints/last.ckpt") and time.monotonic() < until:
            time.sleep(0.05)
        assert cloud.cat("bucket/land/checkpoints/best.ckpt") == b"one" and "Forbidden" in caplog.text
    assert json.loads(cloud.cat("bucket/land/landed.json"))["whole"] is True
