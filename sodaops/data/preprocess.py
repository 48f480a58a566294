"""From a raw table to Parquet splits and a manifest that tells what was made, from what, and what was left out."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from sodaops import storage
from sodaops.config import DataConfig, table_format
from sodaops.data.rows import ADDED, Rows, drop_empty, drop_known, drop_repeated, read_rows
from sodaops.data.sources import read_table
from sodaops.data.splits import SPLITS, assign_split
from sodaops.errors import DataError, some

MANIFEST = "manifest.json"
_RARE = 5
FORMAT = 1  # raise when the same table would give other splits: older splits are then stale
# Keys that do not change what the splits hold.
_PLACE_KEYS = {"name", "path", "files", "watch", "added"}


def preprocess(config: DataConfig, splits_dir: str | Path) -> dict[str, Any]:
    """Makes train.parquet, val.parquet, test.parquet and manifest.json in ``splits_dir``, all or none.

    The splits have the columns source, row (int64, from 1), text (cleaned), label, label_id (int32), votes
    (list<int64> in label order, null where nobody voted) and slice_NAME for each slice column.

    Returns:
        The manifest.

    Raises:
        DataError: a table that cannot be read, or rows that cannot be used.
        StorageError: the splits could not be written.
    """
    sources = _sources(config)
    labels, rows = read_rows(config, sources)
    n_read = len(rows.text)
    dropped: dict[str, list[str]] = {}
    rows = drop_empty(rows, dropped)
    rows = drop_known(rows, dropped)
    rows = drop_repeated(rows, labels, config, dropped)
    rows.split = [_assigned(config, given, text) for given, text in zip(rows.split, rows.text, strict=True)]
    _check_labels_per_split(rows, labels, config)
    tables = {split: _table(rows, labels, split, config.slice_columns) for split in SPLITS}
    manifest = {
        "format": FORMAT,
        "name": config.name,
        "fingerprint": fingerprint(config),
        "cleaning": config.cleaning,
        "labels": labels,
        "slice_columns": config.slice_columns,
        "sources": [{"path": path, "sha256": storage.sha256_of(path)} for path in dict.fromkeys(sources.values())],
        "n_read": n_read,
        "n_kept": len(rows.text),
        "dropped": {reason: {"n_rows": len(places), "first": places[:5]} for reason, places in dropped.items()},
        "splits": {split: _describe(table, labels) for split, table in tables.items()},
        "added": _added_rows(config, tables),
    }
    with storage.atomic_folder(splits_dir, [MANIFEST, *(f"{split}.parquet" for split in SPLITS)]) as folder:
        for split, table in tables.items():
            pq.write_table(table, folder / f"{split}.parquet", compression="zstd")
            manifest["splits"][split]["sha256"] = storage.sha256_of(folder / f"{split}.parquet")
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return manifest


def describe(manifest: dict[str, Any]) -> str:
    """A few lines for a person: what was read and dropped, the splits, the labels, and labels that look like slips."""
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
            f"note: fewer than {_RARE} rows have label {some(rare)}; if that is a slip, name the labels with data.labels"
        )
    return "\n".join(lines)


def ensure_splits(config: DataConfig, splits_dir: str | Path) -> dict[str, Any]:
    """The manifest of splits that are up to date: those that are there, or new ones.

    Processes that come at the same time wait for the first.
    """
    splits_dir = Path(splits_dir)
    wanted = fingerprint(config)
    manifest = _manifest_or_none(splits_dir)
    if manifest is not None and manifest.get("fingerprint") == wanted and _complete(splits_dir, manifest):
        return manifest
    with storage.writing(splits_dir):
        splits_dir.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(splits_dir.parent / f".{splits_dir.name}.lock")
    with lock:
        manifest = _manifest_or_none(splits_dir)
        if manifest is not None and manifest.get("fingerprint") == wanted and _complete(splits_dir, manifest):
            return manifest
        return preprocess(config, splits_dir)


def read_manifest(splits_dir: str | Path) -> dict[str, Any]:
    """The manifest of finished splits.

    Raises:
        DataError: there are none, or it cannot be read.
    """
    manifest = _manifest_or_none(Path(splits_dir))
    if manifest is None:
        raise DataError(f"{splits_dir}: no readable {MANIFEST}; make the splits with `sodaops preprocess`.")
    return manifest


def read_split(splits_dir: str | Path, split: str) -> pa.Table:
    """One split as it was written; its hash is checked.

    Raises:
        DataError: the split is missing or is not the one that the manifest tells of.
    """
    path = Path(splits_dir) / f"{split}.parquet"
    expected = read_manifest(splits_dir)["splits"][split]["sha256"]
    if not path.is_file() or storage.sha256_of(path) != expected:
        raise DataError(f"{path}: missing, or changed since it was made; run `sodaops preprocess` to make it anew.")
    return pq.read_table(path)


def fingerprint(config: DataConfig) -> str:
    """What the splits are made from: the tables' bytes, the keys that shape them, and the format."""
    shape = config.model_dump(mode="json", exclude=_PLACE_KEYS)
    tables = {split: storage.sha256_of(path) for split, path in _sources(config).items()}
    tables = {name if name in ("all", *SPLITS) else Path(name).name: digest for name, digest in tables.items()}
    return storage.sha256_of_json({"format": FORMAT, "config": shape, "tables": tables})


def _manifest_or_none(splits_dir: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((splits_dir / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return manifest if isinstance(manifest, dict) and manifest.get("format") == FORMAT else None


def _complete(splits_dir: Path, manifest: dict[str, Any]) -> bool:
    files = {splits_dir / f"{split}.parquet": entry["sha256"] for split, entry in manifest["splits"].items()}
    return all(path.is_file() and storage.sha256_of(path) == digest for path, digest in files.items())


def added_tables(config: DataConfig) -> list[str]:
    """The tables in ``data.added``, by name; none where there is no such folder."""
    folder = Path(config.added) if config.added else None
    if folder is None or not folder.is_dir():
        return []
    return sorted(str(path) for path in folder.iterdir() if table_format(path.name) is not None)


def _sources(config: DataConfig) -> dict[str, str]:
    """Split, ``all`` or the path of an added table -> table."""
    sources = {**config.sources, **{path: path for path in added_tables(config)}}
    for path in sources.values():
        if not Path(path).is_file():
            read_table(path, [])  # says what is missing
    return sources


def _assigned(config: DataConfig, given: str | None, text: str) -> str:
    """The split of a row. Added ones go to train, or to val by the hash where val is made so; the test split stays as it
    is, or two models could not be told apart by it."""
    if given not in (None, ADDED):
        return given
    split = assign_split(text, config.fractions)
    if given is None:
        return split
    return "val" if split == "val" and config.path is not None else "train"


def _added_rows(config: DataConfig, tables: dict[str, pa.Table]) -> dict[str, dict[str, int]]:
    """Added table -> split -> rows."""
    counts = {split: Counter(table["source"].to_pylist()) for split, table in tables.items()}
    return {path: {split: counts[split][path] for split in SPLITS if counts[split][path]} for path in added_tables(config)}


def _check_labels_per_split(rows: Rows, labels: Sequence[str], config: DataConfig) -> None:
    counts = Counter(zip(rows.split, rows.label_id, strict=True))
    where = next(iter(config.sources.values()))
    for split in SPLITS:
        if not any(counts[split, i] for i in range(len(labels))):
            raise DataError(f"{where}: no row falls into {split}; give more rows, or set data.fractions.")
    absent = [label for i, label in enumerate(labels) if not counts["train", i]]
    if len(labels) - len(absent) < 2:
        raise DataError(f"{where}: train has one label only; expected at least two of {', '.join(labels)}.")
    if absent:
        raise DataError(
            f"{where}: train has no row with label {', '.join(absent)}; a model cannot learn what it never sees. "
            "Give more rows with it; if it is a slip, correct it or name the labels with data.labels."
        )


def _table(rows: Rows, labels: Sequence[str], split: str, slice_columns: Sequence[str]) -> pa.Table:
    part = rows.take(i for i, name in enumerate(rows.split) if name == split)
    columns = {
        "source": pa.array(part.source, pa.string()),
        "row": pa.array(part.row, pa.int64()),
        "text": pa.array(part.text, pa.string()),
        "label": pa.array([labels[i] for i in part.label_id], pa.string()),
        "label_id": pa.array(part.label_id, pa.int32()),
        "votes": pa.array(part.votes, pa.list_(pa.int64())),
    }
    for k, name in enumerate(slice_columns):
        columns[f"slice_{name}"] = pa.array([values[k] for values in part.slices], pa.string())
    return pa.table(columns)


def _describe(table: pa.Table, labels: Sequence[str]) -> dict[str, Any]:
    texts = table["text"].to_pylist()
    counts = Counter(table["label"].to_pylist())
    return {
        "n_rows": table.num_rows,
        "labels": {label: counts[label] for label in labels},
        "chars": _quantiles([len(text) for text in texts]),
        "words": _quantiles([len(text.split()) for text in texts]),
    }


def _quantiles(values: Sequence[int]) -> dict[str, float]:
    shares = {"min": 0, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "max": 1}
    return dict(zip(shares, np.quantile(values, list(shares.values())).tolist(), strict=True))
