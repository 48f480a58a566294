"""What is to be annotated: a text, and what a model said of it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from sodaops.errors import DataError, nearest, some

WHYS = ("uncertain", "drifted", "diverse", "random", "feedback", "import")
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Task:
    """A line of tasks/NAME.jsonl.

    Attributes:
        task: the first 16 digits of text_sha256; names the task in answers.
        text: as it came.
        text_sha256: of the cleaned text; a text is a task once.
        why: how it came to be one of :data:`WHYS`.
        label: the model's, if one was asked.
        score: the model's probability of it.
        probs: label -> probability.
        request_id: of the request that brought it.
        place: its place in that request.
        bundle_id: of the model that was asked.
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


def task_of(entry: Mapping[str, Any], labels: Sequence[str]) -> Task:
    """A task from its fields, checked; ``task`` itself may be left out, as may what has a default.

    Raises:
        DataError: a field that is missing, unknown, or holds what it cannot.
    """
    for name in entry:
        if name not in TASK_FIELDS:
            raise DataError(f"{name!r} is no field of a task{nearest(name, TASK_FIELDS)}; it has {', '.join(TASK_FIELDS)}.")
    text, sha256, why = entry.get("text"), entry.get("text_sha256"), entry.get("why")
    check_text(text)
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise DataError(f"text_sha256={sha256!r}; expected 64 hexadecimal digits in lower case.")
    if entry.get("task", sha256[:16]) != sha256[:16]:
        raise DataError(f"task={entry['task']!r}; expected {sha256[:16]}, the first 16 digits of text_sha256.")
    if why not in WHYS:
        raise DataError(f"why={why!r}; expected one of {', '.join(WHYS)}{nearest(why, WHYS)}.")
    for label in [*(entry.get("probs") or {}), *([entry["label"]] if entry.get("label") is not None else [])]:
        check_label(label, labels)
    return Task(**{**entry, "task": sha256[:16]})


def check_text(text: object) -> None:
    """Refuses what is no text to annotate.

    Raises:
        DataError: no string, an empty one, or one that UTF-8 cannot hold.
    """
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"text={text!r}; expected a text with something in it.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError("the text holds half a character (a lone surrogate), which UTF-8 cannot; take it out.") from None


def check_label(label: object, labels: Sequence[str]) -> None:
    """Refuses what is no label.

    Raises:
        DataError: it names those that are, and the nearest.
    """
    if label not in labels:
        raise DataError(f"label={label!r}; expected one of {some(labels, 20)}{nearest(label, labels)}.")


def check_annotator(name: object) -> str:
    """An annotator's name without surrounding white space.

    Raises:
        DataError: no name, one of more than 60 characters, or with line breaks or other control characters.
    """
    cleaned = name.strip() if isinstance(name, str) else ""
    if not cleaned or len(cleaned) > 60 or not cleaned.isprintable():
        raise DataError(f"annotator={name!r}; expected a name of 1 to 60 characters that can be printed.")
    return cleaned
