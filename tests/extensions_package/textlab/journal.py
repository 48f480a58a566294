"""A logger that writes lines of JSON."""

import json
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger


class Journal(Logger):
    """Appends a line for the configuration and for each set of metrics, and copies artifacts."""

    name, version = "journal", 0

    def __init__(self, save_dir: str, file: str = "log.jsonl") -> None:
        super().__init__()
        self._folder = Path(save_dir)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = self._folder / file

    def _append(self, kind: str, content: dict[str, Any]) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, **content}) + "\n")

    def log_hyperparams(self, params: dict[str, Any]) -> None:
        self._append("config", params)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._append("metrics", {"step": step, **metrics})

    def log_artifacts(self, local_dir: str, artifact_path: str) -> None:
        """Optional: receives the folders of the bundle and of the evaluation."""
        shutil.copytree(local_dir, self._folder / artifact_path)
