"""From accepted labels to a new raw table, from which nothing leaks into the test split."""

import re
import secrets
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock

from sodaops.annotation.agreement import majority
from sodaops.annotation.store import Store
from sodaops.annotation.tasks import Task
from sodaops.config.schema import DataConfig
from sodaops.data.preprocess import ensure_splits, read_split
from sodaops.data.sources import write_table
from sodaops.data.splits import SPLITS, text_hash
from sodaops.errors import DataError, some
from sodaops.io import storage
from sodaops.text.cleaning import clean

_SHINGLE = 5
_NOT_WORD = re.compile(r"[\W_]+")


@dataclass(frozen=True)
class Merged:
    """What became of the labels.

    Attributes:
        path: of the new table; None: there was nothing to write.
        counts: label -> rows written.
        open: tasks without a label that enough annotators agree on.
        tied: of those, tasks whose annotators are divided.
        known: texts that the data have already.
        empty: texts of which cleaning leaves nothing.
        leaking: texts that are nearly one of test's, and which.
    """

    path: Path | None
    counts: dict[str, int]
    open: int
    tied: int
    known: int
    empty: int
    leaking: list[tuple[str, str]]

    def describe(self) -> str:
        """A few lines for a person."""
        shown = ", ".join(f"{label} {n}" for label, n in self.counts.items())
        lines = [f"{self.path}: {sum(self.counts.values()):,} rows ({shown})" if self.path else "nothing to merge"]
        for n, said in (
            (self.open, "wait for more answers"),
            (self.tied, "of these have annotators who are divided; another opinion decides"),
            (self.known, "are in the data already"),
            (self.empty, "are empty after cleaning"),
            (len(self.leaking), "are nearly a text of the test split, and refused"),
        ):
            if n:
                lines.append(f"{n:,} texts {said}")
        lines += [f"  refused: {text[:60]!r} (test: {other[:60]!r})" for text, other in self.leaking[:5]]
        return "\n".join(lines)


def merge(store: Store, data: DataConfig, splits_dir: Path, min_annotators: int, near: float) -> Merged:
    """Writes the labels that annotators agree on to a new table in ``data.added``, texts that are in the data left out.

    Args:
        store: with the answers.
        data: the data set that the rows are for; its labels, columns and cleaning.
        splits_dir: its splits; made anew where they are stale.
        min_annotators: with fewer answers, a text waits.
        near: Jaccard similarity of character 5-grams from which on a text is refused as one of test's.

    Raises:
        DataError: labels that the data do not have, or a data set without a folder for added tables.
        StorageError: the table could not be written.
    """
    if data.added is None:
        raise DataError(f"data.added is null, so there is no place for new rows of {data.name}; name a folder.")
    with storage.writing(splits_dir):
        splits_dir.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(splits_dir.parent / f".{splits_dir.name}.merge.lock")
    with lock:  # a second merge must see the rows of the first
        return _merge(store, data, data.added, splits_dir, min_annotators, near)


def _merge(store: Store, data: DataConfig, added: str, splits_dir: Path, min_annotators: int, near: float) -> Merged:
    manifest = ensure_splits(data, splits_dir)
    foreign = [label for label in store.labels if label not in manifest["labels"]]
    if foreign:
        raise DataError(f"{store.folder}: label {some(foreign)} is none of {data.name}'s: {', '.join(manifest['labels'])}.")
    splits = {split: read_split(splits_dir, split)["text"].to_pylist() for split in SPLITS}
    known, near_test = {text for texts in splits.values() for text in texts}, NearTexts(splits["test"], near)
    digests = {text_hash(text) for text in known}  # of texts as they were asked; the store's may be redacted
    state, rows = store.state(), []
    counts: Counter[str] = Counter()
    n_known, n_empty, tied, waiting, leaking = 0, 0, 0, 0, []
    for task in state.tasks:
        answers = state.labels_of(task.task)
        label = majority(list(answers.values()))
        cleaned = clean(task.text, data.cleaning)
        if len(answers) < min_annotators or label is None:
            waiting += 1
            tied += len(answers) >= min_annotators and bool(answers)
        elif not cleaned:
            n_empty += 1
        elif cleaned in known or task.text_sha256 in digests:
            n_known += 1
        elif (other := near_test.find(cleaned)) is not None:
            leaking.append((cleaned, other))
        else:
            known.add(cleaned)
            rows.append(_row(task, answers, label, data, manifest["labels"]))
            counts[label] += 1
    path = _write(rows, Path(added)) if rows else None
    return Merged(path, dict(counts.most_common()), waiting, tied, n_known, n_empty, leaking)


class NearTexts:
    """Finds the text of a set that another text nearly is: the same words with small changes.

    Args:
        texts: the set.
        near: Jaccard similarity of the sets of character 5-grams, letters and digits of lower case alone.
    """

    def __init__(self, texts: Sequence[str], near: float) -> None:
        self._texts, self._near = texts, near
        self._sizes, self._holders = [], defaultdict(list)
        for place, text in enumerate(texts):
            shingles = _shingles(text)
            self._sizes.append(len(shingles))
            for shingle in shingles:
                self._holders[shingle].append(place)

    def find(self, text: str) -> str | None:
        """The nearest such text, or None.

        >>> NearTexts(["the train is late again", "I love this"], 0.7).find("The train is late again!!")
        'the train is late again'
        >>> NearTexts(["the train is late again"], 0.7).find("the plane is late again") is None
        True
        """
        shingles = _shingles(text)
        shared = Counter(place for shingle in shingles for place in self._holders.get(shingle, ()))
        found = [(n / (len(shingles) + self._sizes[place] - n), place) for place, n in shared.items()]
        similarity, place = max(found, default=(0.0, -1))
        return self._texts[place] if place >= 0 and similarity >= self._near else None


def _shingles(text: str) -> set[str]:
    padded = f" {_NOT_WORD.sub(' ', text.lower()).strip() or text} "
    return {padded[i : i + _SHINGLE] for i in range(max(1, len(padded) - _SHINGLE + 1))}


def _row(task: Task, answers: dict[str, str], label: str, data: DataConfig, labels: Sequence[str]) -> dict[str, Any]:
    votes = Counter(answers.values())
    columns = data.vote_columns or {each: f"votes_{each}" for each in labels}
    return {
        "id": task.task, data.text_column: task.text, data.label_column: label,
        **{columns[each]: votes[each] for each in labels}, **dict.fromkeys(data.slice_columns, ""),
        "source": "annotation", "why": task.why, "annotators": " ".join(sorted(answers)), "request_id": task.request_id or "",
    }  # fmt: skip


def _write(rows: Sequence[dict[str, Any]], folder: Path) -> Path:
    path = folder / f"{datetime.now(UTC):%Y-%m-%dT%H%M%SZ}-{secrets.token_hex(2)}.csv"  # two at once stay two
    with storage.atomic_path(path) as temporary:
        write_table(pa.Table.from_pylist(list(rows)), temporary, "csv")
    return path
