"""A text to annotate, with the prediction of a model, and the checks of texts and names."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from sodaops.errors import DataError, nearest, some
from sodaops.tasks.base import Task as MLTask

LABEL = "label"  # its label in the data is suspected to be an error
WHYS = ("uncertain", "drifted", "diverse", "random", "disagreed", "feedback", "import", LABEL)
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Task:
    """A text to annotate.

    Attributes:
        task: its id, the first 16 digits of text_sha256.
        text: as it was received, without cleaning.
        text_sha256: hash of the cleaned text; no two tasks have the same.
        why: why it was picked, one of :data:`WHYS`.
        label: the model's prediction; None without one.
        score: the model's probability of this label.
        probs: label -> probability.
        request_id: the request that it comes from.
        place: its position in that request.
        bundle_id: the model that answered.
    """

    task: str
    text: str
    text_sha256: str
    why: str
    label: str | None = None
    score: float | None = None
    probs: dict[str, float] | None = None
    request_id: str | None = None
    place: int | None = None
    bundle_id: str | None = None


TASK_FIELDS = [field.name for field in fields(Task)]


def task_of(entry: Mapping[str, Any], labels: Sequence[str], ml_task: MLTask) -> Task:
    """Makes a task of its fields and checks them; ``task`` and the fields with a default are optional.

    Raises:
        DataError: a field that is missing, unknown, or has a value that is not valid.
    """
    for name in entry:
        if name not in TASK_FIELDS:
            raise DataError(f"{name!r} is no field of a task{nearest(name, TASK_FIELDS)}; expected {', '.join(TASK_FIELDS)}.")
    text, sha256, why = entry.get("text"), entry.get("text_sha256"), entry.get("why")
    check_text(text)
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise DataError(f"text_sha256={sha256!r}; expected 64 hexadecimal digits in lower case.")
    if entry.get("task", sha256[:16]) != sha256[:16]:
        raise DataError(f"task={entry['task']!r}; expected {sha256[:16]}, the first 16 digits of text_sha256.")
    if why not in WHYS:
        raise DataError(f"why={why!r}; expected one of {', '.join(WHYS)}{nearest(why, WHYS)}.")
    for label in entry.get("probs") or {}:
        if label not in labels:
            raise DataError(f"label={label!r}; expected one of {some(labels, 20)}{nearest(label, labels)}.")
    if entry.get("label") is not None:
        ml_task.check_answer(entry["label"], labels)
    return Task(**{**entry, "task": sha256[:16]})


def normal_form(text: str) -> str:
    """The text in Unicode's normal form C; texts that differ only in their form look the same, and are one task."""
    return unicodedata.normalize("NFC", text)


def check_text(text: object) -> None:
    """Refuses a text that is not valid.

    Raises:
        DataError: not a string, empty, or with a character that UTF-8 cannot encode.
    """
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"text={text!r}; expected a text that is not empty.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError("text: has a lone surrogate (half a character), which UTF-8 cannot encode; remove it.") from None


def check_annotator(name: object) -> str:
    """Returns an annotator's name without surrounding white space.

    Raises:
        DataError: an empty name, one of more than 60 characters, or one with control characters.
    """
    cleaned = name.strip() if isinstance(name, str) else ""
    if not cleaned or len(cleaned) > 60 or not cleaned.isprintable():
        raise DataError(f"annotator={name!r}; expected 1 to 60 printable characters.")
    return cleaned
