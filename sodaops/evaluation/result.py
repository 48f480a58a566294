"""The result of an evaluation."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from sodaops.io import remote


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation found, and where it lies."""

    split: str
    metrics: dict[str, Any]  # as in metrics.json, below the split's name
    baselines: dict[str, dict[str, float]]
    output_dir: str  # a folder, or an address
    same_data: bool  # whether the bundle was trained on the train split beside this one
    labels: list[str]
    confusion: np.ndarray  # counts, int64 [n_labels, n_labels]; rows are the true labels
    curves: dict[str, dict[str, Any]]  # label -> its ROC and precision-recall curve
    errors: list[dict[str, Any]]  # the wrong answers that it was surest of

    @property
    def report_path(self) -> str:
        """The HTML report."""
        return remote.below(self.output_dir, "report.html")
