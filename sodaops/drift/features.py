"""The features of texts that drift detection compares."""

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

ABSTAINED = "abstained"
TITLES = {
    "n_chars": "length in characters",
    "letters": "share of letters",
    "non_ascii": "share of characters outside ASCII",
    "pieces_per_word": "word pieces per word",
    "unknown": "share of unknown word pieces",
    "label": "predicted label",
    "score": "confidence",
    "embedding": "meaning within a label",
    ABSTAINED: "share of abstentions",
}
ANSWERS = ("label", "score")  # unless the task has others
TEXT = tuple(name for name in TITLES if name not in (*ANSWERS, ABSTAINED))


@dataclass(frozen=True)
class Bin:
    """One bin of a histogram, or one label: the share of each side in it. An alias is the name in drift.json."""

    start: Annotated[float | str, Field(alias="from")]  # lower edge, or the label
    reference: Annotated[float, Field(alias="before")]
    current: Annotated[float, Field(alias="now")]


@dataclass(frozen=True)
class Feature:
    """The comparison of one feature. An alias is the name in drift.json."""

    name: str
    p: float | None  # None: not logged
    effect: float | None  # distance of the distributions or largest difference of a rate, in [0, 1]; None for the embedding
    drifted: bool
    reference: Annotated[float | None, Field(alias="before")]  # median; None for labels and the embedding
    current: Annotated[float | None, Field(alias="now")]
    bins: list[Bin] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The name to show to people."""
        return TITLES.get(self.name) or f"predicted {self.name}".replace("_", " ")
