"""From a raw table to Parquet splits and a manifest, which lists the sources, the splits and the dropped rows."""

import inspect
import json
import logging
import os
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from sodaops.config.schema import DataConfig, table_format
from sodaops.data import cells, parts
from sodaops.data.parts import Part, split_batch
from sodaops.data.rows import Rows, assign_splits, read_rows, select_rows
from sodaops.data.sources import Layout, open_table, read_batches
from sodaops.data.split_files import write_splits
from sodaops.data.splits import SPLITS
from sodaops.data.user_source import read_source
from sodaops.data.work_folder import work_folder
from sodaops.data.workers import make_parts
from sodaops.errors import DataError, some
from sodaops.io import storage
from sodaops.io.progress import progress
from sodaops.io.remote import local_copy
from sodaops.tasks.base import Targets, Task
from sodaops.tasks.make import SINGLE_LABEL
from sodaops.text import bulk_cleaning, cleaning, columns, policies

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
FORMAT = 2  # increase it when the same table would give other splits, which makes existing splits stale
_LATER_KEYS = ("delimiter", "encoding", "source")  # without a value the splits are those of earlier versions
# The modules that determine the content of a part.
PART_CODE = (bulk_cleaning, cells, cleaning, columns, parts, policies)
_RARE = 5  # a label with fewer rows may be a typing error
# Keys that do not change the content of the splits.
_UNUSED_KEYS = {"name", "path", "files", "watch", "added", "ray", "unlabelled"}


def preprocess(
    config: DataConfig, splits_dir: str | Path, known: Mapping[str, str] | None = None, task: Task = SINGLE_LABEL
) -> dict[str, Any]:
    """Writes train.parquet, val.parquet, test.parquet and manifest.json to ``splits_dir``, all or none.

    The splits have the columns source, row (int64, from 1), text (cleaned; several columns are joined, see
    :mod:`sodaops.text.columns`), label and what else the task needs, such as label_id (int32), votes (list<int64> in label
    order, null without votes) and slice_NAME for each slice column.

    Args:
        config: conf/data.
        splits_dir: the folder to write to.
        known: name of ``data.source`` -> SHA-256, if it was read just before.
        task: reads the targets.

    Returns:
        The manifest.

    Raises:
        DataError: an unreadable table or source, or invalid rows.
        StorageError: the splits could not be written.
    """
    sources = _sources(config)
    digests = _digests(config, sources, known or {}, task)
    current = _fingerprint(config, sources, digests, task)
    with work_folder(splits_dir, _parts_fingerprint(current, task)) as work:
        finished = _make_parts(config, sources, digests, work, task)
        targets, rows = read_rows(config, sources, finished, task)
        kept, dropped = select_rows(rows, targets.columns["label"].to_pylist(), config)
        split = np.where(kept, assign_splits(rows, config), np.int8(-1))
        _check_labels_per_split(rows, split, targets, config, task)
        split_info = write_splits(work, finished, rows.label_id, split, targets, config, task)
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "name": config.name,
            "fingerprint": current,
            "cleaning": config.cleaning,
            **({"text_columns": config.text_columns} if len(config.text_columns) > 1 else {}),
            "labels": targets.labels,
            **({"task": task.splits_section()} if task.section() else {}),
            "slice_columns": config.slice_columns,
            "sources": [{"path": path, "sha256": digests[path]} for path in dict.fromkeys(sources.values())],
            **({"source": config.source} if config.source is not None else {}),
            "n_read": len(split),
            "n_kept": int(kept.sum()),
            "dropped": dropped,
            "splits": split_info,
            "added": _added_rows(config, rows, split),
        }
        _warn_of_another_table(Path(splits_dir), manifest)
        with storage.atomic_folder(splits_dir, [MANIFEST, *(f"{name}.parquet" for name in SPLITS)]) as folder:
            for name in SPLITS:
                os.replace(work / f"{name}.parquet", folder / f"{name}.parquet")
                manifest["splits"][name]["sha256"] = storage.sha256_of(folder / f"{name}.parquet")
            (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return manifest


def summarize_manifest(manifest: dict[str, Any]) -> str:
    """A few lines of text: rows read and dropped, the splits, the labels, and labels that look like typing errors."""
    dropped = "".join(f", {entry['n_rows']:,} dropped ({why.replace('_', ' ')})" for why, entry in manifest["dropped"].items())
    splits = ", ".join(f"{split} {entry['n_rows']:,}" for split, entry in manifest["splits"].items())
    counts = {label: sum(part["labels"][label] for part in manifest["splits"].values()) for label in manifest["labels"]}
    labels = some([f"{label} {count:,}" for label, count in counts.items()], shown=20)
    added = sum(n for of in manifest.get("added", {}).values() for n in of.values())
    dropped += f", {added:,} of them from {len(manifest['added'])} added tables" if added else ""
    lines = [f"{manifest['name']}: {manifest['n_read']:,} rows read{dropped}; {splits}", f"labels: {labels}"]
    rare = [label for label, count in counts.items() if count < _RARE]
    if rare:
        lines.append(
            f"note: fewer than {_RARE} rows have label {some(rare)}; if it is a typing error, list the labels in data.labels"
        )
    return "\n".join(lines)


def ensure_splits(config: DataConfig, splits_dir: str | Path, task: Task = SINGLE_LABEL) -> dict[str, Any]:
    """Makes the splits unless they are up to date, and returns their manifest.

    Only one process makes them; others wait for it.
    """
    splits_dir = Path(splits_dir)
    sources = _sources(config)
    digests = _digests(config, sources, {}, task)
    current = _fingerprint(config, sources, digests, task)
    if (manifest := _manifest_if_current(splits_dir, current)) is not None:
        return manifest
    with storage.writing(splits_dir):
        splits_dir.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(splits_dir.parent / f".{splits_dir.name}.lock")
    with lock:
        return _manifest_if_current(splits_dir, current) or preprocess(config, splits_dir, digests, task)


def read_manifest(splits_dir: str | Path) -> dict[str, Any]:
    """The manifest of finished splits.

    Raises:
        DataError: there is none, or it is unreadable.
    """
    manifest = _manifest_or_none(Path(splits_dir))
    if manifest is None:
        raise DataError(f"{splits_dir}: no readable {MANIFEST}; run `sodaops preprocess` to make the splits.")
    return manifest


def read_split(splits_dir: str | Path, split: str) -> pa.Table:
    """Reads a split and checks its hash.

    Raises:
        DataError: the split is missing, or it differs from the manifest.
    """
    path = Path(splits_dir) / f"{split}.parquet"
    expected = read_manifest(splits_dir)["splits"][split]["sha256"]
    if not path.is_file() or storage.sha256_of(path) != expected:
        raise DataError(f"{path}: missing or changed; run `sodaops preprocess` to make it again.")
    return pq.read_table(path)


def _fingerprint(config: DataConfig, sources: dict[str, str], digests: dict[str, str], task: Task) -> str:
    """A hash of everything that determines the splits: the tables' content, the configuration, and the format."""
    keys = config.model_dump(mode="json", exclude=_UNUSED_KEYS)
    keys = {key: value for key, value in keys.items() if key not in _LATER_KEYS or value is not None}
    names = {name if name in ("all", *SPLITS) else Path(name).name: path for name, path in sources.items()}
    tables = {name: digests[path] for name, path in names.items()}
    changes = {key: 2 for key, used in (("jsonl", _has_json(sources)), ("max_rows", config.max_rows is not None)) if used}
    code = cleaning.code_of(config.cleaning) | ({"task": task.splits_section()} if task.section() else {})
    return storage.sha256_of_json({"format": FORMAT, "config": keys, "tables": tables, **changes, **code})


def _has_json(sources: dict[str, str]) -> bool:
    return any(table_format(path) == "jsonl" for path in sources.values())


def _parts_fingerprint(fingerprint: str, task: Task) -> str:
    """A hash of everything that determines the parts, which a run of other code must not use."""
    files = [str(module.__file__) for module in PART_CODE] + [inspect.getfile(kind) for kind in type(task).__mro__[:-1]]
    return storage.sha256_of_json([fingerprint, *map(storage.sha256_of, files)])


def _manifest_or_none(splits_dir: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((splits_dir / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return manifest if isinstance(manifest, dict) and manifest.get("format") == FORMAT else None


def _manifest_if_current(splits_dir: Path, fingerprint: str) -> dict[str, Any] | None:
    """The manifest, if it has this fingerprint and all splits are whole."""
    manifest = _manifest_or_none(splits_dir)
    if manifest is None or manifest.get("fingerprint") != fingerprint:
        return None
    files = {splits_dir / f"{split}.parquet": entry["sha256"] for split, entry in manifest["splits"].items()}
    return manifest if all(path.is_file() and storage.sha256_of(path) == digest for path, digest in files.items()) else None


def added_tables(config: DataConfig) -> list[str]:
    """The tables in ``data.added``, sorted by name; none if there is no such folder."""
    folder = Path(config.added) if config.added else None
    if folder is None or not folder.is_dir():
        return []
    return sorted(str(path) for path in folder.iterdir() if table_format(path.name) is not None)


def _sources(config: DataConfig) -> dict[str, str]:
    """Split, ``all`` or the path of an added table -> table or the name of ``data.source``."""
    sources = {**config.sources, **{path: path for path in added_tables(config)}}
    for path in sources.values():
        if path != _source_name(config) and not local_copy(path).is_file():
            open_table(path)  # raises the error
    return sources


def _source_name(config: DataConfig) -> str | None:
    return None if config.source is None else config.sources["all"]


def _digests(config: DataConfig, sources: dict[str, str], known: Mapping[str, str], task: Task) -> dict[str, str]:
    """Table -> SHA-256 of its bytes; for ``data.source`` of its cells, for which it is read unless the hash is known."""
    name = _source_name(config)
    digests = {path: digest for path, digest in known.items() if path == name}
    if name is not None and not digests:
        deque(_read(config, name, digests, task), maxlen=0)
    try:
        return digests | {path: storage.sha256_of(local_copy(path)) for path in dict.fromkeys(sources.values()) if path != name}
    except OSError as error:
        raise DataError(f"{error.filename}: could not be read ({error.strerror}); check its permissions.") from None


def _make_parts(config: DataConfig, sources: dict[str, str], digests: dict[str, str], work: Path, task: Task) -> list[Part]:
    """Reads the tables, and makes a part of every few thousand rows; returns the parts in order."""

    def raw_parts() -> Iterator[tuple[Part, pa.RecordBatch]]:
        for source, path in enumerate(sources.values()):
            first = 1
            for batch in _read(config, path, digests, task):
                for raw in split_batch(batch):
                    name = f"{source:03}-{first:012}-{raw.num_rows:06}.arrow"
                    yield Part(work / name, path, source, first, raw.num_rows), raw
                    first += raw.num_rows

    finished = []
    with progress(desc="cleaning rows", unit="row") as bar:
        for part in make_parts(raw_parts(), config, task):
            finished.append(part)
            bar.update(part.n_rows)
    return finished


def _keys_of_columns(config: DataConfig, task: Task) -> dict[str, str]:
    """Column -> the key that names it."""
    votes = (config.vote_columns or {}).values()
    keys = dict.fromkeys(config.slice_columns, "data.slice_columns") | dict.fromkeys(votes, "data.vote_columns")
    return dict.fromkeys(config.text_columns, "data.text_column") | task.table_columns(config) | keys


def check_table(config: DataConfig, path: str, task: Task = SINGLE_LABEL) -> None:
    """Reads the first rows of one of ``config.sources``.

    Raises:
        DataError: it cannot be read, or lacks a column.
    """
    next(_read(config, path, {}, task), None)


def _read(config: DataConfig, path: str, digests: dict[str, str], task: Task) -> Iterator[pa.RecordBatch]:
    """The columns of a table or of ``data.source`` as strings; ``digests`` are as for :func:`read_source`."""
    keys = _keys_of_columns(config, task)
    lists = list(task.table_columns(config)) if task.takes_lists else []
    if path == _source_name(config):
        return read_source(path, config.source, keys, digests, lists)
    return read_batches(path, list(keys), _layout(config, path), keys, lists)


def _layout(config: DataConfig, path: str) -> Layout:
    """The configured layout, which is not that of added tables."""
    return Layout(config.delimiter, config.encoding) if path in config.sources.values() else Layout()


def _added_rows(config: DataConfig, rows: Rows, split: np.ndarray) -> dict[str, dict[str, int]]:
    """Added table -> split -> number of rows."""
    spans = {path: slice(*rows.starts[i : i + 2]) for i, path in enumerate(rows.tables)}
    counts = {path: [int((split[spans[path]] == k).sum()) for k in range(len(SPLITS))] for path in added_tables(config)}
    return {path: {name: n for name, n in zip(SPLITS, n_rows, strict=True) if n} for path, n_rows in counts.items()}


def _warn_of_another_table(splits_dir: Path, manifest: dict[str, Any]) -> None:
    """Logs a warning if the folder holds the splits of other tables, by path and by content."""
    before = _manifest_or_none(splits_dir)
    if before is None:
        return
    old, new = ([one for one in m["sources"] if one["path"] not in m.get("added", {})] for m in (before, manifest))
    ids = [{str(Path(one["path"]).resolve()) for one in of} | {one["sha256"] for one in of} for of in (old, new)]
    if not ids[0] & ids[1]:
        log.warning(
            "%s: the splits of %s are replaced by those of %s; another data.name (now %s) keeps both",
            splits_dir, some([one["path"] for one in old]), some([one["path"] for one in new]), manifest["name"],
        )  # fmt: skip


def _check_labels_per_split(rows: Rows, split: np.ndarray, targets: Targets, config: DataConfig, task: Task) -> None:
    table = next(iter(config.sources.values()))
    only_test = config.path is not None and config.fractions[2] == 1  # for an evaluation
    for k, name in enumerate(SPLITS):
        if not (split == k).any() and (name == "test" or not only_test):
            raise DataError(f"{table}: no row falls into {name}; add rows, or change data.fractions.")
    if only_test:
        return
    task.check_train(table, targets, rows.label_id[split == SPLITS.index("train")], config)
