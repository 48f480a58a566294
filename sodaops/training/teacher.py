"""What a model learns from teachers: their answers for the train rows and for texts without labels (``data.unlabelled``).

Rows of val and test, and texts that are like them, take no part. The answers are computed once, and kept beside the splits in
a file whose name is a hash of all that determines them.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from sodaops.bundle import layout
from sodaops.config.schema import Config
from sodaops.data.preprocess import read_split
from sodaops.data.splits import SPLITS
from sodaops.data.unlabelled import read_unlabelled, unlabelled_tables
from sodaops.errors import BundleError, ConfigError, some
from sodaops.inference.ensemble import Ensemble
from sodaops.io import storage
from sodaops.io.remote import local_copy
from sodaops.tasks.make import make_task
from sodaops.text import cleaning

log = logging.getLogger(__name__)
_CHUNK = 65_536  # texts whose answers are in memory before they are written
_FORMAT = 1


@dataclass(frozen=True)
class TeacherAnswers:
    """The mean answers of the teachers."""

    texts: list[str]  # without labels, cleaned
    probs: np.ndarray  # float32 [n_train + n_texts, n_labels], NaN for a text without tokens; train rows first
    record: dict[str, Any]  # for the bundle's data manifest

    def summary(self) -> str:
        """A line of text: how many texts without labels are learnt from, and why others are not."""
        dropped = "".join(f", {n:,} left out ({reason})" for reason, n in self.record["dropped"].items())
        return f"teacher: {some(self.record['teachers'])}; texts without labels: {len(self.texts):,}{dropped}"


def check_teacher(config: Config, name: str, folder: Path, labels: Sequence[str] | None = None) -> layout.BundleInfo:
    """Checks that a bundle can teach the configured model.

    Args:
        config: of the model.
        name: of the bundle, as in ``teacher``.
        folder: its files.
        labels: of the splits; None: those of ``data.labels``, if any.

    Raises:
        BundleError: missing or damaged, or without the ONNX model float32.
        ConfigError: another task, labels, text columns or cleaning.
    """
    info = layout.read_info(folder)
    if "float32" not in info.onnx:
        raise BundleError(f"teacher={name}: has no ONNX model float32; make one with `sodaops export {name}`.")
    if labels is None and config.data.labels is not None:
        labels = [str(label) for label in config.data.labels]
    pairs = {
        "task": (layout.task_of(folder, info).name, make_task(config.task).name),
        "labels": (info.labels, info.labels if labels is None else list(labels)),
        "data.text_column": (len(info.text_columns), len(config.data.text_columns)),
        "data.cleaning": (info.cleaning, config.data.cleaning),
    }
    faults = [f"{key} is {theirs}, here {ours}" for key, (theirs, ours) in pairs.items() if theirs != ours]
    if faults:
        raise ConfigError(f"teacher={name}: its {'; its '.join(faults)}. Give one that was trained for the same task.")
    return info


def _check_held_out(name: str, folder: Path, info: layout.BundleInfo, manifest: Mapping[str, Any]) -> None:
    """Refuses a teacher that may have been trained on val or test rows."""
    theirs = layout.read_json(folder, info, layout.DATA)
    hashes = [[of["splits"][split]["sha256"] for split in ("val", "test")] for of in (theirs, manifest)]
    if hashes[0] == hashes[1]:
        return
    tables = [{source["sha256"] for source in of["sources"]} for of in (theirs, manifest)]
    if tables[0] & tables[1]:
        raise ConfigError(
            f"teacher={name}: trained on other splits of the same table, so it may know rows of val or test; train it with the "
            "same data.fractions, data.max_rows and data.cleaning."
        )
    log.warning("teacher=%s: trained on other tables; make sure that they have no rows of this val and test split", name)


def teacher_answers(config: Config, manifest: Mapping[str, Any], folders: Sequence[Path]) -> TeacherAnswers | None:
    """The answers of ``teacher``; None without one. Only one process computes them; others wait for it.

    Args:
        config: the whole configuration.
        manifest: of the splits.
        folders: local copies of the teachers' bundles.

    Raises:
        BundleError, ConfigError: a teacher cannot be read or used, or it was changed meanwhile.
        DataError: ``data.unlabelled`` cannot be read.
        StorageError: the answers cannot be written.
    """
    if not folders:
        return None
    ids = []
    for name, folder in zip(config.teachers, folders, strict=True):
        info = check_teacher(config, name, folder, manifest["labels"])
        _check_held_out(name, folder, info, manifest)
        ids.append(info.bundle_id)
    tables = {path: storage.sha256_of(local_copy(path)) for path in unlabelled_tables(config.data)}
    splits = [manifest["splits"][split]["sha256"] for split in SPLITS]
    cleaned = [config.data.cleaning, cleaning.code_of(config.data.cleaning), config.data.text_columns, config.data.max_chars]
    key = storage.sha256_of_json([_FORMAT, ids, splits, sorted(tables.values()), cleaned, config.distill.near])
    path = config.splits_dir.parent / f".{config.splits_dir.name}.teacher" / f"{key}.parquet"
    with storage.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock"))
    with lock:
        if not path.is_file():
            _write_answers(path, config, folders, ids)
    table = pq.read_table(path)
    texts = [text for text in table["text"].to_pylist() if text is not None]
    probs = np.stack(table["probs"].to_numpy()).astype(np.float32)
    dropped = json.loads(table.schema.metadata[b"dropped"])
    record = {"teachers": ids, "n_unlabelled": len(texts), "dropped": dropped, "unlabelled": tables}
    return TeacherAnswers(texts, probs, record)


def _write_answers(path: Path, config: Config, folders: Sequence[Path], ids: Sequence[str]) -> None:
    """Computes the answers, and writes columns text, null for train rows, and probs."""
    teachers = Ensemble(folders, "float32")
    if teachers.ids != list(ids):
        raise BundleError(f"teacher={some(config.teachers)}: was changed meanwhile; start again.")
    splits = {split: read_split(config.splits_dir, split)["text"].to_pylist() for split in SPLITS}
    texts, dropped = read_unlabelled(config.data, splits, config.distill.near)
    rows = [(text, None) for text in splits["train"]] + [(text, text) for text in texts]
    schema = pa.schema({"text": pa.string(), "probs": pa.list_(pa.float32())}, {"dropped": json.dumps(dropped)})
    log.info("answers of %s for %s texts", some(config.teachers), f"{len(rows):,}")
    with storage.atomic_path(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for start in range(0, len(rows), _CHUNK):
            chunk = rows[start : start + _CHUNK]
            probs = teachers.probs_of_cleaned([text for text, _ in chunk])
            writer.write_table(pa.table([[shown for _, shown in chunk], list(probs)], schema=schema))
