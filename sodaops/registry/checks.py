"""The rules of the gate: each holds one number against one limit, and says in words what it measured."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sodaops.config.schema import GateConfig
from sodaops.evaluation import metrics
from sodaops.inference.predictor import Predictor

_N_TIMED = 120  # texts answered one at a time by each model, in turns
_N_PARITY = 64  # texts on which ONNX is held against torch


@dataclass(frozen=True)
class Verdict:
    """One rule, held against one number."""

    rule: str
    passed: bool
    value: float | None  # None: it did not apply
    limit: str
    said: str  # in words


def paired_gains(label_ids: np.ndarray, mine: np.ndarray, theirs: np.ndarray, n_labels: int, n_samples: int) -> np.ndarray:
    """Differences of macro-F1 over bootstrap samples of the rows, both models on the same sample each time.

    Rows that are alike in label and both answers are interchangeable, so their counts are drawn from a multinomial
    distribution in place of the rows (Efron 1979).

    Args:
        label_ids: int [n_rows].
        mine: predicted ids, int [n_rows].
        theirs: predicted ids of the other model, int [n_rows].
        n_labels: labels in all.
        n_samples: bootstrap samples.

    Returns:
        Mine minus theirs, float [n_samples].
    """
    cells, counts = np.unique(np.stack([label_ids, mine, theirs]), axis=1, return_counts=True)
    draws = np.random.default_rng(0).multinomial(counts.sum(), counts / counts.sum(), size=n_samples)
    macro = []
    for answers in (cells[1], cells[2]):
        matrices = np.zeros((n_samples, n_labels * n_labels), dtype=np.int64)
        for place, column in zip(cells[0] * n_labels + answers, draws.T, strict=True):
            matrices[:, place] += column
        macro.append(metrics.summary(matrices.reshape(n_samples, n_labels, n_labels))["macro_f1"])
    return macro[0] - macro[1]


def better(gain: Mapping[str, float], against: str, rules: GateConfig) -> Verdict:
    """The gain in macro-F1 over what is there now is above the limit, with the confidence asked for."""
    bound, limit = gain["bound"], rules.min_gain
    said = (
        f"macro-F1 {gain['measured']:+.4f} against {against}; with {rules.confidence:.0%} confidence above {bound:+.4f} "
        f"(95 % interval {gain['low']:+.4f} to {gain['high']:+.4f})"
    )
    return Verdict("better", bound > limit, bound, f"> {limit:g}", said)


def floors(slices: Sequence[Mapping[str, Any]], floor: float) -> Verdict:
    """No slice with rows enough is below the floor."""
    worst = min((entry for entry in slices if entry["judged"]), key=lambda entry: entry["f1"], default=None)
    if worst is None:
        return Verdict("slices", True, None, f"≥ {floor:g}", "no slice has rows enough")
    said = f"the lowest is {worst['slice']}: {worst['f1']:.3f} over {worst['n_rows']} rows"
    return Verdict("slices", worst["f1"] >= floor, worst["f1"], f"≥ {floor:g}", said)


def calibrated(ece: float, ceiling: float) -> Verdict:
    """Confidence and accuracy agree."""
    return Verdict("calibration", ece <= ceiling, ece, f"≤ {ceiling:g}", f"expected calibration error {ece:.4f}")


def quick(mine: Predictor, theirs: Predictor | None, texts: Sequence[str], ceiling: float) -> Verdict:
    """One text at a time, both models in turns, so that what slows the machine slows both."""
    if theirs is None:
        return Verdict("latency", True, None, f"≤ {ceiling:g}", "no champion to compare with")
    asked = [texts[i] for i in np.linspace(0, len(texts) - 1, min(_N_TIMED, len(texts))).astype(int)]
    spent_s: dict[int, list[float]] = {0: [], 1: []}
    for text in asked[:8] + asked:
        for which, predictor in enumerate((mine, theirs)):
            begun = time.perf_counter()
            predictor.run([predictor.encode(text)])
            spent_s[which].append(time.perf_counter() - begun)
    medians = [float(np.median(spent_s[which][8:])) for which in (0, 1)]
    ratio = medians[0] / medians[1]
    said = (
        f"{1000 * medians[0]:.2f} ms for a text, the champion {1000 * medians[1]:.2f} ms (medians of {len(asked)}, one thread)"
    )
    return Verdict("latency", ratio <= ceiling, ratio, f"≤ {ceiling:g}", said)


def parity(bundle: Path, texts: Sequence[str], ceiling: float) -> Verdict:
    """The ONNX graph answers as torch does."""
    import torch

    from sodaops.bundle.save import load_bundle

    loaded, onnx = load_bundle(bundle), Predictor(bundle, "float32")
    gaps = []
    for text in [texts[i] for i in np.linspace(0, len(texts) - 1, min(_N_PARITY, len(texts))).astype(int)]:
        row = onnx.encode(text)
        ids = torch.from_numpy(row[None])
        with torch.inference_mode():
            expected = torch.softmax(loaded.model(ids, torch.ones_like(ids)).logits, dim=-1).numpy()
        gaps.append(float(np.abs(onnx.run([row]).probs - expected).max()))
    said = f"ONNX float32 and torch differ by at most {max(gaps):.1e} in a probability, on {len(gaps)} texts"
    return Verdict("parity", max(gaps) <= ceiling, max(gaps), f"≤ {ceiling:g}", said)


def agrees(bundle: Path, mine: Predictor, texts: Sequence[str], probs: np.ndarray, floor: float) -> Verdict:
    """The variant that serves names the labels that float32 names."""
    full = probs if mine.variant == "float32" else Predictor(bundle, "float32").probs_of_cleaned(texts)
    share = float((full.argmax(1) == probs.argmax(1)).mean())
    return Verdict(
        "agreement", share >= floor, share, f"≥ {floor:g}", f"{mine.variant} serves; {share:.1%} of its labels are float32's"
    )


def able(abilities: Mapping[str, Mapping[str, Any]], rules: GateConfig) -> list[Verdict]:
    """Each ability's pass rate reaches its floor, and does not fall far below the champion's."""
    found = []
    for ability, of in abilities.items():
        floor = rules.behaviour.floors.get(ability, 0.0)
        if of["champion"] is not None:
            floor = max(floor, of["champion"] - rules.behaviour.max_drop)
        said = f"{of['rate']:.0%} of {of['n_cases']} cases" + (
            f", the champion {of['champion']:.0%}" if of["champion"] is not None else ""
        )
        found.append(Verdict(f"behaviour: {ability}", of["rate"] >= floor - 1e-9, of["rate"], f"≥ {floor:.2f}", said))
    return found
