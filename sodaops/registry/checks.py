"""The checks of the gate. Each compares a number with a limit of conf/registry."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sodaops.config.schema import GateConfig
from sodaops.data.tokens import batch_inputs
from sodaops.inference.ensemble import median_times_s
from sodaops.inference.predictor import Predictor
from sodaops.tasks.base import Metric, Task

_N_PARITY = 64  # texts on which ONNX is compared with torch


@dataclass(frozen=True)
class Verdict:
    """The result of one check. Its fields are written to gate.json."""

    rule: str
    passed: bool
    value: float | None  # None: the check does not apply
    limit: str
    said: str  # explanation
    accept: tuple[str, ...] = ()  # the settings with which it passes


class LiveTest(NamedTuple):
    """Labelled texts of live traffic on which challenger and champion disagree."""

    n_labelled: int
    won: int  # the challenger was right and the champion wrong
    lost: int  # the other way round


def check_gain(gain: Mapping[str, float], against: str, metric: Metric, rules: GateConfig) -> Verdict:
    """The gain in a metric exceeds the limit with the configured confidence."""
    bound, limit = gain["bound"], rules.min_gain
    text = (
        f"{metric.title} {gain['measured']:+.4f} against {against}; with {rules.confidence:.0%} confidence above {bound:+.4f} "
        f"(95 % interval {gain['low']:+.4f} to {gain['high']:+.4f})"
    )
    accept = f"registry.gate.min_gain={_down(bound - 1e-9)}"
    return Verdict("better", bound > limit, bound, f"> {limit:g}", text, (accept,))


def _down(value: float) -> str:
    return f"{math.floor(100 * value) / 100:g}"


def _up(value: float) -> str:
    return f"{math.ceil(100 * value) / 100:g}"


def check_slices(slices: Sequence[Mapping[str, Any]], task: Task, floor: float) -> Verdict:
    """No slice with enough rows has an F1, or another first metric of the task, below the floor."""
    key = task.slice_key
    worst = min((entry for entry in slices if entry["judged"]), key=lambda entry: entry[key], default=None)
    if worst is None:
        return Verdict("slices", True, None, f"≥ {floor:g}", "no slice has enough rows")
    text = f"the lowest is {worst['slice']}: {worst[key]:.3f} over {worst['n_rows']} rows"
    accept = f"registry.gate.slice_floor={_down(worst[key])}"
    return Verdict("slices", worst[key] >= floor, worst[key], f"≥ {floor:g}", text, (accept,))


def check_calibration(ece: float | None, task: Task, ceiling: float) -> Verdict:
    """The expected calibration error is not above the ceiling."""
    if ece is None:
        return Verdict("calibration", True, None, f"≤ {ceiling:g}", f"not defined for the task {task.name}")
    text = f"expected calibration error {ece:.4f}"
    return Verdict("calibration", ece <= ceiling, ece, f"≤ {ceiling:g}", text, (f"registry.gate.max_ece={_up(ece)}",))


def check_latency(challenger: Predictor, champion: Predictor | None, texts: Sequence[str], ceiling: float) -> Verdict:
    """The challenger's median time per text, divided by the champion's, is not above the ceiling."""
    if champion is None:
        return Verdict("latency", True, None, f"≤ {ceiling:g}", "no champion to compare with")
    (own_s, champion_s), n_timed = median_times_s([[challenger], [champion]], texts)
    ratio = own_s / champion_s
    text = f"{1000 * own_s:.2f} ms for a text, the champion {1000 * champion_s:.2f} ms (medians of {n_timed}, one thread)"
    accept = f"registry.gate.max_latency={_up(1.1 * ratio)}"  # the next measurement differs
    return Verdict("latency", ratio <= ceiling, ratio, f"≤ {ceiling:g}", text, (accept,))


def check_parity(bundle: Path, texts: Sequence[str], ceiling: float) -> Verdict:
    """The largest difference between the answers of ONNX float32 and of torch is not above the ceiling."""
    import torch

    from sodaops.bundle.save import load_bundle

    loaded, onnx = load_bundle(bundle), Predictor(bundle, "float32")
    task, gaps = onnx.task, []
    for text in [texts[i] for i in np.linspace(0, len(texts) - 1, min(_N_PARITY, len(texts))).astype(int)]:
        row = onnx.encode(text)
        inputs = batch_inputs([row], onnx.info.pad_token_id, onnx.info.limit)
        with torch.inference_mode():
            logits = loaded.model(**{name: torch.from_numpy(x) for name, x in inputs.items()}).logits
        gaps.append(float(task.gap(task.torch_probs(logits).numpy(), onnx.run([row]).probs).max()))
    text = f"ONNX float32 and torch differ by at most {max(gaps):.1e} in {task.gap_unit}, on {len(gaps)} texts"
    accept = f"registry.gate.max_gap={min(1.1 * max(gaps), 1):.1e}"
    return Verdict("parity", max(gaps) <= ceiling, max(gaps), f"≤ {ceiling:g}", text, (accept,))


def check_agreement(bundle: Path, predictor: Predictor, texts: Sequence[str], probs: np.ndarray, floor: float) -> Verdict:
    """The served variant gives the answer of float32 for at least ``floor`` of the texts."""
    full = probs if predictor.variant == "float32" else Predictor(bundle, "float32").probs_of_cleaned(texts)
    share = predictor.task.agreement(full, probs)
    text = f"{predictor.variant} serves; {share:.1%} of its {predictor.task.answers} are those of float32"
    return Verdict("agreement", share >= floor, share, f"≥ {floor:g}", text, (f"registry.gate.min_agreement={_down(share)}",))


def check_disagreements(live: LiveTest | None, floor: int, level: float) -> Verdict:
    """At least ``floor`` live disagreements have labels, and the challenger does not lose more of them than by chance.

    The p-value, at least ``level``, is that of McNemar's exact test, one-sided (McNemar 1947, Note on the Sampling Error of the
    Difference Between Correlated Proportions): the chance of no more wins if wins and losses were as likely.
    """
    rule, key = "live disagreements", "registry.gate.min_disagreements"
    if live is None:
        return Verdict(rule, True, None, f"≥ {floor}", "no champion to compare with")
    if live.n_labelled < floor:
        accept = f"{key}={live.n_labelled or 'null'}"
        return Verdict(
            rule, False, live.n_labelled, f"≥ {floor}", "labelled live texts on which it and the champion disagree", (accept,)
        )
    p = sum(math.comb(live.won + live.lost, wins) for wins in range(live.won + 1)) / 2 ** (live.won + live.lost)
    text = f"of {live.n_labelled} labelled live texts, it alone is right on {live.won}, the champion alone on {live.lost}"
    return Verdict(rule, p >= level, p, f"p ≥ {level:.3g}", text, (f"{key}=null",))


def check_behaviour(abilities: Mapping[str, Mapping[str, Any]], rules: GateConfig, skipped: str = "") -> list[Verdict]:
    """Each ability's pass rate reaches its floor, and is at most ``max_drop`` below the champion's.

    Args:
        abilities: ability -> rate, n_cases and the champion's rate.
        rules: the gate's.
        skipped: a note on tests that do not apply to the model; it becomes a verdict of its own.
    """
    verdicts = [Verdict("behaviour", True, None, "–", skipped)] if skipped else []
    drops = [result["champion"] - result["rate"] for result in abilities.values() if result["champion"] is not None]
    for ability, result in abilities.items():
        key, floor = f"registry.gate.behaviour.floors.{ability}", rules.behaviour.floors.get(ability, 0.0)
        accept: tuple[str, ...] = (f"{key}={_down(result['rate'])}",) if result["rate"] < floor else ()
        text = f"{result['rate']:.0%} of {result['n_cases']} cases"
        if result["champion"] is not None:
            floor = max(floor, result["champion"] - rules.behaviour.max_drop)
            text += f", the champion {result['champion']:.0%}"
            accept += (f"registry.gate.behaviour.max_drop={_up(max(*drops, rules.behaviour.max_drop))}",)
        passed = result["rate"] >= floor - 1e-9  # a tolerance for rounding errors
        verdicts.append(Verdict(f"behaviour: {ability}", passed, result["rate"], f"≥ {floor:.2f}", text, accept))
    return verdicts
