"""Checks the labels of a table: a ranked page, CSV and summary of the suspected errors. Nothing here imports torch."""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from sodaops import pages
from sodaops.config.schema import Config
from sodaops.data.preprocess import ensure_splits
from sodaops.data.sources import write_table
from sodaops.data.splits import SPLITS
from sodaops.errors import ConfigError, DataError
from sodaops.io import remote, storage
from sodaops.labels.folds import out_of_fold
from sodaops.labels.ranking import Ranking, rank_labels, suspicious_slices
from sodaops.tasks.make import make_task
from sodaops.text.columns import join, split

PAGE, TABLE, SUMMARY = "labels.html", "labels.csv", "labels.json"
NOT_COMPARABLE = "With corrected labels of test rows, scores on test before and after the correction are not comparable."
_SHOWN = 200  # rows of the page


def check_labels(config: Config, train: Callable[[Config], Any]) -> dict[str, Any]:
    """Writes the suspected errors to ``labels.output_dir``; the page and the CSV have the users' texts.

    Args:
        config: the whole configuration.
        train: as for :func:`~sodaops.labels.folds.out_of_fold`.

    Returns:
        The content of labels.json.

    Raises:
        ConfigError: a task without one label per text, or a teacher.
        DataError: rows that cannot be read, or too few of a label.
        StorageError: a file could not be written.
    """
    task, columns = make_task(config.task), config.data.text_columns
    if not task.has_one_label:
        raise ConfigError(f"task={task.name}: its labels cannot be checked; expected task=single_label or task=ordinal.")
    if config.teachers:
        raise ConfigError("teacher: it may have learnt the labels that are checked; set teacher=null.")
    manifest = ensure_splits(config.data, config.splits_dir, task)
    rows, probs = out_of_fold(config, manifest, train)
    ranking = rank_labels(rows, probs, task.truth(rows), config.labels.near)
    suspected = np.any(list(ranking.contradicts.values()), axis=0)
    summary = {
        "data": {"name": manifest["name"], "fingerprint": manifest["fingerprint"]},
        "n_rows": {name: manifest["splits"][name]["n_rows"] for name in SPLITS},
        "n_suspected": dict.fromkeys(SPLITS, 0) | Counter(rows.filter(pa.array(suspected))["split"].to_pylist()),
        "reasons": {name: int(of.sum()) for name, of in ranking.contradicts.items()},
        "n_without_tokens": int(np.isnan(probs).any(1).sum()),
        "slices": suspicious_slices(rows, suspected),
        "warnings": [NOT_COMPARABLE] if config.labels.test else [],
    }
    order = np.argsort(np.where(suspected, -ranking.scores, 1), kind="stable")[: suspected.sum()]
    entries = [_entry(rows, probs, manifest["labels"], ranking, int(row), columns) for row in order]
    with remote.output_folder(config.labels.output_dir, (PAGE, TABLE, SUMMARY), SUMMARY, private=True) as folder:
        page = pages.render_page("labels", s=summary, entries=entries[:_SHOWN], columns=_text_names(columns))
        (folder / PAGE).write_text(page, encoding="utf-8")
        write_table(pa.Table.from_pylist(entries), folder / TABLE, "csv")
        storage.write_json(folder / SUMMARY, summary)
    return summary


def read_suspects(folder: str, manifest: Mapping[str, Any], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of labels.csv, highest score first; ``text`` is the cleaned text of all columns.

    Raises:
        DataError: there is none, or the splits are no longer those that were checked.
    """
    content = remote.read_if_exists(remote.join(folder, SUMMARY))
    if content is None or json.loads(content)["data"]["fingerprint"] != manifest["fingerprint"]:
        found = "no labels.json" if content is None else f"made from other rows than those of {manifest['name']} now"
        raise DataError(f"labels.output_dir={folder}: {found}; run `sodaops labels check` with the same keys.")
    csv.field_size_limit(2**31 - 1)  # data.max_chars may be more than csv's 131,072
    with open(remote.local_copy(remote.join(folder, TABLE)), encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield {**row, "text": join([row[name] for name in _text_names(columns)])}


def _text_names(columns: Sequence[str]) -> list[str]:
    return ["text"] if len(columns) == 1 else [f"text_{name}" for name in columns]


def _entry(
    rows: pa.Table, probs: np.ndarray, labels: Sequence[str], ranking: Ranking, place: int, columns: Sequence[str]
) -> dict[str, Any]:
    """A row of labels.csv."""
    row, why = rows.slice(place, 1).to_pylist()[0], []
    given = labels.index(row["label"])
    for reason, values in (("model", probs[place]), ("votes", row["votes"])):
        if ranking.contradicts[reason][place]:
            other = max((i for i in range(len(labels)) if i != given), key=values.__getitem__)
            why.append(f"{reason}: {labels[other]} {values[other]:.3g}, {labels[given]} {values[given]:.3g}")
    if (duplicate := int(ranking.duplicates[place])) >= 0:
        twin = rows.slice(duplicate, 1).to_pylist()[0]
        why.append(f"near duplicate: {twin['label']} in {twin['source']} row {twin['row']}")
    return {
        "score": round(float(ranking.scores[place]), 4), "split": row["split"], "table": row["source"], "row": row["row"],
        **dict(zip(_text_names(columns), split(row["text"], len(columns)), strict=True)),
        "label": row["label"], "suggested": labels[ranking.suggested[place]], "why": "; ".join(why),
    }  # fmt: skip
