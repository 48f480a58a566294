"""Tasks from outside the package, as small as they can be: tags, of which a text may have any number, and a number."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from sodaops.errors import DataError
from sodaops.tasks.base import Task
from tests.serving import refresh_info


@dataclass(frozen=True)
class Tagged:
    """An answer of :class:`Tags`."""

    tags: list[str]
    probs: dict[str, float]


@dataclass(frozen=True)
class Number:
    """An answer of :class:`Stars`."""

    value: float


class Small(Task):
    """What both have in common."""

    metrics = ()
    keeps_answers = True

    def section(self) -> dict[str, Any]:
        return {"_target_": f"{type(self).__module__}.{type(self).__qualname__}"}

    def agreement(self, before: np.ndarray, after: np.ndarray) -> float:
        return 1.0


class Tags(Small):
    """Any number of labels."""

    name = "tags"
    prediction_class = Tagged
    question: ClassVar[dict[str, Any]] = {"kind": "choices", "none": True}

    def probs(self, logits: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-logits))

    def prediction(self, row: Sequence[float], labels: Sequence[str]) -> Tagged:
        return Tagged(
            [label for label, prob in zip(labels, row, strict=True) if prob > 0.5], dict(zip(labels, row, strict=True))
        )

    def columns(self, probs: np.ndarray, labels: Sequence[str]) -> dict[str, pa.Array]:
        return {"tags": pa.array([self.prediction(row, labels).tags for row in probs.tolist()], pa.list_(pa.string()))}

    def shown(self, prediction: Tagged) -> tuple[str, str]:
        return "|".join(prediction.tags), ""

    def logged(self, prediction: Tagged) -> tuple[str, float]:
        return "|".join(prediction.tags), 0.0

    def counted(self, prediction: Tagged) -> tuple[Sequence[str], float | None]:
        return prediction.tags, None

    def explained(self, prediction: Tagged, labels: Sequence[str]) -> int:
        return max(range(len(labels)), key=list(prediction.probs.values()).__getitem__)

    def drift_values(self, probs: np.ndarray, labels: Sequence[str]) -> dict[str, np.ndarray]:
        return {"tags": probs > 0.5, "number_of_tags": (probs > 0.5).sum(1).astype(str)}

    def uncertainty(self, probs: np.ndarray) -> np.ndarray:
        return -abs(probs - 0.5).min(1)

    def check_answer(self, answer: object, labels: Sequence[str]) -> str:
        tags = answer.split("|") if isinstance(answer, str) and answer else answer or []
        if not isinstance(tags, list) or not set(tags) <= {*labels}:
            raise DataError(f"tags={answer!r}; expected some of {', '.join(labels)}.")
        return "|".join(label for label in labels if label in tags)

    def answer_value(self, answer: str) -> list[str]:
        return answer.split("|") if answer else []


class Stars(Small):
    """A number from 0 to 5."""

    name = "stars"
    prediction_class = Number
    question: ClassVar[dict[str, Any]] = {"kind": "number", "min": 0, "max": 5, "step": 0.5}

    def probs(self, logits: np.ndarray) -> np.ndarray:
        return np.clip(logits[:, :1], 0, 5)

    def prediction(self, row: Sequence[float], labels: Sequence[str]) -> Number:
        return Number(row[0])

    def columns(self, probs: np.ndarray, labels: Sequence[str]) -> dict[str, pa.Array]:
        return {"value": pa.array(probs[:, 0])}

    def shown(self, prediction: Number) -> tuple[str, str]:
        return f"{prediction.value:.2f}", "stars"

    def logged(self, prediction: Number) -> tuple[str, float]:
        return str(prediction.value), prediction.value

    def counted(self, prediction: Number) -> tuple[Sequence[str], float | None]:
        return (), None

    def explained(self, prediction: Number, labels: Sequence[str]) -> int:
        return 0

    def drift_values(self, probs: np.ndarray, labels: Sequence[str]) -> dict[str, np.ndarray]:
        return {"stars": probs[:, 0]}

    def uncertainty(self, probs: np.ndarray) -> np.ndarray:
        return probs[:, 0]

    def check_answer(self, answer: object, labels: Sequence[str]) -> str:
        try:
            value = float(answer)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            value = float("nan")
        if not 0 <= value <= 5:
            raise DataError(f"stars={answer!r}; expected a number from 0 to 5.")
        return f"{value:g}"

    def answer_value(self, answer: str) -> float:
        return float(answer)

    def agree(self, one: str, other: str) -> bool:
        return abs(float(one) - float(other)) <= 1

    def merged(self, answers: Sequence[str]) -> str | None:
        return f"{np.mean([float(answer) for answer in answers]):g}" if answers else None


def with_task(bundle: Path, task: Small, labels: Sequence[str]) -> Path:
    """Gives a trained bundle another task, whose answers are made of the same logits."""
    refresh_info(bundle, task=task.section(), labels=list(labels))
    return bundle
