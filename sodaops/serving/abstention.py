"""Abstention and label sets in the answers of the service, if the settings or the request ask for them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from starlette.exceptions import HTTPException

from sodaops.inference.predictor import Predictor


class Asked(NamedTuple):
    """What a request asks for beside the prediction."""

    abstain: bool | None = None  # None: as the settings say
    sets: bool = False


PLAIN = Asked()
KEY = "serve.abstain=true (SODAOPS_ABSTAIN)"


def has(predictor: Predictor) -> tuple[bool, bool]:
    """Whether a bundle has thresholds, and whether it has label sets."""
    return predictor.has_thresholds, predictor.abstainer is not None and bool(predictor.abstainer.levels["cutoffs"])


def can_answer(predictor: Predictor, asked: Asked) -> bool:
    """Whether a bundle has what is asked for."""
    return all(exists or not wanted for wanted, exists in zip(asked, has(predictor), strict=True))


def resolve(asked: Asked, default: bool, predictor: Predictor) -> Asked:
    """What is asked for, with the setting for ``abstain`` if a request has none; refuses what the bundle lacks (422)."""
    for key, wanted, exists in zip(Asked._fields, asked, has(predictor), strict=True):
        if wanted and not exists:
            target = "target_accuracy" if key == "abstain" else "set_coverage"
            raise HTTPException(422, f"{key}: the bundle cannot answer this; it was exported without evaluate.{target}")
    return asked if asked.abstain is not None else asked._replace(abstain=default)


def with_fields(predictor: Predictor, predictions: Sequence[Any], asked: Asked) -> list[dict[str, Any]]:
    """The fields of predictions, with those of abstention and label sets if asked for."""
    answers = [vars(prediction) for prediction in predictions]
    if asked.abstain:
        reasons = map(predictor.reason, predictions)
        answers = [{**answer, "abstain": why is not None, "reason": why} for answer, why in zip(answers, reasons, strict=True)]
    if asked.sets and predictor.abstainer:
        answers = [{**answer, "label_set": predictor.abstainer.label_set(answer["probs"])} for answer in answers]
    return answers
