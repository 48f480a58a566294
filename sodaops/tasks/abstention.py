"""Thresholds on confidence that keep an accuracy, and label sets that keep a coverage, both chosen on the answers of val.

A bundle has them for each of its ONNX variants, since int8 has other confidences than float32.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NotRequired

import numpy as np
from pydantic import Field
from typing_extensions import TypedDict

from sodaops.errors import ConfigError, nearest, some
from sodaops.tasks.metrics import wilson

CONFIDENCE = 0.95  # with which an accuracy holds, over the draw of val
ALL = ""  # in place of a label, where a target is for the answers of all
_N_EXPECTED, _FIRST_SHARE = 6.3, 0.2  # the first test has so many expected errors, to pass with two, and so many of the rows
_Share = Annotated[float, Field(gt=0, lt=1)]
_Probability = Annotated[float, Field(ge=0, le=1.0001)]


class Levels(TypedDict):
    """What was chosen for a variant."""

    model: str  # SHA-256 of the ONNX file whose answers on val it was chosen from
    thresholds: dict[str, _Probability]  # label -> its answers stay if their confidence is above; {}: without a target
    cutoffs: dict[str, _Probability]  # label -> a label set has it from this probability on; {}: without a coverage


class Abstention(TypedDict):
    """The field ``abstention`` of bundle.json: the targets as in conf/evaluate, and the levels."""

    target_accuracy: NotRequired[_Share | dict[str, _Share]]
    set_coverage: NotRequired[_Share]
    variants: dict[str, Levels]


class Abstainer:
    """Applies what a bundle has for one of its variants."""

    def __init__(self, abstention: Abstention, variant: str) -> None:
        self.levels, self._targets = abstention["variants"][variant], targets_of(abstention)

    def reason(self, label: str, confidence: float) -> str | None:
        """Why the bundle abstains from an answer; None: it stays."""
        threshold = self.levels["thresholds"].get(label, 0.0)
        if confidence > threshold:
            return None
        target = self._targets.get(label, self._targets.get(ALL, 0.0))
        return f"confidence {confidence:.4f} is not above {threshold:.4f}, the threshold for an accuracy of {target:g}"

    def label_set(self, probs: Mapping[str, float]) -> list[str]:
        """The labels whose probability is at least their cutoff; possibly none."""
        return [label for label, cutoff in self.levels["cutoffs"].items() if probs[label] >= cutoff]


def targets_of(promises: Mapping[str, Any]) -> dict[str, float]:
    """Label, or :data:`ALL`, -> accuracy, from a field or section with ``target_accuracy``."""
    target = promises.get("target_accuracy") or {}
    return dict(target) if isinstance(target, Mapping) else {ALL: target}


def check_counts(promises: Mapping[str, Any], labels: Sequence[str], n_rows: Mapping[str, int]) -> None:
    """Refuses targets for which val, with ``n_rows`` of each label, has too few rows, and unknown labels.

    Raises:
        ConfigError: names the key, the rows and how many are needed.
    """
    needed = [
        (f"target_accuracy{label and f'.{label}'}", target, label, math.ceil(math.log(1 - CONFIDENCE) / math.log(target)))
        for label, target in targets_of(promises).items()
    ]
    if (coverage := promises.get("set_coverage")) is not None:
        needed += [("set_coverage", coverage, label, math.ceil(1 / (1 - coverage) - 1e-9) - 1) for label in labels]
    for key, value, label, least in needed:
        if label and label not in labels:
            raise ConfigError(f"evaluate.{key}: not a label; expected {some(list(labels))}{nearest(label, labels)}.")
        found = n_rows.get(label, 0) if label else sum(n_rows.values())
        if found < least:
            of = f" of {label}" if label else ""
            raise ConfigError(
                f"evaluate.{key}={value:g}: val has {found} rows{of}, and at least {least} are needed. Lower it, add rows, or "
                "give val a larger share (data.fractions)."
            )


def choose_threshold(confidence: np.ndarray, is_right: np.ndarray, target: float) -> float | None:
    """The lowest threshold at which the accuracy of the answers above it is at least ``target``, with 95 % confidence.

    Fixed-sequence testing, as in Learn then Test (Angelopoulos et al. 2021): from a first number of most confident rows on,
    ever more of them are tested, until a test fails. Each asks whether so few errors would have a probability of at most 5 %
    if the accuracy were below the target, by the binomial tail, as in Clopper and Pearson's interval. Given the confidence of
    the next row, the rows above it are a sample of all texts above it, so that thresholds may be confidences of val (as in
    Geifman and El-Yaniv 2017). Exact where texts with less confidence are not more often right.

    Args:
        confidence: float [n_rows].
        is_right: bool [n_rows].
        target: in (0, 1).

    Returns:
        Answers stay whose confidence is above it; 0: all. None: the first test fails.
    """
    from scipy.stats import binom

    order = np.argsort(-confidence, kind="stable")
    ordered, n_errors = confidence[order], np.cumsum(~is_right[order])
    # A set of answers ends where the next confidence is lower, and the first one has the rows of the first test.
    first = min(len(order), max(math.ceil(_N_EXPECTED / (1 - target)), math.ceil(_FIRST_SHARE * len(order))))
    ends = np.flatnonzero(np.append(ordered[:-1] > ordered[1:], True)) + 1
    ends = ends[(ends >= first) & (first > 0)]
    fails = binom.cdf(n_errors[ends - 1], ends, 1 - target) > 1 - CONFIDENCE
    n_passed = int(fails.argmax()) if fails.any() else len(ends)
    if n_passed == 0:
        return None
    n_answered = ends[n_passed - 1]
    return float(ordered[n_answered]) if n_answered < len(order) else 0.0


def choose_cutoff(probs: np.ndarray, coverage: float) -> float:
    """The cutoff of one label for class-wise conformal sets (Vovk et al. 2005, Mondrian conformal prediction).

    A new text with this label has at least the r-th smallest of n probabilities with a chance of at least 1 - r / (n + 1); r is
    the largest rank for which this is at least ``coverage``.

    Args:
        probs: of the label, of the rows that have it, float [n_rows].
        coverage: in (0, 1).

    >>> choose_cutoff(np.arange(1, 20) / 20, 0.9)
    0.1
    """
    rank = math.floor((len(probs) + 1) * (1 - coverage) + 1e-9)
    return float(np.append(0.0, np.sort(probs))[rank])  # 0, so in every set, if val has too few rows


def choose_levels(
    promises: Mapping[str, Any], probs: np.ndarray, decided: np.ndarray, truth: np.ndarray, labels: Sequence[str]
) -> dict[str, dict[str, float]]:
    """The fields ``thresholds`` and ``cutoffs`` of :class:`Levels`.

    Args:
        promises: ``target_accuracy`` and ``set_coverage``, or one of them.
        probs: of val, float [n_rows, n_labels].
        decided: the predicted label ids, int [n_rows].
        truth: the true ones, int [n_rows].
        labels: in order.

    Raises:
        ConfigError: no threshold reaches a target; the message has the best one.
    """
    confidence, is_right = probs[np.arange(len(probs)), decided], decided == truth
    coverage, targets = promises.get("set_coverage"), targets_of(promises)
    thresholds = dict.fromkeys(labels if targets else (), 0.0)
    for label, target in targets.items():
        rows = decided == labels.index(label) if label else np.ones(len(probs), bool)
        answers = confidence[rows], is_right[rows]
        if (threshold := choose_threshold(*answers, target)) is None:
            best = next((n / 1000 for n in range(999, 0, -1) if choose_threshold(*answers, n / 1000) is not None), 0.0)
            raise ConfigError(
                f"evaluate.target_accuracy{label and f'.{label}'}={target:g}: no threshold on the confidence of {rows.sum()} "
                f"answers on val reaches it with {CONFIDENCE:.0%} confidence; the best target is {best:.3f}. Lower it, train a "
                "better model, or add rows to val."
            )
        thresholds |= dict.fromkeys([label] if label else labels, threshold)
    cutoffs = {label: choose_cutoff(probs[truth == i, i], coverage) for i, label in enumerate(labels)} if coverage else {}
    return {"thresholds": thresholds, "cutoffs": cutoffs}


def share(flags: np.ndarray) -> dict[str, Any]:
    """``n`` of flags, bool [n]; the ``share`` of the true ones, None without any; ``low`` and ``high`` of its 95 % interval."""
    if not len(flags):
        return {"n": 0, "share": None, "low": 0.0, "high": 1.0}
    low, high = wilson(of_true := float(flags.mean()), len(flags))
    return {"n": len(flags), "share": of_true, "low": low, "high": high}
