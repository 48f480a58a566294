"""A feature of the texts that drift compares."""

from dataclasses import dataclass, field
from typing import Any

TITLES = {
    "n_chars": "length in characters",
    "letters": "share of letters",
    "non_ascii": "share of characters outside ASCII",
    "pieces_per_word": "word pieces for each word",
    "unknown": "share of unknown word pieces",
    "label": "answered label",
    "score": "confidence",
    "embedding": "what texts of one label say",
}


@dataclass(frozen=True)
class Feature:
    """One thing that is compared."""

    name: str
    p: float | None  # None: not logged
    effect: float | None  # distance of the distributions, 0 to 1; None for the embedding
    drifted: bool
    before: float | None  # median; None for labels and the embedding
    now: float | None
    bins: list[dict[str, Any]] = field(default_factory=list)  # from, before and now: shares of each bin or label

    @property
    def title(self) -> str:
        """In words."""
        return TITLES[self.name]
