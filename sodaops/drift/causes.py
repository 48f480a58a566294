"""What a shift looks like to a person: the names of the usual causes, from what was measured."""

from collections.abc import Sequence
from dataclasses import dataclass

from sodaops.config.schema import DriftConfig
from sodaops.drift.features import Feature

_FAR = 0.3  # a shift of the tokenizer's view that no topic or style brings about


@dataclass(frozen=True)
class Cause:
    """One of: empty, repeated, language, texts, labels, confidence."""

    name: str
    said: str


def causes_of(
    settings: DriftConfig, features: Sequence[Feature], empty: float, repeated: float, repeated_text: str | None
) -> list[Cause]:
    """Names what happened; none: the window is as the reference.

    Texts are compared without their repetitions, so a bot does not look like new texts, and within answered labels, so
    another mix of labels does not either.
    """
    by_name = {feature.name: feature for feature in features}
    drifted = {name for name, feature in by_name.items() if feature.drifted}
    found = []
    if empty > settings.max_empty:
        found.append(Cause("empty", f"{empty:.0%} of the texts are empty"))
    if repeated > settings.max_repeated:
        shown = f": {repeated_text[:60]!r}" if repeated_text else ""
        found.append(Cause("repeated", f"one text makes up {repeated:.0%} of the requests{shown}"))
    tokens = [name for name in ("pieces_per_word", "non_ascii", "unknown") if name in drifted and _far_up(by_name[name])]
    if tokens:
        told = ", ".join(by_name[name].title for name in tokens)
        found.append(Cause("language", f"another language or script ({told} went up)"))
    elif "embedding" in drifted or ("label" not in drifted and drifted - {"score"}):
        told = ", ".join(feature.title for feature in features if feature.name in drifted - {"label", "score"})
        found.append(Cause("texts", f"other texts than those learned from ({told})"))
    elif "label" in drifted:
        found.append(Cause("labels", f"another mix of answers ({_mix(by_name['label'])})"))
    elif "score" in drifted:
        score = by_name["score"]
        way = "less sure" if score.now < score.before else "surer"
        found.append(Cause("confidence", f"answers are {way}: median {score.before:.2f} before, {score.now:.2f} now"))
    return found


def _far_up(feature: Feature) -> bool:
    mean = [sum(b["from"] * b[side] for b in feature.bins) for side in ("before", "now")]
    return feature.effect >= _FAR and mean[1] > mean[0]


def _mix(label: Feature) -> str:
    most = sorted(label.bins, key=lambda b: -abs(b["now"] - b["before"]))[:3]
    return ", ".join(f"{b['from']} {b['before']:.0%} → {b['now']:.0%}" for b in most)
