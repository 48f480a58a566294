"""Helpers for tests of the services: a server in a process of its own, bundles that differ, clients that load a server."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from sodaops.bundle import layout
from sodaops.drift.settings import PREFIX as DRIFT


def detail(response: httpx.Response, status: int) -> str:
    """The detail of a problem response, after a check of the rest."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body["status"] == status and body["request_id"] == response.headers["x-request-id"]
    return body["detail"]


class Process:
    """``python -m MODULE``, a service on a free port, with its log as a list of records.

    Args:
        module: of the service.
        variables: added to the environment.
        wait: until it listens.

    Raises:
        AssertionError: it ended before it was ready.
    """

    def __init__(self, module: str, variables: Mapping[str, str], wait: bool = True) -> None:
        self.began = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-m", module], env={**os.environ, **variables}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = ""
        while wait and not self.url:
            assert self.process.poll() is None, "".join(self.lines)
            time.sleep(0.02)

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line)
            if "running on http" in line:
                self.url = line.split("running on ")[1].split(" ")[0]

    def client(self, **kwargs: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **kwargs)

    def records(self) -> list[dict]:
        return [json.loads(line) for line in self.lines]

    def signal(self, number: int) -> int:
        self.process.send_signal(number)
        code = self.process.wait(120)
        self._reader.join(10)
        self.process.stdout.close()
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)


class Server(Process):
    """The predictor, or the drift service.

    Args:
        bundle: to serve, or to watch.
        wait: until it listens.
        prefix: of the variables that ``settings`` become; it also says which service.
        environ: other variables.
    """

    def __init__(
        self, bundle: Path | str, wait: bool = True, prefix: str = "SODAOPS_", environ: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> None:  # fmt: skip
        variables = {f"{prefix}{key.upper()}": str(value) for key, value in {"bundle": bundle, "port": 0, **settings}.items()}
        super().__init__("sodaops.drift" if prefix == DRIFT else "sodaops.serving", {**variables, **(environ or {})}, wait)


def copy_bundle(bundle: Path, folder: Path, note: str = "another") -> Path:
    """A bundle with the same answers and an id of its own."""
    shutil.copytree(bundle, folder)
    with (folder / layout.CONFIG).open("a") as file:
        file.write(f"# {note}\n")
    refresh_info(folder)
    return folder


def refresh_info(folder: Path, **changes: Any) -> None:
    """Makes bundle.json match the files again."""
    fields = json.loads((folder / layout.INFO).read_text())
    for key in ("files", "bundle_id", "format"):
        fields.pop(key)
    layout.write_info(folder, **{**fields, **changes})


def rewrite_info(folder: Path, **changes: Any) -> None:
    """Changes fields of bundle.json as an attacker would: unchecked, with hashes of the files as they are and the right id."""
    path = folder / layout.INFO
    fields = {**json.loads(path.read_text()), **changes}
    if "files" not in changes:
        fields["files"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in fields["files"]}
    settings = layout._settings({**fields, "data": fields["data"] if isinstance(fields["data"], dict) else {}})
    fields["bundle_id"] = layout.compute_bundle_id(fields["files"], **settings)
    path.write_text(json.dumps(fields))


def swap_bundle(folder: Path, fresh: Path) -> None:
    """Replaces a bundle as a deployment does, by renaming; for a moment there is none."""
    aside = folder.with_name(folder.name + ".old")
    folder.rename(aside)
    fresh.rename(folder)
    shutil.rmtree(aside)


class Load:
    """Clients in threads that send one text after another, each with a request id of its own, until stopped.

    Attributes:
        statuses: request id -> status of the response; a request without a response is not in it.
        broken: number of requests without a response.
    """

    def __init__(self, url: str, n_clients: int = 8, n_texts: int = 1) -> None:
        self.statuses: dict[str, int] = {}
        self.versions: set[str] = set()
        self.broken = 0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(url, i, n_texts), daemon=True) for i in range(n_clients)]
        for thread in self._threads:
            thread.start()

    def _ask(self, url: str, client_no: int, n_texts: int) -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            for n in range(10**9):
                if self._stop.is_set():
                    return
                request_id = f"c{client_no}-{n}"
                body = {"texts": [f"text {n} of {client_no}, part {part}" for part in range(n_texts)]}
                try:
                    response = client.post("/predict/batch", json=body, headers={"x-request-id": request_id})
                except httpx.HTTPError:
                    self.broken += 1
                    time.sleep(0.01)
                    continue
                self.statuses[request_id] = response.status_code
                if response.status_code == 200:
                    self.versions.add(response.json()["bundle_version"])

    def acknowledged(self) -> set[str]:
        return {request_id for request_id, status in list(self.statuses.items()) if status == 200}

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(70)
