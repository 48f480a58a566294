"""How a bundle's thresholds and label sets do on a split."""

from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes

from sodaops.evaluation.result import Evaluated
from sodaops.inference.predictor import Predictor
from sodaops.tasks.abstention import interval
from sodaops.tasks.plots import Wanted

MISSING = (
    "The bundle has no thresholds for evaluate.{key}; `sodaops export BUNDLE evaluate.{key}=VALUE` adds them, or says why."
)
_Answers = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def add(result: Evaluated, predictor: Predictor, table: pa.Table, probs: np.ndarray) -> None:
    """Adds ``abstention`` to the metrics of a split, and a warning for a target that is clearly missed.

    Args:
        result: receives ``thresholds``: the coverage, which is the share of answers that stay, and their accuracy, together and
            for each predicted label; and ``sets``: for each label the share of its texts whose set has it.
        predictor: of a bundle with thresholds or cutoffs.
        table: the split.
        probs: its answers, float32 [n_rows, n_labels].
    """
    labels, fields = predictor.info.labels, dict[str, Any](predictor.info.abstention or {})
    levels = fields.pop("variants")[predictor.variant]
    decided, is_right, _, stays = _answers(predictor, table, probs)
    if levels["thresholds"]:
        targets = fields.get("target_precision", {})
        of_label = {
            label: {"target": targets.get(label), **_kept(is_right[decided == i], stays[decided == i])}
            for i, label in enumerate(labels)
        }
        fields["thresholds"] = {"target": fields.get("target_accuracy"), **_kept(is_right, stays), "labels": of_label}
        for which, of in (("", fields["thresholds"]), *((f" of {label}", of) for label, of in of_label.items())):
            if of["target"] is not None and of["interval_95"]["accuracy"]["high"] < of["target"]:
                result.warnings.append(
                    f"Answers{which} above the threshold have an accuracy of {of['accuracy']:.3f}, clearly below the target of "
                    f"{of['target']:g}: these texts differ from those of val."
                )
    if levels["cutoffs"]:
        truth, has = predictor.task.truth(table), probs >= np.array([levels["cutoffs"][label] for label in labels])
        sizes = {"mean_size": float(has.sum(1).mean()), "empty": float((~has.any(1)).mean())}
        fields["sets"] = {**sizes, "labels": {label: _share(has[truth == i, i]) for i, label in enumerate(labels)}}
    result.metrics["abstention"] = fields


def curve(predictor: Predictor, table: pa.Table, probs: np.ndarray, measured: dict[str, Any] | None) -> list[Wanted]:
    """The risk-coverage curve (El-Yaniv and Wiener 2010) of a bundle with thresholds."""
    if measured is None or "thresholds" not in measured:
        return []
    _, is_right, confidence, _ = _answers(predictor, table, probs)
    caption = (
        "The share of errors among the most confident answers, at each share of them. The band is the 95 % interval, the point "
        "the bundle's thresholds."
    )
    right = is_right[np.argsort(-confidence, kind="stable")]
    return [("risk_coverage", "Errors and coverage", caption, partial(_draw, right, measured["thresholds"]))]


def _draw(right: np.ndarray, kept: dict[str, Any], axes: Axes) -> None:
    ends = np.unique(np.linspace(1, len(right), min(200, len(right))).astype(int))
    n_right = np.cumsum(right)[ends - 1]
    bands = [interval(int(good), int(n)) for good, n in zip(n_right, ends, strict=True)]
    low, high = ([1 - band[end] for band in bands] for end in ("high", "low"))
    axes.fill_between(ends / len(right), low, high, color="#56B4E9", alpha=0.35, linewidth=0)
    axes.plot(ends / len(right), 1 - n_right / ends, color="#0072B2", linewidth=1.8)
    if kept["target"] is not None:
        axes.axhline(1 - kept["target"], color="#8a94a6", linestyle="--", linewidth=1)
    if kept["accuracy"] is not None:
        axes.plot(kept["coverage"], 1 - kept["accuracy"], "o", color="#D55E00")
    top = max(1.5 * (1 - right.mean()), 0.05)
    axes.set(xlim=(0, 1.01), ylim=(0, min(1, top)), xlabel="share of texts that are answered", ylabel="errors among them")


def _answers(predictor: Predictor, table: pa.Table, probs: np.ndarray) -> _Answers:
    """Of each row the predicted label id, whether it is right, its confidence, and whether the answer stays."""
    decided = predictor.task.groups(probs)
    confidence = probs[np.arange(len(probs)), decided]
    thresholds = predictor.abstainer.levels["thresholds"] if predictor.abstainer else {}
    above = np.array([thresholds.get(label, 0.0) for label in predictor.info.labels])
    return decided, decided == predictor.task.truth(table), confidence, confidence > above[decided]


def _kept(is_right: np.ndarray, stays: np.ndarray) -> dict[str, Any]:
    n_rows, n_kept, n_right = len(stays), int(stays.sum()), int(is_right[stays].sum())
    return {
        "n_rows": n_rows, "n_answered": n_kept, "coverage": n_kept / n_rows if n_rows else None,
        "accuracy": n_right / n_kept if n_kept else None,
        "interval_95": {"coverage": interval(n_kept, n_rows), "accuracy": interval(n_right, n_kept)},
    }  # fmt: skip


def _share(has: np.ndarray) -> dict[str, Any]:
    n_rows, n_covered = len(has), int(has.sum())
    return {"n_rows": n_rows, "coverage": n_covered / n_rows if n_rows else None, "interval_95": interval(n_covered, n_rows)}
