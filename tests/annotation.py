"""Helpers for tests of the annotation: small stores, and a server in its own process."""

import hashlib
import signal
from pathlib import Path
from typing import Any

from sodaops.annotation.store import Store
from tests.serving import Process

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


class Server(Process):
    """The annotation service on a free port, or on the given one."""

    def __init__(self, store: Path, port: int = 0, **settings: str) -> None:
        variables = {"ANNOTATE_STORE": str(store), "ANNOTATE_PORT": str(port), **settings}
        super().__init__("sodaops.annotation", {f"SODAOPS_{key}": value for key, value in variables.items()})
        self.port = int(self.url.rpartition(":")[2])

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ends it, and returns its exit code."""
        return self.signal(number)
