"""Preprocessing on a Ray cluster of this machine's cores: the same splits, also when a worker is lost."""

import importlib.util
import os
import signal
import threading
import time

import psutil
import pytest

from sodaops.data import parts, workers
from sodaops.data.preprocess import preprocess
from sodaops.errors import ConfigError, StorageError
from sodaops.tasks import SINGLE_LABEL
from tests.conftest import configured, make_rows, table

pytestmark = [
    pytest.mark.deep, pytest.mark.filterwarnings("ignore"),  # ray's own
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed (pip install 'sodaops[ray]')"),
]  # fmt: skip


@pytest.fixture
def config(write, monkeypatch):
    """60 parts."""
    monkeypatch.setattr(parts, "PART_ROWS", 50)
    write("t.csv", table(make_rows(3000)))
    return lambda *more: configured("data=csv", "data.path=t.csv", *more).data


def ray_workers():
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        if (process.info["cmdline"] or [""])[0].startswith("ray::_make_serialized"):
            found.append(process)
    return found


def test_the_same_splits_although_a_worker_is_lost(config):
    killed, stop, on_sigterm = [], threading.Event(), signal.getsignal(signal.SIGTERM)

    def kill():
        while not stop.is_set() and not killed:
            for process in ray_workers():
                process.kill()
                killed.append(process.pid)
                break
            time.sleep(0.001)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        on_ray = preprocess(config("data.ray=local"), "on_ray")
    finally:
        stop.set()
        thread.join()
    assert killed and signal.getsignal(signal.SIGTERM) == on_sigterm
    assert preprocess(config(), "here") == on_ray  # the hashes of the splits are in it
    assert sorted(os.listdir()) == ["here", "on_ray", "t.csv"]
    assert not ray_workers()


def test_no_cluster_there(config):
    with pytest.raises(ConfigError, match=r"data\.ray=127\.0\.0\.1:1: "):
        preprocess(config("data.ray=127.0.0.1:1"), "splits")


def test_a_worker_that_does_not_see_the_folder(config, tmp_path):
    part = parts.Part(tmp_path / "elsewhere/0.arrow", "t.csv", 0, 1, 1)
    error = workers._make_serialized(part, None, b"", config(), SINGLE_LABEL)
    assert isinstance(error, StorageError) and str(part.path.parent) in str(error)
