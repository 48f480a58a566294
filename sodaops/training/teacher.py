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
    embeddings: np.ndarray | None  # float32 [n_train + n_texts, width], likewise; only with distill.hidden
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
        raise BundleError(f"{name}: has no ONNX model float32; make one with `sodaops export {name}`.")
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


def _check_held_out(config: Config, name: str, folder: Path, info: layout.BundleInfo, manifest: Mapping[str, Any]) -> None:
    """Refuses a teacher that may have been trained on val or test rows."""
    theirs = layout.read_json(folder, info, layout.DATA)
    fractions = layout.read_config(folder, info).get("data", {}).get("fractions")
    # Rows of added tables change val, but are new to the teacher.
    if theirs["splits"]["test"]["sha256"] == manifest["splits"]["test"]["sha256"] and fractions == config.data.fractions:
        return
    tables = [{source["sha256"] for source in of["sources"]} for of in (theirs, manifest)]
    if tables[0] & tables[1]:
        raise ConfigError(
            f"teacher={name}: trained on other splits of the same table, so it may know rows of val or test; train it with the "
            "same data.fractions, data.max_rows and data.cleaning."
        )
    log.warning("teacher=%s: trained on other tables; make sure that they have no rows of this val and test split", name)


def teacher_answers(
    config: Config, manifest: Mapping[str, Any], folders: Sequence[Path], width: int | None = None
) -> TeacherAnswers | None:
    """The answers of ``teacher``; None without one. Only one process computes them; others wait for it.

    Args:
        config: the whole configuration.
        manifest: of the splits.
        folders: local copies of the teachers' bundles.
        width: the size of the model's embeddings, for ``distill.hidden``; None: not checked.

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
        _check_held_out(config, name, folder, info, manifest)
        ids.append(info.bundle_id)
    tables = {path: storage.sha256_of(local_copy(path)) for path in unlabelled_tables(config.data)}
    path = _file_of_answers(config, manifest, ids, list(tables.values()))
    with storage.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock"))
    with lock:
        if not path.is_file():
            _write_answers(path, config, folders, ids, width)
    table = pq.read_table(path)
    texts = [text for text in table["text"].to_pylist() if text is not None]
    probs, *embeddings = (np.stack(table[name].to_numpy()).astype(np.float32) for name in table.column_names[1:])
    if embeddings:
        _check_widths(config, [embeddings[0].shape[1]], width)
    dropped = json.loads(table.schema.metadata[b"dropped"])
    unlabelled = [{"path": path, "sha256": digest} for path, digest in tables.items()]
    record = {"teachers": ids, "n_unlabelled": len(texts), "dropped": dropped, "unlabelled": unlabelled}
    return TeacherAnswers(texts, probs, embeddings[0] if embeddings else None, record)


def _file_of_answers(config: Config, manifest: Mapping[str, Any], ids: Sequence[str], tables: Sequence[str]) -> Path:
    """The file for answers of these bundles, by id, on the splits and on tables of texts, by hash."""
    data, settings = config.data, [config.distill.near, config.distill.hidden > 0]
    splits = [manifest["splits"][split]["sha256"] for split in SPLITS]
    cleaned = [data.cleaning, cleaning.code_of(data.cleaning), data.text_columns, data.max_chars, data.delimiter, data.encoding]
    key = storage.sha256_of_json([_FORMAT, list(ids), splits, sorted(tables), cleaned, settings])
    return config.splits_dir.parent / f".{config.splits_dir.name}.teacher" / f"{key}.parquet"


def _check_widths(config: Config, widths: Sequence[int], width: int | None) -> None:
    """Refuses ``distill.hidden`` for teachers whose embeddings have another size than the model's."""
    sizes = {*widths} | ({width} if width is not None else set())
    if len(sizes) > 1:
        raise ConfigError(
            f"distill.hidden={config.distill.hidden:g}: embeddings of the model and its teachers have {some(sorted(sizes))} "
            "numbers; set distill.hidden=0."
        )


def _write_answers(path: Path, config: Config, folders: Sequence[Path], ids: Sequence[str], width: int | None) -> None:
    """Computes the answers, and writes columns text, null for train rows, probs and, if they are needed, embeddings."""
    teachers = Ensemble(folders, "float32")
    if teachers.ids != list(ids):
        raise BundleError(f"teacher={some(config.teachers)}: was changed meanwhile; start again.")
    names = ["probs", *(["embeddings"] if config.distill.hidden else [])]
    if config.distill.hidden:
        _check_widths(config, teachers.widths, width)
    splits = {split: read_split(config.splits_dir, split)["text"].to_pylist() for split in SPLITS}
    texts, dropped = read_unlabelled(config.data, splits, config.distill.near)
    rows = [(text, None) for text in splits["train"]] + [(text, text) for text in texts]
    fields = {"text": pa.string(), **dict.fromkeys(names, pa.list_(pa.float32()))}
    schema = pa.schema(fields, {"dropped": json.dumps(dropped)})
    log.info("answers of %s for %s texts", some(config.teachers), f"{len(rows):,}")
    with storage.atomic_path(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for start in range(0, len(rows), _CHUNK):
            chunk = rows[start : start + _CHUNK]
            cleaned = [text for text, _ in chunk]
            outputs = teachers.outputs_of_cleaned(cleaned) if len(names) > 1 else (teachers.probs_of_cleaned(cleaned),)
            writer.write_table(pa.table([[shown for _, shown in chunk], *map(list, outputs)], schema=schema))
