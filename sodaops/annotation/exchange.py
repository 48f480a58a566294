"""Exports tasks and answers to Label Studio's JSON and to CSV, and imports them from there and from other tables."""

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sodaops.annotation.label_studio import (
    LABEL,
    TEXT,
    ImportedRow,
    ImportKeys,
    flat_rows,
    is_flat,
    json_rows,
    label_studio_task,
    labeling_config,
)
from sodaops.annotation.state import AnnotationState
from sodaops.annotation.store import Store
from sodaops.annotation.tasks import Task, check_annotator, check_text, normal_form
from sodaops.config.schema import table_format
from sodaops.errors import SHOWN, DataError, nearest
from sodaops.io import storage
from sodaops.text.columns import join, split

if TYPE_CHECKING:
    from sodaops.data.sources import Layout

_ANY = ImportKeys()
_NONE = "[]"  # in a table: an answer, but no label
_NOT_ANSWERED = "\0"  # no answer
_IMPORTER = "import"  # the annotator of labels for which the file names none


class ImportResult(NamedTuple):
    """The numbers of new tasks and of new answers."""

    n_tasks: int
    n_answers: int


class Import(NamedTuple):
    """What a file adds to a store; nothing is written yet."""

    path: str
    tasks: list[dict[str, Any]]
    answers: list[tuple[str, str, str | None]]  # annotator, task, label

    def write(self, store: Store) -> ImportResult:
        """Adds tasks and answers to the store whose state was read.

        Raises:
            StorageError: the store could not be written.
        """
        n_tasks = store.add_tasks(_batch_of(self.path), self.tasks) if self.tasks else 0
        if self.answers:
            store.session(_IMPORTER, source=f"import:{Path(self.path).name}").answer_all(self.answers)
        return ImportResult(n_tasks, len(self.answers))


def export_file(store: Store, path: str | Path) -> int:
    """Writes all tasks and answers to a file for Label Studio (.json), or to a table (.csv).

    **Label Studio.** The labeling config is written beside it, with the ending .xml. The model's label becomes a prediction, an
    answer an annotation, a skip a cancelled annotation. Label Studio refuses a ``completed_by`` who is no member of its
    project, so the annotator's name is in the result's ``meta``, which it keeps.

    **Table.** One row for each answer, with the columns task, text (or its parts), label, annotator. A skip has no label, and
    the answer that no label fits is []; a task without an answer has neither label nor annotator.

    Returns:
        The number of tasks.

    Raises:
        DataError: a name with another ending.
        StorageError: a file could not be written.
    """
    state, path = store.state(), Path(path)
    ending = path.suffix.lower()
    if ending == ".json":
        config = labeling_config(store.labels, store.ml_task.question, store.text_columns)
        storage.write_text(path.with_suffix(".xml"), config)
        storage.write_json(path, [label_studio_task(state, task) for task in state.tasks])
    elif ending == ".csv":
        storage.write_text(path, _csv_text(state))
    else:
        raise DataError(f"{path}: expected a name that ends in .json (Label Studio) or .csv.")
    return len(state.tasks)


def import_file(store: Store, path: str | Path) -> ImportResult:
    """Reads a file as :func:`read_import` does, and adds its texts and answers to a store."""
    return read_import(path, store.state()).write(store)


def read_import(
    path: str | Path,
    state: AnnotationState,
    keys: ImportKeys = _ANY,
    label_map: Mapping[Any, str] | None = None,
    layout: "Layout | None" = None,
) -> Import:
    """Reads texts and answers from Label Studio's export (.json, .csv), or from a table (.csv, .tsv, .jsonl, .parquet).

    **Label Studio.** Texts become tasks, annotations answers, cancelled annotations skips; predictions are not read. The
    annotator is the name that :func:`export_file` wrote, else the e-mail address, else ``label-studio NUMBER``.

    **Table.** It has the column text, and may have task, label and annotator. A row without a label is a task without an
    answer, or with an annotator a skip. A label without an annotator is by ``import``.

    A text that is no task yet becomes one, by the hash of the text as given. Texts that differ only in their Unicode normal
    form are one task. An answer that an annotator gave before is not written again.

    Args:
        path: the file.
        state: of the store that it is for.
        keys: the names of the text and the label in the file.
        label_map: value in the file -> label.
        layout: delimiter and encoding of a text table; None: detected.

    Raises:
        DataError: a file that cannot be read, or rows that are not valid.
    """
    faults: list[str] = []
    kind = state.ml_task.question["kind"]
    keys = keys._replace(text_columns=state.text_columns)
    if table_format(str(path)) is not None:
        rows = _table_rows(path, keys, layout, kind)
    elif Path(path).suffix.lower() == ".json":
        rows = _in_file(path, lambda: list(json_rows(_read_json(path), keys, kind, faults)))
    else:
        raise DataError(f"{path}: expected a name that ends in .json or .csv (Label Studio), .tsv, .jsonl or .parquet.")
    mapping = {str(value): label for value, label in (label_map or {}).items()}
    rows = [row._replace(label=_mapped(row.label, mapping)) for row in rows]
    return _plan(path, state, rows, faults)


def _csv_text(state: AnnotationState) -> str:
    lines = io.StringIO(newline="")
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(["task", *state.text_columns, "label", "annotator"])
    for task in state.tasks:
        answers: dict[str, str | None] = dict(sorted(state.answers.get(task.task, {}).items()))
        for name, label in (answers or {"": None}).items():
            texts = split(task.text, len(state.text_columns))
            writer.writerow([task.task, *texts, _NONE if label == "" else label or "", name])
    return lines.getvalue()


def _read_json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise DataError("no such file.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"not readable as JSON ({error}); in Label Studio, export as JSON.") from None


def _in_file(path: str | Path, read: Callable[[], list[ImportedRow]]) -> list[ImportedRow]:
    try:
        return read()
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _mapped(label: Any, mapping: Mapping[str, str]) -> Any:
    if isinstance(label, list):
        return [_mapped(one, mapping) for one in label]
    return mapping.get(label, label) if isinstance(label, str) else label


def _table_rows(path: str | Path, keys: ImportKeys, layout: "Layout | None", kind: str) -> list[ImportedRow]:
    from sodaops.data.sources import DETECTED, open_table, read_table  # pyarrow

    layout = layout or DETECTED
    columns = open_table(str(path), [], layout).names
    if is_flat(columns):
        rows = read_table(str(path), columns, layout).to_pylist()
        return _in_file(path, lambda: list(flat_rows(rows, columns, keys, "row")))
    several = len(keys.text_columns) > 1
    texts, label = keys.text_columns if several else [keys.text or TEXT], keys.label or LABEL
    expected = ("task", *texts, label, "annotator")
    open_table(str(path), [*texts, *([label] if keys.label else [])], layout, f"Expected are {', '.join(expected)}.")
    unknown = [name + nearest(name, expected) for name in columns if name not in expected]
    if unknown and keys[:2] == _ANY[:2]:
        raise DataError(
            f"{path}: unknown column {', '.join(unknown)}; expected {', '.join(expected)}. Nothing was imported. Name the "
            "columns with annotate.text_key and annotate.label_key; the others are then left out."
        )
    rows = []
    lists = [label] if kind == "choices" else []
    table = read_table(str(path), [name for name in columns if name in expected], layout, lists)
    for number, cells in enumerate(table.to_pylist(), 1):
        task, *text_cells, label_cell, annotator = (cells.get(name) or "" for name in expected)
        name = annotator or (_IMPORTER if label_cell else None)
        answer = _list_of(label_cell) if lists else label_cell
        rows.append(ImportedRow(f"row {number}", task, join(text_cells), answer if label_cell else None, name))
    return rows


def _list_of(cell: str) -> Any:
    """The list in a cell with JSON; any other cell as it is."""
    try:
        value = json.loads(cell) if cell.startswith("[") else cell
    except (ValueError, RecursionError):
        return cell
    return value if isinstance(value, list) else cell


def _plan(path: str | Path, state: AnnotationState, rows: Iterable[ImportedRow], faults: list[str]) -> Import:
    """Finds the tasks and answers that are new, if all rows are valid and the file had no faults."""
    tasks = {task.task: task for task in state.tasks}
    task_of_text = {normal_form(task.text): task.task for task in state.tasks}
    task_of_text |= {task.text_sha256: task.task for task in state.tasks}
    current = {(name, task): label for task, answers in state.answers.items() for name, label in answers.items()}
    new_tasks: list[dict[str, Any]] = []
    new_answers: list[tuple[str, str, str | None]] = []
    for row in rows:
        try:
            annotator, label = _check_row(row, tasks, state)
        except DataError as error:
            faults.append(f"{row.position}: {error}")
            continue
        text, sha256 = normal_form(row.text), hashlib.sha256(row.text.encode()).hexdigest()
        task = row.task or task_of_text.get(text) or task_of_text.get(sha256)
        if task is None:
            task = task_of_text[text] = sha256[:16]
            new_tasks.append({"text": row.text, "text_sha256": sha256, "why": "import"})
        if annotator is not None and current.get((annotator, task), _NOT_ANSWERED) != label:
            current[annotator, task] = label
            new_answers.append((annotator, task, label))
    if faults:
        raise _all_faults(path, faults)
    return Import(str(path), new_tasks, new_answers)


def _batch_of(path: str | Path) -> str:
    """The name of the batch for a file's new tasks.

    >>> _batch_of("more/Zoë's texts.csv")
    'import-Zo_s_texts.csv'
    """
    return "import-" + re.sub(r"[^A-Za-z0-9.]+", "_", Path(path).name)[:40]


def _check_row(row: ImportedRow, tasks: dict[str, Task], state: AnnotationState) -> tuple[str | None, str | None]:
    """Refuses a row that is not valid, and returns the name of its annotator and the answer as the store keeps it."""
    check_text(row.text)
    if row.task:
        if row.task not in tasks:
            raise DataError(f"task={row.task!r} is not in the store; leave it empty to find the task by its text.")
        if tasks[row.task].text != row.text:
            raise DataError(f"task={row.task!r} has another text in the store; leave it empty for a new task.")
    label = [] if row.label == _NONE else row.label
    if label is not None:
        same = next((each for each in state.labels if _spelling(each) == _spelling(row.label)), None)
        if row.label not in state.labels and same is not None:
            merged = f"'data.label_map={{{row.label}: {same}}}'"
            raise DataError(f"label={row.label!r}; the store has {same!r}. Merge them with {merged}.")
        label = state.ml_task.check_answer(label, state.labels)
    return None if row.annotator is None else check_annotator(row.annotator), label


def _spelling(label: Any) -> str:
    """What is left of a label without its case, its Unicode normal form and white space around it."""
    return normal_form(str(label)).casefold().strip()


def _all_faults(path: str | Path, faults: Sequence[str]) -> DataError:
    more = f"\n- and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
    lines = "\n- ".join(faults[:SHOWN])
    return DataError(f"{path}: {len(faults)} fault{'s' if len(faults) > 1 else ''}; nothing was imported.\n- {lines}{more}")
