"""A server on loopback that stands in for the Hugging Face hub, as far as an upload needs it."""

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

TOKEN = "hf_secretSecretSecretSecretSecret"


@dataclass
class Hub:
    """The content of the hub.

    Attributes:
        url: its address.
        repos: name -> path -> content.
        private: name -> whether it was made private.
        commits: titles, the oldest first.
        refused: path of requests that are refused -> status.
        requests: method and path of each request.
    """

    url: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    refused: dict[str, int] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        """The status and the JSON for a request."""
        if path == "/api/repos/create":
            fields = json.loads(body)
            name = f"{fields['organization']}/{fields['name']}"
            if name in self.repos:
                return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
            self.repos[name], self.private[name] = {}, fields["visibility"] == "private"
            return 200, {"url": f"{self.url}/{name}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.removeprefix("/api/models/") not in self.repos and path.count("/") == 4:
            return 404, {"error": "Repository not found"}
        name, _, action = path.removeprefix("/api/models/").rpartition("/")[0].rpartition("/")
        files = self.repos[name]
        if action == "tree":
            return 200, [{"type": "file", "path": path, "size": len(data), "oid": "0"} for path, data in files.items()]
        if action == "preupload":
            asked = json.loads(body)["files"]
            return 200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
        assert action == "commit", path
        for line in body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                self.commits.append(value["summary"])
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert key == "deletedFile"
                del files[value["path"]]
        return 200, {"commitUrl": f"{self.url}/{name}/commit/1", "commitOid": "1"}


@contextlib.contextmanager
def running() -> Iterator[Hub]:
    """A hub without repositories, to which HF_ENDPOINT points; the token in HF_TOKEN may write to all."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            body, path = self.rfile.read(int(self.headers.get("content-length") or 0)), self.path.partition("?")[0]
            hub.requests.append(f"{self.command} {path}")
            token = self.headers.get("authorization", "").removeprefix("Bearer ")
            status = 401 if token != TOKEN else next((hub.refused[p] for p in hub.refused if p in path), 200)
            answer: Any = {"error": f"refused for {token}"}
            if status == 200:
                status, answer = hub.answer(path, body)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = handle_any  # noqa: N815 - as http.server calls them

        def log_message(self, format: str, *args: object) -> None:
            """Logs nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HF_ENDPOINT", hub.url)
            patch.setenv("HF_TOKEN", TOKEN)
            yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
