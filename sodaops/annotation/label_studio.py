"""Label Studio's formats: its JSON in both directions, its CSV and JSON-MIN exports, and its labeling config."""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from xml.sax.saxutils import quoteattr

from sodaops.annotation.state import AnnotationState
from sodaops.annotation.tasks import Task
from sodaops.errors import DataError, nearest
from sodaops.text.columns import join, split

LABEL, TEXT = "label", "text"  # names of the tags in the labeling config, and the default keys of an import
_OURS = ("task", "why")  # what an export puts into a task's data beside the text
# The columns of a CSV or JSON-MIN export that are neither data nor controls.
_FLAT = {
    "annotation_id", "annotator", "created_at", "updated_at", "lead_time", "id", "inner_id", "project", "file_upload",
    "agreement", "comment_count", "unresolved_comment_count", "last_comment_updated_at", "comment_authors", *_OURS,
}  # fmt: skip


class ImportedRow(NamedTuple):
    """A text of a file with at most one answer: without an annotator no answer, with None as the label a skip."""

    position: str
    task: str
    text: Any
    label: Any
    annotator: str | None


class ImportKeys(NamedTuple):
    """Where a file has the text and the label (annotate.text_key, annotate.label_key); None: found if there is no doubt."""

    text: str | None = None
    label: str | None = None
    text_columns: Sequence[str] = (TEXT,)  # of the store; several have their own names in the file

    def choose_texts(self, candidates: Sequence[str], allowed: Iterable[str]) -> list[str]:
        """The keys of the parts of a text.

        Raises:
            DataError: they are missing or in doubt.
        """
        if len(self.text_columns) == 1:
            return [_choose("annotate.text_key", self.text, TEXT, candidates, allowed)]
        allowed = list(allowed)
        if missing := [name for name in self.text_columns if name not in allowed]:
            raise DataError(f"text column {', '.join(missing)} is not in the file, which has {', '.join(allowed)}.")
        return list(self.text_columns)


def text_in(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The text in a row: the value of its key, or its parts joined; None if a part is no text."""
    parts: list[Any] = [row.get(name) for name in names]
    return parts[0] if len(parts) == 1 else join(parts) if all(isinstance(part, str) for part in parts) else None


def labeling_config(labels: Sequence[str], question: Mapping[str, Any], text_columns: Sequence[str] = (TEXT,)) -> str:
    """Label Studio's labeling config: a text, or its parts under their names, and the question about it.

    >>> labeling_config(["bad", '"so so"'], {"kind": "choice"}).splitlines()[4]
    '    <Choice value=\\'"so so"\\' hotkey="2"/>'
    >>> labeling_config(["stars"], {"kind": "number", "min": 1}).splitlines()[2]
    '  <Number name="label" toName="text" min="1"/>'
    """
    if question["kind"] == "number":
        limits = "".join(f" {name}={quoteattr(str(question[name]))}" for name in ("min", "max", "step") if name in question)
        return _view(text_columns, f'  <Number name="{LABEL}" toName={quoteattr(text_columns[0])}{limits}/>')
    keys = [f' hotkey="{n}"' if n < 10 else "" for n in range(1, len(labels) + 1)]
    choices = [f"    <Choice value={quoteattr(label)}{key}/>" for label, key in zip(labels, keys, strict=True)]
    number = "single" if question["kind"] == "choice" else "multiple"
    choices_tag = f'  <Choices name="{LABEL}" toName={quoteattr(text_columns[0])} choice="{number}">'
    return _view(text_columns, choices_tag, *choices, "  </Choices>")


def _view(text_columns: Sequence[str], *control: str) -> str:
    headers = [[f"  <Header value={quoteattr(name)}/>"] if len(text_columns) > 1 else [] for name in text_columns]
    texts = [f"  <Text name={quoteattr(name)} value={quoteattr('$' + name)}/>" for name in text_columns]
    shown = [line for header, text in zip(headers, texts, strict=True) for line in (*header, text)]
    return "\n".join(["<View>", *shown, *control, "</View>", ""])


def label_studio_task(state: AnnotationState, task: Task) -> dict[str, Any]:
    """A task with its answers, for Label Studio's import."""
    predictions, annotations = [], []
    if task.label is not None:
        score = {} if task.score is None else {"score": task.score}
        model = task.bundle_id or "unknown"
        predictions.append({"model_version": model, **score, "result": [_result(f"{task.task[:10]}-p", task.label, state)]})
    for n, (name, label) in enumerate(sorted(state.answers.get(task.task, {}).items()), 1):
        result = [] if label is None else [{**_result(f"{task.task[:10]}-{n}", label, state), "meta": {"annotator": name}}]
        annotations.append({"annotator": name, "was_cancelled": label is None, "ground_truth": False, "result": result})
    texts = dict(zip(state.text_columns, split(task.text, len(state.text_columns)), strict=True))
    data = {**texts, "task": task.task, "why": task.why}
    return {"data": data, "predictions": predictions, "annotations": annotations}


def _result(name: str, answer: str, state: AnnotationState) -> dict[str, Any]:
    value = state.ml_task.answer_value(answer)
    key = "number" if state.ml_task.question["kind"] == "number" else "choices"
    content = {key: [value] if isinstance(value, str) else value}
    return {"id": name, "type": key, "from_name": LABEL, "to_name": state.text_columns[0], "value": content}


def is_flat(columns: Iterable[str]) -> bool:
    """Whether these are the columns of a CSV or JSON-MIN export."""
    return {"annotation_id", "annotator"} <= set(columns)


def json_rows(content: Any, keys: ImportKeys, kind: str, faults: list[str]) -> Iterator[ImportedRow]:
    """The texts and answers of a JSON or JSON-MIN export, to a question of this kind.

    Raises:
        DataError: the text or the control is in doubt, or missing everywhere.
    """
    items = content if isinstance(content, list) else [content]
    if items and all(isinstance(item, dict) and is_flat(item) for item in items):
        yield from flat_rows(items, list(dict.fromkeys(key for item in items for key in item)), keys, "task")
        return
    data = [item["data"] for item in items if isinstance(item, dict) and isinstance(item.get("data"), dict)]
    texts = [key for key in dict.fromkeys(key for one in data for key in one) if _holds_texts(key, data)]
    text_keys = keys.choose_texts(texts, dict.fromkeys(key for one in data for key in one))
    parts = [part for item in items for annotation in _annotations(item) for part in _answers(annotation)]
    controls = list(dict.fromkeys(str(part.get("from_name")) for part in parts))
    control = _choose("annotate.label_key", keys.label, None, controls, controls) if controls else None
    for number, item in enumerate(items, 1):
        yield from _item_rows(f"task {number}", item, text_keys, control, len(controls) > 1, kind, faults)


def _holds_texts(key: str, data: Sequence[Mapping[str, Any]]) -> bool:
    return key not in _OURS and any(isinstance(one.get(key), str) for one in data)


def _choose(setting: str, given: str | None, default: str | None, candidates: Sequence[str], allowed: Iterable[str]) -> str:
    """The given name, else the default one, else the only candidate.

    Raises:
        DataError: there is none, or there are several.
    """
    allowed = list(allowed)
    if given is not None:
        if given not in allowed:
            raise DataError(f"{setting}={given} is not in the file, which has {', '.join(allowed)}{nearest(given, allowed)}.")
        return given
    if default in candidates or not candidates:
        return default or ""
    if len(candidates) > 1:
        raise DataError(f"the file has {', '.join(candidates)}; name the one to import with {setting}={candidates[0]}.")
    return candidates[0]


def _annotations(item: Any) -> list[dict[str, Any]]:
    annotations = item.get("annotations", []) if isinstance(item, dict) else []
    return [one for one in annotations if isinstance(one, dict)] if isinstance(annotations, list) else []


def _answers(annotation: Mapping[str, Any]) -> list[dict[str, Any]]:
    result = annotation.get("result")
    parts = result if isinstance(result, list) else []
    return [part for part in parts if isinstance(part, dict) and part.get("type") in ("choices", "number")]


def _item_rows(
    position: str, item: Any, text_keys: Sequence[str], control: str | None, several: bool, kind: str, faults: list[str]
) -> Iterator[ImportedRow]:
    data = item.get("data") if isinstance(item, dict) else None
    annotations = item.get("annotations", []) if isinstance(item, dict) else None
    if not isinstance(data, dict) or not isinstance(annotations, list):
        faults.append(f"{position}: has no 'data' with the text; export from Label Studio as JSON, JSON-MIN or CSV.")
        return
    text, task = text_in(data, text_keys), str(data.get("task") or "")
    yield ImportedRow(position, task, text, None, None)
    for number, annotation in enumerate(annotations, 1):
        where = f"{position} annotation {number}"
        if not isinstance(annotation, dict) or not isinstance(annotation.get("result"), list):
            faults.append(f"{where}: has no result.")
            continue
        parts = [part for part in _answers(annotation) if str(part.get("from_name")) == control]
        values = [part["value"].get(part["type"]) for part in parts if isinstance(part.get("value"), dict)]
        values = [[value] if isinstance(value, int | float) else value for value in values]
        answers = [one for value in values if isinstance(value, list) for one in value]
        unanswered = not annotation["result"] or (several and not parts)  # only other controls were answered
        skipped = annotation.get("was_cancelled") is True or unanswered
        if not skipped and kind != "choices" and len(answers) != 1:
            faults.append(f"{where}: has {len(answers)} {'choices' if kind == 'choice' else 'numbers'}; expected one.")
            continue
        answer = None if skipped else answers if kind == "choices" else answers[0]
        yield ImportedRow(where, task, text, answer, _annotator(annotation, parts))


def _annotator(annotation: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]) -> str:
    names = [part["meta"].get("annotator") for part in parts if isinstance(part.get("meta"), dict)]
    member = annotation.get("completed_by")  # a number, or an object with number and e-mail address
    email, number = (member.get("email"), member.get("id")) if isinstance(member, dict) else (None, member)
    return next(filter(None, [*names, annotation.get("annotator"), email]), member_name(number))


def member_name(number: Any) -> str:
    """The name for a member of whom a file has only the number, or an e-mail address, which is kept.

    >>> member_name(7), member_name("7"), member_name(None), member_name("cy@example.org")
    ('label-studio 7', 'label-studio 7', 'label-studio', 'cy@example.org')
    """
    text = str(number or "")
    return text if text and not text.isdigit() else f"label-studio {text}".strip()


def flat_rows(rows: Iterable[Mapping[str, Any]], columns: Sequence[str], keys: ImportKeys, kind: str) -> Iterator[ImportedRow]:
    """The texts and answers of a CSV or JSON-MIN export: a row for each annotation.

    Raises:
        DataError: the text or the control is in doubt.
    """
    other = [name for name in columns if name not in _FLAT]
    text_keys = keys.choose_texts([name for name in other if name != keys.label], columns)
    controls = [name for name in other if name not in text_keys]
    label_key = _choose("annotate.label_key", keys.label, None, controls, columns)
    for number, row in enumerate(rows, 1):
        label = row.get(label_key)
        if isinstance(label, str) and label.startswith(('{"choices"', '[{"number"')):
            with contextlib.suppress(ValueError):  # else it is no answer, which is reported with its row
                label = json.loads(label)
        label = label[0] if isinstance(label, list) and len(label) == 1 else label
        chosen = label.get("choices", label.get("number")) if isinstance(label, dict) else label
        if isinstance(chosen, list) and len(chosen) == 1:
            chosen = chosen[0]
        task = str(row.get("task") or "")
        yield ImportedRow(
            f"{kind} {number}",
            task,
            text_in(row, text_keys),
            None if chosen in ("", []) else chosen,
            member_name(row.get("annotator")),
        )
