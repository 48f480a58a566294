"""Thresholds on confidence that keep a target, and label sets that keep a coverage, both chosen on the answers of val.

A bundle has them for each of its ONNX variants, since int8 has other confidences than float32.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NotRequired

import numpy as np
from pydantic import Field
from typing_extensions import TypedDict

from sodaops.errors import ConfigError, nearest, some

CONFIDENCE = 0.95  # with which a target holds, over the draw of val
_FIRST_EXPECTED = 6.3  # errors at the target among the rows of the first test, which passes with two errors
_FIRST_SHARE = 0.2  # of all rows: the first test has at least so many
_Share = Annotated[float, Field(gt=0, lt=1)]
_Probability = Annotated[float, Field(ge=0, le=1.0001)]


class Levels(TypedDict):
    """What was chosen for a variant."""

    model: str  # SHA-256 of the ONNX file whose answers on val it was chosen from
    n_rows: int  # of val
    thresholds: dict[str, _Probability]  # label -> an answer with it stays if its confidence is above
    cutoffs: dict[str, _Probability]  # label -> a label set has it from this probability on; {}: no label sets


class Abstention(TypedDict):
    """The field ``abstention`` of bundle.json."""

    target_accuracy: NotRequired[_Share]
    target_precision: NotRequired[dict[str, _Share]]
    set_coverage: NotRequired[_Share]
    confidence: _Share
    variants: dict[str, Levels]


class Abstainer:
    """Applies what a bundle has for one of its variants."""

    def __init__(self, abstention: Abstention, variant: str) -> None:
        self.levels = abstention["variants"][variant]
        self.has_target = bool(self.levels["thresholds"])
        self._accuracy, self._precision = abstention.get("target_accuracy"), abstention.get("target_precision", {})

    def reason(self, label: str, confidence: float) -> str | None:
        """Why the service abstains from an answer; None: it stays."""
        threshold = self.levels["thresholds"].get(label, 0.0)
        if confidence > threshold:
            return None
        of = f"an accuracy of {self._accuracy:g}" if self._accuracy else f"a precision of {self._precision[label]:g} of {label}"
        return f"confidence {confidence:.4f} is not above {threshold:.4f}, the threshold for {of}"

    def label_set(self, probs: Mapping[str, float]) -> list[str]:
        """The labels whose probability is at least their cutoff; possibly none."""
        return [label for label, cutoff in self.levels["cutoffs"].items() if probs[label] >= cutoff]


def n_needed(target: float) -> int:
    """The fewest rows that can show a target: so many right answers in a row are too unlikely below it.

    >>> n_needed(0.95)
    59
    """
    return math.ceil(math.log(1 - CONFIDENCE) / math.log(target))


def check_counts(promises: Mapping[str, Any], labels: Sequence[str], n_rows: Mapping[str, int]) -> None:
    """Refuses promises for which val has too few rows, or no such label.

    Args:
        promises: the targets that are set, as in conf/evaluate.
        labels: of the model.
        n_rows: label -> rows in val.

    Raises:
        ConfigError: names the key, the rows and how many are needed.
    """
    prefix, precision = "evaluate.target_precision", promises.get("target_precision", {})
    if unknown := [label for label in precision if label not in labels]:
        raise ConfigError(f"{prefix}.{unknown[0]}: not a label; expected {some(list(labels))}{nearest(unknown[0], labels)}.")
    needed = {f"{prefix}.{label}={of:g}": (n_rows.get(label, 0), n_needed(of)) for label, of in precision.items()}
    if (accuracy := promises.get("target_accuracy")) is not None:
        needed[f"evaluate.target_accuracy={accuracy:g}"] = sum(n_rows.values()), n_needed(accuracy)
    if (coverage := promises.get("set_coverage")) is not None:
        label = min(labels, key=lambda label: n_rows.get(label, 0))
        needed[f"evaluate.set_coverage={coverage:g}"] = n_rows.get(label, 0), math.ceil(1 / (1 - coverage) - 1e-9) - 1
    for key, (found, least) in needed.items():
        if found < least:
            of = f" of {label}" if "set_coverage" in key else ""
            raise ConfigError(
                f"{key}: val has {found} rows{of}, and at least {least} are needed. Lower it, add rows, or give val a larger "
                "share (data.fractions)."
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
        Answers stay whose confidence is above it; 0: all. None: the first test fails, or there are too few rows.
    """
    from scipy.stats import binom

    if len(confidence) < n_needed(target):
        return None
    order = np.argsort(-confidence, kind="stable")
    ordered, n_errors = confidence[order], np.cumsum(~is_right[order])
    # A set of answers ends where the next confidence is lower, and the first one has the rows of the first test.
    ends = np.flatnonzero(np.append(ordered[:-1] > ordered[1:], True)) + 1
    ends = ends[ends >= min(len(order), _n_first(len(order), target))]
    fails = binom.cdf(n_errors[ends - 1], ends, 1 - target) > 1 - CONFIDENCE
    n_passed = int(fails.argmax()) if fails.any() else len(ends)
    if n_passed == 0:
        return None
    n_answered = int(ends[n_passed - 1])
    return float(ordered[n_answered]) if n_answered < len(order) else 0.0


def best_target(confidence: np.ndarray, is_right: np.ndarray) -> float:
    """The highest target, to 0.001, that :func:`choose_threshold` reaches; 0 without one."""
    targets = (thousandths / 1000 for thousandths in range(999, 0, -1))
    return next((target for target in targets if choose_threshold(confidence, is_right, target) is not None), 0.0)


def _n_first(n_rows: int, target: float) -> int:
    return max(math.ceil(_FIRST_EXPECTED / (1 - target)), math.ceil(_FIRST_SHARE * n_rows))


def choose_cutoff(probs: np.ndarray, coverage: float) -> float:
    """The cutoff of one label for class-wise conformal sets (Vovk et al. 2005, Mondrian conformal prediction).

    Of exchangeable texts with this label a new one has at least the r-th smallest probability of n with a chance of at least
    1 - r / (n + 1); r is the largest rank for which this is at least ``coverage``.

    Args:
        probs: of the label, of the rows that have it, float [n_rows].
        coverage: in (0, 1).

    Returns:
        The set of a text has the label if its probability is at least this.

    >>> choose_cutoff(np.arange(1, 20) / 20, 0.9)
    0.1
    """
    rank = math.floor((len(probs) + 1) * (1 - coverage) + 1e-9)
    return float(np.sort(probs)[rank - 1])


def choose_levels(
    promises: Mapping[str, Any], probs: np.ndarray, decided: np.ndarray, truth: np.ndarray, labels: Sequence[str]
) -> dict[str, dict[str, float]]:
    """The fields ``thresholds`` and ``cutoffs`` of :class:`Levels`.

    Args:
        promises: the targets that are set, as in conf/evaluate.
        probs: of val, float [n_rows, n_labels].
        decided: the predicted label ids, int [n_rows].
        truth: the true ones, int [n_rows].
        labels: in order.

    Raises:
        ConfigError: no threshold reaches a target; the message has the best one.
    """
    confidence, is_right = probs[np.arange(len(probs)), decided], decided == truth
    cutoffs, thresholds = {}, {}
    if (coverage := promises.get("set_coverage")) is not None:
        cutoffs = {label: choose_cutoff(probs[truth == i, i], coverage) for i, label in enumerate(labels)}
    if (accuracy := promises.get("target_accuracy")) is not None:
        thresholds = dict.fromkeys(labels, _threshold(f"target_accuracy={accuracy:g}", confidence, is_right, accuracy))
    elif precision := promises.get("target_precision"):
        thresholds = dict.fromkeys(labels, 0.0)
        for label, target in precision.items():
            own = decided == labels.index(label)
            thresholds[label] = _threshold(f"target_precision.{label}={target:g}", confidence[own], is_right[own], target)
    return {"thresholds": thresholds, "cutoffs": cutoffs}


def _threshold(key: str, confidence: np.ndarray, is_right: np.ndarray, target: float) -> float:
    threshold = choose_threshold(confidence, is_right, target)
    if threshold is None:
        raise ConfigError(
            f"evaluate.{key}: no threshold on the confidence of {len(confidence)} answers on val reaches it with "
            f"{CONFIDENCE:.0%} confidence; the best target is {best_target(confidence, is_right):.3f}. Lower it, or train a "
            "better model, or add rows to val."
        )
    return threshold


def interval(n_right: int, n_rows: int) -> dict[str, float]:
    """The 95 % interval of a share (Clopper and Pearson 1934), as low and high; 0 and 1 without rows."""
    from scipy.stats import beta

    low = beta.ppf(0.025, n_right, n_rows - n_right + 1) if n_right else 0.0
    high = beta.ppf(0.975, n_right + 1, n_rows - n_right) if n_right < n_rows else 1.0
    return {"low": float(low), "high": float(high)}
