"""run.json, which a run writes into its folder while it trains."""

import os
import socket
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sodaops.io import storage

RECORD = "run.json"
FORMAT = 1


class RunRecord:
    """Writes run.json. Each change replaces the whole file.

    Args:
        folder: the run folder.
        params: the configuration, nested.
        fields: further fields that are known at the start.
    """

    def __init__(self, folder: Path, params: Mapping[str, Any], **fields: Any) -> None:
        self._path, self._start_s = folder / RECORD, time.monotonic()
        started = datetime.now(UTC).isoformat(timespec="seconds")
        process = {"host": socket.gethostname(), "pid": os.getpid()}
        results: dict[str, Any] = {"seconds": None, "metrics": {}, "bundle_id": None, "error": None}
        self._fields = {
            "format": FORMAT, "status": "running", "started": started, **process, **results, **fields, "params": params,
        }  # fmt: skip
        self.update()

    def update(self, **fields: Any) -> None:
        """Changes fields and writes the file."""
        self._fields |= fields
        storage.write_json(self._path, self._fields)

    def add_metrics(self, split: str, metrics: Mapping[str, float]) -> None:
        """Adds the metrics of a split."""
        self.update(metrics={**self._fields["metrics"], split: dict(metrics)})

    def finish(self, status: str, error: str | None = None) -> None:
        """Writes the final status and the duration."""
        self.update(status=status, error=error, seconds=round(time.monotonic() - self._start_s, 1))
