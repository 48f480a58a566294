"""Names of the usual causes of drift, derived from the measurements."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from sodaops.config.schema import DriftConfig
from sodaops.drift.features import ABSTAINED, TEXT, Bin, Feature

_LARGE_EFFECT = 0.3  # no change of topic or style shifts the tokenizer's features that far


@dataclass(frozen=True)
class Cause:
    """One of: empty, repeated, language, texts, labels, confidence."""

    name: str
    message: Annotated[str, Field(alias="said")]  # the alias is the name in drift.json


def find_causes(
    settings: DriftConfig, features: Sequence[Feature], empty: float, repeated: float, repeated_text: str | None
) -> list[Cause]:
    """Names the causes of drift; an empty list means no drift.

    Features are computed on distinct texts, so repetitions by a bot do not count as new texts, and the embedding is compared
    within labels, so a changed mix of labels does not either.

    Args:
        settings: conf/drift.
        features: the comparisons.
        empty: share of empty texts.
        repeated: share of the most frequent text.
        repeated_text: that text, or its hash.
    """
    by_name = {feature.name: feature for feature in features}
    drifted = {name for name, feature in by_name.items() if feature.drifted}
    causes = []
    if empty > settings.max_empty:
        causes.append(Cause("empty", f"{empty:.0%} of the texts are empty"))
    if repeated > settings.max_repeated:
        shown = f": {repeated_text[:60]!r}" if repeated_text else ""
        causes.append(Cause("repeated", f"one text makes up {repeated:.0%} of the requests{shown}"))
    # At most one of the following, from the most specific to the least.
    tokens = [name for name in ("pieces_per_word", "non_ascii", "unknown") if name in drifted and _far_above(by_name[name])]
    text_features = drifted & {*TEXT}
    answers = [name for name in by_name if name in drifted and name not in (*TEXT, "score", ABSTAINED)]
    if tokens:
        causes.append(Cause("language", f"another language or script (higher: {_titles(by_name, tokens)})"))
    elif "embedding" in drifted or (not answers and text_features):
        names = [name for name in by_name if name in text_features]
        causes.append(Cause("texts", f"texts unlike the training data ({_titles(by_name, names)})"))
    elif answers:
        causes.append(Cause("labels", _change(by_name[answers[0]])))
    elif "score" in drifted:
        medians = by_name["score"].reference, by_name["score"].current
        direction = "less" if medians[1] < medians[0] else "more"
        causes.append(Cause("confidence", f"predictions are {direction} confident: median {medians[0]:.2f} → {medians[1]:.2f}"))
    elif ABSTAINED in drifted:
        causes.append(
            Cause("confidence", f"another share of answers below the threshold ({_largest_changes(by_name[ABSTAINED])})")
        )
    return causes


def _titles(by_name: dict[str, Feature], names: Sequence[str]) -> str:
    return ", ".join(by_name[name].title for name in names)


def _far_above(feature: Feature) -> bool:
    """Whether the mean has risen, with a large effect."""
    reference = sum(float(bin_.start) * bin_.reference for bin_ in feature.bins)
    current = sum(float(bin_.start) * bin_.current for bin_ in feature.bins)
    return feature.effect >= _LARGE_EFFECT and current > reference


def _change(answers: Feature) -> str:
    if answers.reference is not None:
        return f"another distribution of the {answers.title}: median {answers.reference:.3g} → {answers.current:.3g}"
    return f"another mix of predicted labels ({_largest_changes(answers)})"


def _largest_changes(label: Feature) -> str:
    def change(bin_: Bin) -> float:
        return abs(bin_.current - bin_.reference)

    largest = sorted(label.bins, key=change, reverse=True)[:3]
    return ", ".join(f"{bin_.start} {bin_.reference:.0%} → {bin_.current:.0%}" for bin_ in largest)
