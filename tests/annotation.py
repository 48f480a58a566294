"""Helpers for tests of the annotation: small tasks, and a server in a process of its own."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from sodaops.annotation.store import Store

LABELS = ["negative", "neutral", "positive"]
CODE = "0123456789abcdef"


def task(text: str, **more: Any) -> dict[str, Any]:
    """The fields of a task."""
    return {"text": text, "text_sha256": hashlib.sha256(text.encode()).hexdigest(), "why": "random", **more}


def store_of(folder: Path, n_tasks: int) -> Store:
    """A store with the texts "text 0", "text 1", and so on."""
    store = Store.create(folder, LABELS)
    store.add_tasks("some", [task(f"text {n}") for n in range(n_tasks)])
    return store


class Server:
    """``python -m sodaops.annotation`` on a free port, or on one that is given.

    Raises:
        AssertionError: it ended before it was ready.
    """

    def __init__(self, store: Path, port: int = 0, **settings: str) -> None:
        told = {"ANNOTATE_STORE": str(store), "ANNOTATE_PORT": str(port), **settings}
        env = {**os.environ, **{f"SODAOPS_{key}": value for key, value in told.items()}}
        command = [sys.executable, "-m", "sodaops.annotation"]
        self.process = subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.lines: list[str] = []
        self.url = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        while not self.url:
            assert self.process.poll() is None, "".join(self.lines)
            time.sleep(0.02)
        self.port = int(self.url.rpartition(":")[2])

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line)
            if "running on http" in line:
                self.url = line.split("running on ")[1].split(" ")[0]

    def client(self, **kwargs: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, **kwargs)

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        code = self.process.wait(30)
        self._reader.join(10)
        self.process.stdout.close()
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.stop()
