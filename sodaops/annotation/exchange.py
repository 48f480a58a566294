"""Exports tasks and answers to Label Studio's JSON and to CSV, and imports them from there."""

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import quoteattr

from sodaops.annotation.state import AnnotationState
from sodaops.annotation.store import Store
from sodaops.annotation.tasks import Task, check_annotator, check_label, check_text
from sodaops.config.schema import table_format
from sodaops.errors import SHOWN, DataError, nearest
from sodaops.io import storage

COLUMNS = ("task", "text", "label", "annotator")
_LABEL, _TEXT = "label", "text"  # names of the tags in Label Studio's labeling config
_IMPORTER = "import"  # the annotator of labels for which the file names none


class ImportResult(NamedTuple):
    """The numbers of new tasks and of new answers."""

    n_tasks: int
    n_answers: int


class _Row(NamedTuple):
    """A text of a file with at most one answer: without an annotator no answer, without a label a skip."""

    position: str
    task: str
    text: str
    label: str | None
    annotator: str | None


def export_file(store: Store, path: str | Path) -> int:
    """Writes all tasks and answers to a file for Label Studio (.json), or to a table (.csv).

    **Label Studio.** The labeling config is written beside it, with the ending .xml. The model's label becomes a prediction, an
    answer an annotation, a skip a cancelled annotation. Label Studio refuses a ``completed_by`` who is no member of its
    project, so the annotator's name is in the result's ``meta``, which it keeps.

    **Table.** One row for each answer, with the columns task, text, label, annotator. A skip has no label; a task without an
    answer has neither label nor annotator.

    Returns:
        The number of tasks.

    Raises:
        DataError: a name with another ending.
        StorageError: a file could not be written.
    """
    state, path = store.state(), Path(path)
    ending = path.suffix.lower()
    if ending == ".json":
        storage.write_text(path.with_suffix(".xml"), labeling_config(store.labels))
        storage.write_json(path, [_label_studio_task(state, task) for task in state.tasks])
    elif ending == ".csv":
        storage.write_text(path, _csv_text(state))
    else:
        raise DataError(f"{path}: expected a name that ends in .json (Label Studio) or .csv.")
    return len(state.tasks)


def import_file(store: Store, path: str | Path) -> ImportResult:
    """Reads texts and answers from Label Studio's JSON export (.json), or from a table (.csv, .tsv, .jsonl, .parquet).

    **Label Studio.** Texts become tasks, annotations answers, cancelled annotations skips; predictions are not read. The
    annotator is the name that :func:`export_file` wrote, else the e-mail address, else ``label-studio NUMBER``.

    **Table.** It has the column text, and may have task, label and annotator. A row without a label is a task without an
    answer, or with an annotator a skip. A label without an annotator is by ``import``.

    A text that is no task yet becomes one, by the hash of the text as given. An answer that an annotator gave before is not
    written again.

    Raises:
        DataError: a file that cannot be read, or rows that are not valid; then nothing is written.
        StorageError: the store could not be written.
    """
    faults: list[str] = []
    if table_format(str(path)) is not None:
        rows = _table_rows(path)
    elif Path(path).suffix.lower() == ".json":
        rows = list(_label_studio_rows(path, faults))
    else:
        raise DataError(f"{path}: expected a name that ends in .json (Label Studio), .csv, .tsv, .jsonl or .parquet.")
    return _write_rows(store, path, rows, faults)


def labeling_config(labels: Sequence[str]) -> str:
    """Label Studio's labeling config: a text, and one choice among the labels.

    >>> labeling_config(["bad", '"so so"']).splitlines()[4]
    '    <Choice value=\\'"so so"\\' hotkey="2"/>'
    """
    keys = [f' hotkey="{n}"' if n < 10 else "" for n in range(1, len(labels) + 1)]
    choices = [f"    <Choice value={quoteattr(label)}{key}/>" for label, key in zip(labels, keys, strict=True)]
    choices_tag = f'  <Choices name="{_LABEL}" toName="{_TEXT}" choice="single">'
    return "\n".join(
        ["<View>", f'  <Text name="{_TEXT}" value="$text"/>', choices_tag, *choices, "  </Choices>", "</View>", ""]
    )


def _label_studio_task(state: AnnotationState, task: Task) -> dict[str, Any]:
    predictions, annotations = [], []
    if task.label is not None:
        score = {} if task.score is None else {"score": task.score}
        model = task.bundle_id or "unknown"
        predictions.append({"model_version": model, **score, "result": [_choice(f"{task.task[:10]}-p", task.label)]})
    for n, (name, label) in enumerate(sorted(state.answers.get(task.task, {}).items()), 1):
        result = [] if label is None else [{**_choice(f"{task.task[:10]}-{n}", label), "meta": {"annotator": name}}]
        annotations.append({"annotator": name, "was_cancelled": label is None, "ground_truth": False, "result": result})
    data = {"text": task.text, "task": task.task, "why": task.why}
    return {"data": data, "predictions": predictions, "annotations": annotations}


def _choice(name: str, label: str) -> dict[str, Any]:
    return {"id": name, "type": "choices", "from_name": _LABEL, "to_name": _TEXT, "value": {"choices": [label]}}


def _csv_text(state: AnnotationState) -> str:
    lines = io.StringIO(newline="")
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(COLUMNS)
    for task in state.tasks:
        answers: dict[str, str | None] = dict(sorted(state.answers.get(task.task, {}).items()))
        for name, label in (answers or {"": None}).items():
            writer.writerow([task.task, task.text, label or "", name])
    return lines.getvalue()


def _label_studio_rows(path: str | Path, faults: list[str]) -> Iterator[_Row]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON ({error}); in Label Studio, export as JSON.") from None
    for number, item in enumerate(content if isinstance(content, list) else [content], 1):
        yield from _label_studio_item(f"task {number}", item, faults)


def _label_studio_item(position: str, item: Any, faults: list[str]) -> Iterator[_Row]:
    data = item.get("data") if isinstance(item, dict) else None
    annotations = item.get("annotations", []) if isinstance(item, dict) else None
    if not isinstance(data, dict) or not isinstance(annotations, list):
        faults.append(f"{position}: has no 'data' with the text; export from Label Studio as JSON, not as JSON-MIN.")
        return
    text, task = data.get("text"), str(data.get("task") or "")
    yield _Row(position, task, text, None, None)
    for number, annotation in enumerate(annotations, 1):
        where = f"{position} annotation {number}"
        if not isinstance(annotation, dict) or not isinstance(annotation.get("result"), list):
            faults.append(f"{where}: has no result.")
            continue
        parts = [part for part in annotation["result"] if isinstance(part, dict) and part.get("type") == "choices"]
        choices = [part["value"].get("choices") for part in parts if isinstance(part.get("value"), dict)]
        labels = [label for choice in choices if isinstance(choice, list) for label in choice]
        skipped = annotation.get("was_cancelled") is True or not annotation["result"]
        if not skipped and len(labels) != 1:
            faults.append(f"{where}: has {len(labels)} choices; expected one.")
            continue
        yield _Row(where, task, text, None if skipped else labels[0], _label_studio_annotator(annotation, parts))


def _label_studio_annotator(annotation: dict[str, Any], parts: Sequence[dict[str, Any]]) -> str:
    names = [part["meta"].get("annotator") for part in parts if isinstance(part.get("meta"), dict)]
    member = annotation.get("completed_by")  # a number, or an object with number and e-mail address
    email, number = (member.get("email"), member.get("id")) if isinstance(member, dict) else (None, member)
    return next(filter(None, [*names, annotation.get("annotator"), email]), f"label-studio {number or ''}".strip())


def _table_rows(path: str | Path) -> list[_Row]:
    from sodaops.data.sources import column_names, read_table  # pyarrow

    columns = column_names(str(path), ["text"], f"Expected are {', '.join(COLUMNS)}.")
    unknown = [name + nearest(name, COLUMNS) for name in columns if name not in COLUMNS]
    if unknown:
        raise DataError(f"{path}: unknown column {', '.join(unknown)}; expected {', '.join(COLUMNS)}. Nothing was imported.")
    rows = []
    for number, cells in enumerate(read_table(str(path), columns).to_pylist(), 1):
        task, text, label, annotator = (cells.get(name, "") for name in COLUMNS)
        rows.append(_Row(f"row {number}", task, text, label or None, annotator or (_IMPORTER if label else None)))
    return rows


def _write_rows(store: Store, path: str | Path, rows: Iterable[_Row], faults: list[str]) -> ImportResult:
    """Adds tasks and answers, if all rows are valid and the file had no faults."""
    state = store.state()
    tasks = {task.task: task for task in state.tasks}
    task_of_text = {task.text: task.task for task in state.tasks} | {task.text_sha256: task.task for task in state.tasks}
    current = {(name, task): label for task, answers in state.answers.items() for name, label in answers.items()}
    new_tasks: dict[str, dict[str, Any]] = {}
    new_answers: list[tuple[str, str, str | None]] = []
    for row in rows:
        try:
            annotator = _check_row(row, tasks, store.labels)
        except DataError as error:
            faults.append(f"{row.position}: {error}")
            continue
        sha256 = hashlib.sha256(row.text.encode()).hexdigest()
        task = row.task or task_of_text.get(row.text) or task_of_text.get(sha256)
        if task is None:
            task = sha256[:16]
            new_tasks.setdefault(sha256, {"text": row.text, "text_sha256": sha256, "why": "import"})
        if annotator is not None and current.get((annotator, task), "") != row.label:
            current[annotator, task] = row.label
            new_answers.append((annotator, task, row.label))
    if faults:
        raise _all_faults(path, faults)
    n_tasks = store.add_tasks(_batch_of(path), new_tasks.values()) if new_tasks else 0
    if new_answers:
        store.session(_IMPORTER, source=f"import:{Path(path).name}").answer_all(new_answers)
    return ImportResult(n_tasks, len(new_answers))


def _batch_of(path: str | Path) -> str:
    """The name of the batch for a file's new tasks.

    >>> _batch_of("more/Zoë's texts.csv")
    'import-Zo_s_texts.csv'
    """
    return "import-" + re.sub(r"[^A-Za-z0-9.]+", "_", Path(path).name)[:40]


def _check_row(row: _Row, tasks: dict[str, Task], labels: Sequence[str]) -> str | None:
    """Refuses a row that is not valid, and returns the name of its annotator."""
    check_text(row.text)
    if row.task:
        if row.task not in tasks:
            raise DataError(f"task={row.task!r} is not in the store; leave it empty to find the task by its text.")
        if tasks[row.task].text != row.text:
            raise DataError(f"task={row.task!r} has another text in the store; leave it empty for a new task.")
    if row.label is not None:
        check_label(row.label, labels)
    return None if row.annotator is None else check_annotator(row.annotator)


def _all_faults(path: str | Path, faults: Sequence[str]) -> DataError:
    more = f"\n- and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
    lines = "\n- ".join(faults[:SHOWN])
    return DataError(f"{path}: {len(faults)} faults; nothing was imported.\n- {lines}{more}")
