"""How a bundle's thresholds and label sets do on a split."""

from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes

from sodaops.evaluation.result import Evaluated
from sodaops.inference.predictor import Predictor
from sodaops.tasks.abstention import ALL, share, targets_of
from sodaops.tasks.plots import Wanted

MISSING = (
    "The bundle has no thresholds for evaluate.{key}; `sodaops export BUNDLE evaluate.{key}=VALUE` adds them, or says why."
)


def measure_abstention(result: Evaluated, predictor: Predictor, table: pa.Table, probs: np.ndarray) -> list[Wanted]:
    """Adds ``abstention`` to the metrics of a split, and a warning for a target that is clearly missed.

    Args:
        result: receives ``answered``: the coverage, which is the share of the answers that stay, and their accuracy, of all
            or for each label with a target; and ``sets``: the share of the texts of each label whose set has it.
        predictor: of a bundle with thresholds or cutoffs.
        table: the split.
        probs: its answers, float32 [n_rows, n_labels].

    Returns:
        The risk-coverage curve (El-Yaniv and Wiener 2010), if there are thresholds.
    """
    labels, fields = predictor.info.labels, dict[str, Any](predictor.info.abstention or {})
    levels = fields.pop("variants")[predictor.variant]
    decided, truth = predictor.task.groups(probs), predictor.task.truth(table)
    confidence, is_right = probs[np.arange(len(probs)), decided], decided == truth
    stays = confidence > np.array([levels["thresholds"].get(label, 0.0) for label in labels])[decided]
    result.metrics["abstention"] = fields
    if levels["cutoffs"]:
        has = probs >= np.array([levels["cutoffs"][label] for label in labels])
        covered = {label: share(has[truth == i, i]) for i, label in enumerate(labels)}
        fields["sets"] = {"mean_size": float(has.sum(1).mean()), "empty": float((~has.any(1)).mean()), "labels": covered}
    for label, target in targets_of(fields).items():
        rows = decided == labels.index(label) if label else np.ones(len(probs), bool)
        accuracy = share(is_right[rows & stays])
        fields.setdefault("answered", {})[label] = {"target": target, "coverage": share(stays[rows]), "accuracy": accuracy}
        if accuracy["high"] < target:
            result.warnings.append(
                f"The answers{label and f' with {label}'} above the threshold have an accuracy of {accuracy['share']:.3f}, "
                f"clearly below the target of {target:g}: these texts differ from those of val."
            )
    if "answered" not in fields:
        return []
    caption = (
        "The share of errors among the most confident answers, with 95 % intervals; the point is at the bundle's threshold."
    )
    right = is_right[np.argsort(-confidence, kind="stable")]
    return [("risk_coverage", "Errors and coverage", caption, partial(_draw, right, fields["answered"].get(ALL)))]


def _draw(right: np.ndarray, answered: dict[str, Any] | None, axes: Axes) -> None:
    ends = np.unique(np.linspace(1, len(right), 200).astype(int))
    parts = [share(right[:end]) for end in ends]
    low, high = ([1 - part[end] for part in parts] for end in ("high", "low"))
    axes.fill_between(ends / len(right), low, high, color="#56B4E9", alpha=0.35, linewidth=0)
    axes.plot(ends / len(right), [1 - part["share"] for part in parts], color="#0072B2", linewidth=1.8)
    if answered is not None:
        axes.axhline(1 - answered["target"], color="#8a94a6", linestyle="--", linewidth=1)
        if answered["accuracy"]["n"]:
            axes.plot(answered["coverage"]["share"], 1 - answered["accuracy"]["share"], "o", color="#D55E00")
    top = min(1, max(1.5 * (1 - right.mean()), 0.05))
    axes.set(xlim=(0, 1.01), ylim=(0, top), xlabel="share of texts that are answered", ylabel="errors among them")
