"""Tasks and answers from and to other tools: Label Studio's JSON, and tables."""

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
_FROM, _TO = "label", "text"  # the names in Label Studio's labeling config
_NOBODY = "import"


class Imported(NamedTuple):
    """How many tasks were new, and how many answers."""

    n_tasks: int
    n_answers: int


class _Row(NamedTuple):
    """A text of a file with at most one answer to it; without an annotator there is none, without a label it is a skip."""

    place: str
    task: str
    text: str
    label: str | None
    annotator: str | None


def export_file(store: Store, path: str | Path) -> int:
    """Writes Label Studio's format to a name that ends in .json, a table to one that ends in .csv; returns the tasks.

    Raises:
        DataError: another name.
        StorageError: it could not be written.
    """
    kinds = {".json": export_label_studio, ".csv": export_csv}
    return _by_ending(path, kinds)(store, path)


def import_file(store: Store, path: str | Path) -> Imported:
    """Reads Label Studio's format from a name that ends in .json, a table from any other.

    Raises:
        DataError: a file that cannot be read, or rows that cannot be used; then nothing is written.
        StorageError: the store could not be written.
    """
    if table_format(str(path)) is not None:
        return import_csv(store, path)
    return _by_ending(path, {".json": import_label_studio, ".csv": import_csv})(store, path)


def _by_ending(path: str | Path, kinds: dict[str, Any]) -> Any:
    ending = Path(path).suffix.lower()
    if ending not in kinds:
        raise DataError(f"{path}: expected a name that ends in {' or '.join(kinds)}.")
    return kinds[ending]


def export_label_studio(store: Store, path: str | Path) -> int:
    """Writes all tasks as Label Studio imports them, and beside them the labeling config, with the ending .xml.

    The model's label becomes a prediction, an answer an annotation, a skip a cancelled one. Label Studio refuses a
    ``completed_by`` that is no member of its project, so the annotator's name goes into the result's ``meta``, which it keeps.

    Returns:
        The number of tasks.

    Raises:
        StorageError: a file could not be written.
    """
    state, path = store.state(), Path(path)
    storage.write_text(path.with_suffix(".xml"), labeling_config(store.labels))
    storage.write_json(path, [_studio_task(state, task) for task in state.tasks])
    return len(state.tasks)


def labeling_config(labels: Sequence[str]) -> str:
    """Label Studio's labeling config: a text, and one choice among the labels.

    >>> labeling_config(["bad", '"so so"']).splitlines()[4]
    '    <Choice value=\\'"so so"\\' hotkey="2"/>'
    """
    keys = [f' hotkey="{n}"' if n < 10 else "" for n in range(1, len(labels) + 1)]
    choices = [f"    <Choice value={quoteattr(label)}{key}/>" for label, key in zip(labels, keys, strict=True)]
    head = ["<View>", f'  <Text name="{_TO}" value="$text"/>', f'  <Choices name="{_FROM}" toName="{_TO}" choice="single">']
    return "\n".join([*head, *choices, "  </Choices>", "</View>", ""])


def _studio_task(state: AnnotationState, task: Task) -> dict[str, Any]:
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
    return {"id": name, "type": "choices", "from_name": _FROM, "to_name": _TO, "value": {"choices": [label]}}


def import_label_studio(store: Store, path: str | Path) -> Imported:
    """Reads Label Studio's export in its format JSON: the texts as tasks, and the annotations as answers.

    The annotator is the one of the export, else Label Studio's: an address, or ``label-studio NUMBER``. A cancelled
    annotation is a skip. Predictions are not read. What is an annotator's answer already is not written again.

    Raises:
        DataError: not that format, or tasks that cannot be used; then nothing is written.
        StorageError: the store could not be written.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON ({error}); in Label Studio, export as JSON.") from None
    items = found if isinstance(found, list) else [found]
    faults: list[str] = []
    rows = [row for n, item in enumerate(items, 1) for row in _studio_rows(f"task {n}", item, faults)]
    return _take(store, path, rows, faults)


def _studio_rows(place: str, item: Any, faults: list[str]) -> Iterator[_Row]:
    data = item.get("data") if isinstance(item, dict) else None
    annotations = item.get("annotations", []) if isinstance(item, dict) else None
    if not isinstance(data, dict) or not isinstance(annotations, list):
        faults.append(f"{place}: no 'data' with the text in it; export from Label Studio as JSON, not as JSON-MIN.")
        return
    text, task = data.get("text"), str(data.get("task") or "")
    yield _Row(place, task, text, None, None)
    for number, annotation in enumerate(annotations, 1):
        where = f"{place} annotation {number}"
        if not isinstance(annotation, dict) or not isinstance(annotation.get("result"), list):
            faults.append(f"{where}: has no result.")
            continue
        choices = [part for part in annotation["result"] if isinstance(part, dict) and part.get("type") == "choices"]
        values = [part["value"].get("choices") for part in choices if isinstance(part.get("value"), dict)]
        chosen = [label for value in values if isinstance(value, list) for label in value]
        skipped = annotation.get("was_cancelled") is True or not annotation["result"]
        if not skipped and len(chosen) != 1:
            faults.append(f"{where}: {len(chosen)} choices; expected one.")
            continue
        yield _Row(where, task, text, None if skipped else chosen[0], _studio_annotator(annotation, choices))


def _studio_annotator(annotation: dict[str, Any], choices: Sequence[dict[str, Any]]) -> str:
    metas = [part["meta"].get("annotator") for part in choices if isinstance(part.get("meta"), dict)]
    by = annotation.get("completed_by")
    address = by.get("email") if isinstance(by, dict) else None
    number = by.get("id") if isinstance(by, dict) else by
    return next(filter(None, [*metas, annotation.get("annotator"), address]), f"label-studio {number or ''}".strip())


def export_csv(store: Store, path: str | Path) -> int:
    """Writes a table with the columns task, text, label, annotator: a row an answer.

    A skip has no label, a task without an answer neither label nor annotator.

    Returns:
        The number of tasks.

    Raises:
        StorageError: it could not be written.
    """
    state, lines = store.state(), io.StringIO(newline="")
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(COLUMNS)
    for task in state.tasks:
        answers: dict[str, str | None] = dict(sorted(state.answers.get(task.task, {}).items()))
        for name, label in (answers or {"": None}).items():
            writer.writerow([task.task, task.text, label or "", name])
    storage.write_text(path, lines.getvalue())
    return len(state.tasks)


def import_csv(store: Store, path: str | Path) -> Imported:
    """Reads a table with the column text, and task, label and annotator where there are such.

    A text without its task's name is found by the text, and becomes a task if it is none; nothing is cleaned from it, and
    its hash is that of the text as given. A row without a label is a task without an answer, or with an annotator a skip; a
    label without an annotator is that of "import". What is an annotator's answer already is not written again.

    Raises:
        DataError: a table that cannot be read, unknown columns, or rows that cannot be used; then nothing is written.
        StorageError: the store could not be written.
    """
    from sodaops.data.sources import column_names, read_table  # pyarrow

    columns = column_names(str(path), ["text"], f"Expected are {', '.join(COLUMNS)}.")
    unknown = [name for name in columns if name not in COLUMNS]
    if unknown:
        named = ", ".join(name + nearest(name, COLUMNS) for name in unknown)
        raise DataError(f"{path}: unknown column {named}; expected are {', '.join(COLUMNS)}. Nothing was imported.")
    table = read_table(str(path), columns).to_pylist()
    rows = []
    for number, cells in enumerate(table, 1):
        task, text, label, annotator = (cells.get(name, "") for name in COLUMNS)
        rows.append(_Row(f"row {number}", task, text, label or None, annotator or (_NOBODY if label else None)))
    return _take(store, path, rows, [])


def _take(store: Store, path: str | Path, rows: Iterable[_Row], faults: list[str]) -> Imported:
    """Writes what the rows say, if each can be used and there are no faults already."""
    state = store.state()
    by_name = {task.task: task for task in state.tasks}
    known = {task.text: task.task for task in state.tasks} | {task.text_sha256: task.task for task in state.tasks}
    current = {(name, task): label for task, answers in state.answers.items() for name, label in answers.items()}
    fresh: dict[str, dict[str, Any]] = {}
    answers: list[tuple[str, str, str | None]] = []
    for row in rows:
        try:
            name = _check(row, by_name, store.labels)
        except DataError as error:
            faults.append(f"{row.place}: {error}")
            continue
        sha256 = hashlib.sha256(row.text.encode()).hexdigest()
        task = row.task or known.get(row.text) or known.get(sha256)
        if task is None:
            task = sha256[:16]
            fresh.setdefault(sha256, {"text": row.text, "text_sha256": sha256, "why": "import"})
        if name is not None and current.get((name, task), "") != row.label:
            current[name, task] = row.label
            answers.append((name, task, row.label))
    if faults:
        raise _refusal(path, faults)
    n_tasks = store.add_tasks(_batch_of(path), fresh.values()) if fresh else 0
    if answers:
        store.session(_NOBODY, source=f"import:{Path(path).name}").answer_all(answers)
    return Imported(n_tasks, len(answers))


def _batch_of(path: str | Path) -> str:
    """The name of the batch for a file's new tasks.

    >>> _batch_of("more/Zoë's texts.csv")
    'import-Zo_s_texts.csv'
    """
    return "import-" + re.sub(r"[^A-Za-z0-9.]+", "_", Path(path).name)[:40]


def _check(row: _Row, tasks: dict[str, Task], labels: Sequence[str]) -> str | None:
    """The annotator of a row that can be used."""
    check_text(row.text)
    if row.task:
        if row.task not in tasks:
            raise DataError(f"task={row.task!r} is not in the store; leave it empty, and the text tells which it is.")
        if tasks[row.task].text != row.text:
            raise DataError(f"task={row.task!r} has another text in the store; leave it empty for a new task.")
    if row.label is not None:
        check_label(row.label, labels)
    return None if row.annotator is None else check_annotator(row.annotator)


def _refusal(path: str | Path, faults: Sequence[str]) -> DataError:
    more = f"\n- and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
    lines = "\n- ".join(faults[:SHOWN])
    return DataError(f"{path}: {len(faults)} faults; nothing was imported.\n- {lines}{more}")
