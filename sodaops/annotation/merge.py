"""Writes accepted labels to a new raw table, without texts that are like one of the test split."""

import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock

from sodaops.annotation.store import Store
from sodaops.annotation.tasks import LABEL, Task
from sodaops.config.schema import DataConfig
from sodaops.data.preprocess import ensure_splits, read_split
from sodaops.data.rows import CORRECTIONS
from sodaops.data.sources import write_table
from sodaops.data.splits import SPLITS, text_hash
from sodaops.errors import DataError, some
from sodaops.io import storage
from sodaops.labels.check import NOT_COMPARABLE
from sodaops.tasks import SINGLE_LABEL
from sodaops.tasks.base import Task as MLTask
from sodaops.text.cleaning import cleaner
from sodaops.text.columns import clean_parts, named, split
from sodaops.text.near import NearTexts


@dataclass(frozen=True)
class MergeResult:
    """The rows that were written, and the texts that were not.

    Attributes:
        path: the new table; None: no rows, so no table.
        counts: label -> rows written.
        open: tasks without enough answers, or without agreement.
        tied: of these, tasks with enough answers.
        known: texts that are in the data already.
        empty: texts that are empty after cleaning.
        leaking: texts that are nearly the same as a test text, and that text.
        corrections: the table with other labels of texts in the data; None: no rows.
        suspected: outcome for such texts -> their number.
    """

    path: Path | None
    counts: dict[str, int]
    open: int
    tied: int
    known: int
    empty: int
    leaking: list[tuple[str, str]]
    corrections: Path | None = None
    suspected: Counter[str] = field(default_factory=Counter)

    def describe(self) -> str:
        """A few lines for the terminal."""
        counts = some([f"{label} {n}" for label, n in self.counts.items()], 20)
        lines = [f"{self.path}: {sum(self.counts.values()):,} rows ({counts})" if self.path else "nothing to merge"]
        for n, reason in (
            (self.open, "need more answers"),
            (self.tied, "of these have a tie; another annotator decides"),
            (self.known, "are in the data already"),
            (self.empty, "are empty after cleaning"),
            (len(self.leaking), "are nearly the same as a test text, and were refused"),
        ):
            if n:
                lines.append(f"{n:,} texts {reason}")
        if self.suspected:
            outcomes = ", ".join(f"{n:,} {outcome}" for outcome, n in self.suspected.items())
            lines.append(f"{self.corrections or 'suspected labels'}: {outcomes}")
        if self.suspected["corrected in test"]:
            lines.append(f"warning: {NOT_COMPARABLE}")
        lines += [f"  refused: {text[:60]!r} (test: {other[:60]!r})" for text, other in self.leaking[:5]]
        return "\n".join(lines)


def merge_answers(
    store: Store, data: DataConfig, splits_dir: Path, min_annotators: int, near: float, ml_task: MLTask = SINGLE_LABEL,
    with_test: bool = False,
) -> MergeResult:  # fmt: skip
    """Writes the labels on which annotators agree to new tables in ``data.added``: of new texts, and corrections of suspected
    labels, whose rows replace those with the same text.

    Args:
        store: with the answers.
        data: the data set that gets the rows; its labels, columns and cleaning are used.
        splits_dir: its splits; they are made again if they are out of date.
        min_annotators: the number of answers that a text needs.
        near: a text whose Jaccard similarity of character 5-grams to a test text is at least this is refused.
        ml_task: of the data set.
        with_test: correct labels of test rows too.

    Raises:
        DataError: another task, labels that the data do not have, or a data set without a folder for added tables.
        StorageError: the table could not be written.
    """
    if data.added is None:
        raise DataError(f"data.added is null, so new rows of {data.name} cannot be written; set it to a folder.")
    if type(ml_task) is not type(store.ml_task):
        raise DataError(f"{store.folder}: the store is for task={store.ml_task.name}, and {data.name} for task={ml_task.name}.")
    with storage.writing(splits_dir):
        splits_dir.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(splits_dir.parent / f".{splits_dir.name}.merge.lock")
    with lock:  # the next merge must see the rows of this one
        manifest = ensure_splits(data, splits_dir, ml_task)
        foreign = [label for label in store.labels if label not in manifest["labels"]]
        if foreign:
            expected = ", ".join(manifest["labels"])
            raise DataError(f"{store.folder}: {data.name} has no label {some(foreign)}; expected {expected}.")
        if len(store.text_columns) != len(data.text_columns):
            raise DataError(f"{store.folder}: texts of {some(store.text_columns)}; {data.name} has {some(data.text_columns)}.")
        result = _merge(store, data, Path(data.added), splits_dir, manifest["labels"], min_annotators, near, ml_task)
        return _correct(result, store, data, splits_dir, manifest["labels"], min_annotators, ml_task, with_test)


def _merge(
    store: Store, data: DataConfig, added: Path, splits_dir: Path, labels: Sequence[str], min_annotators: int, near: float,
    ml_task: MLTask,
) -> MergeResult:  # fmt: skip
    splits = {split: read_split(splits_dir, split)["text"].to_pylist() for split in SPLITS}
    known, near_test = {text for texts in splits.values() for text in texts}, NearTexts(splits["test"], near)
    known_hashes = {text_hash(text) for text in known}  # the store's texts may be redacted, their hashes are not
    state, rows, counts = store.state(), [], Counter[str]()
    n_known, n_empty, n_tied, n_open, leaking = 0, 0, 0, 0, []
    for task in (task for task in state.tasks if task.why != LABEL):
        answers = state.labels_of(task.task)
        label = ml_task.merged(list(answers.values()))
        cleaned = clean_parts(task.text, len(data.text_columns), cleaner(data.cleaning))
        if len(answers) < min_annotators or label is None:
            n_open += 1
            n_tied += len(answers) >= min_annotators and bool(answers)
        elif not cleaned:
            n_empty += 1
        elif cleaned in known or task.text_sha256 in known_hashes:
            n_known += 1
        elif (other := near_test.find(cleaned)) is not None:
            leaking.append((named(cleaned, data.text_columns), named(other, data.text_columns)))
        else:
            known.add(cleaned)
            label = ml_task.check_answer(label, labels)  # in the order of the data's labels
            counts[label] += 1
            rows.append(_row(task, answers, label, data, labels, ml_task))
    path = _write_rows(rows, added) if rows else None
    return MergeResult(path, dict(counts.most_common()), n_open, n_tied, n_known, n_empty, leaking)


def _correct(
    result: MergeResult, store: Store, data: DataConfig, splits_dir: Path, labels: Sequence[str], min_annotators: int,
    ml_task: MLTask, with_test: bool,
) -> MergeResult:  # fmt: skip
    """The result with a table of corrections, and beside it a manifest."""
    state, rows, outcomes = store.state(), [], Counter[str]()
    if not (tasks := [task for task in state.tasks if task.why == LABEL]):
        return result
    given = {row["text"]: {**row, "split": name} for name in SPLITS for row in read_split(splits_dir, name).to_pylist()}
    for task in tasks:
        answers, row = state.labels_of(task.task), given.get(task.text)
        label = ml_task.merged(list(answers.values())) if len(answers) >= min_annotators else None
        if label is None or row is None or label == row["label"]:
            outcomes["open or tied" if label is None else "no longer in the data" if row is None else "confirmed"] += 1
        elif row["split"] == "test" and not with_test:
            outcomes["in test and left as they are (labels.test=true corrects them)"] += 1
        else:
            outcomes[f"corrected in {row['split']}"] += 1
            slices = {name: row[f"slice_{name}"] for name in data.slice_columns}
            origin = {"source": "correction", "corrects": f"{row['source']} row {row['row']}", "label_before": row["label"]}
            rows.append({**_row(task, answers, label, data, labels, ml_task), **slices, **origin})
    path = _write_rows(rows, Path(data.added or ""), CORRECTIONS) if rows else None
    if path:
        warnings = [NOT_COMPARABLE] if outcomes["corrected in test"] else []
        storage.write_json(path.with_suffix(".json"), {"table": path.name, "outcomes": outcomes, "warnings": warnings})
    return replace(result, corrections=path, suspected=outcomes)


def _row(
    task: Task, answers: dict[str, str], label: str, data: DataConfig, labels: Sequence[str], ml_task: MLTask
) -> dict[str, Any]:
    votes, voted = Counter(answers.values()), labels if ml_task.takes_votes else ()
    texts = dict(zip(data.text_columns, split(task.text, len(data.text_columns)), strict=True))
    columns = data.vote_columns or {each: f"votes_{each}" for each in voted}
    return {
        "id": task.task, **texts, **ml_task.table_cells(label, data),
        **{columns[each]: votes[each] for each in voted}, **dict.fromkeys(data.slice_columns, ""),
        "source": "annotation", "why": task.why, "annotators": " ".join(sorted(answers)), "request_id": task.request_id or "",
    }  # fmt: skip


def _write_rows(rows: Sequence[dict[str, Any]], folder: Path, ending: str = ".csv") -> Path:
    name = f"{datetime.now(UTC):%Y-%m-%dT%H%M%SZ}-{secrets.token_hex(2)}"  # random: two merges of one second have two files
    path = folder / f"{name}{ending}"
    with storage.atomic_path(path) as temporary:
        write_table(pa.Table.from_pylist(list(rows)), temporary, "csv")
    return path
