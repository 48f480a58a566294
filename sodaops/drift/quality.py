"""The quality of a window of requests, estimated without labels, and when no estimate is given."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sodaops.bundle.reference import Reference
from sodaops.config.schema import DriftConfig
from sodaops.drift.statistics import total_variation
from sodaops.tasks.base import Task
from sodaops.tasks.estimate import MAX_LABELS, METRICS, Estimate, calibrate, estimate

_N_REDRAWS = 2000


@dataclass(frozen=True)
class Quality:
    """Estimated metrics of a window; none where ``withheld`` names the reason: task, reference, rows, drift or labels."""

    metrics: dict[str, Estimate] = field(default_factory=dict)
    withheld: str | None = None
    message: str = ""  # the reason in words

    def __str__(self) -> str:
        estimates = (f"{METRICS[name]} {m.value:.3f} ({m.low:.3f} to {m.high:.3f})" for name, m in self.metrics.items())
        return ", ".join(estimates) or f"withheld: {self.message}"


def estimate_quality(settings: DriftConfig, task: Task, known: Reference, probs: np.ndarray, drifted: Sequence[str]) -> Quality:
    """Estimates accuracy and macro-F1 of requests of which no label is known.

    Estimates hold for texts like those of val. So there is none after drift, or if the shares of the predicted labels differ
    from those on train and val by more than :func:`largest_difference`.

    Args:
        settings: conf/drift.
        task: the bundle's, like ``known``.
        known: the reference.
        probs: answers of the window's distinct texts, float [n, n_labels].
        drifted: causes of drift, and segments with drift.
    """
    if not task.estimates_quality:
        return Quality(withheld="task", message=f"there is no estimate for task={task.name}")
    if probs.shape[1] > MAX_LABELS:
        return Quality(withheld="task", message=f"{probs.shape[1]} labels; estimates are made for at most {MAX_LABELS}")
    if known.truth is None or known.answers is None:
        return Quality(withheld="reference", message="the bundle has no labels of val; `sodaops export` adds them")
    if len(probs) < settings.min_rows:
        return Quality(withheld="rows", message=f"{len(probs)} distinct texts; at least {settings.min_rows} are needed")
    if drifted:
        return Quality(withheld="drift", message=f"drift ({', '.join(drifted)})")
    val = known.truth >= 0
    predicted, of_val = task.groups(probs), task.groups(known.answers[val])
    counts = [np.bincount(ids, minlength=probs.shape[1]) for ids in (known.label_ids, predicted)]
    difference, limit = total_variation(*counts), largest_difference(counts[0], len(probs), settings.alpha)
    if difference > limit:
        message = f"the predicted labels differ from the reference's by {difference:.3f}; at most {limit:.3f} is by chance"
        return Quality(withheld="labels", message=message)
    return Quality(estimate(probs, predicted, calibrate(known.answers[val], of_val, known.truth[val])))


def largest_difference(counts: np.ndarray, n_rows: int, alpha: float) -> float:
    """The total variation of predicted labels that windows like the reference exceed with probability ``alpha``.

    Both are drawn again from the reference's shares.

    Args:
        counts: rows of the reference by predicted label, int [n_labels].
        n_rows: of the window.
        alpha: in (0, 1).
    """
    rng, shares = np.random.default_rng(0), counts / counts.sum()
    known, window = (rng.multinomial(n, shares, size=_N_REDRAWS) / n for n in (int(counts.sum()), n_rows))
    return float(np.quantile(np.abs(known - window).sum(axis=1) / 2, 1 - alpha))
