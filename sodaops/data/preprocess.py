"""From a raw table to Parquet splits and a manifest that tells what was made, from what, and what was left out."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock
from tqdm import tqdm

from sodaops.config.schema import DataConfig, table_format
from sodaops.data import parts
from sodaops.data.parts import Part, cut
from sodaops.data.rows import Rows, choose, read_rows, split_of
from sodaops.data.sources import read_batches
from sodaops.data.split_files import write_splits
from sodaops.data.splits import SPLITS
from sodaops.data.work_folder import work_folder
from sodaops.data.workers import make_parts
from sodaops.errors import DataError, some
from sodaops.io import storage
from sodaops.io.remote import local_copy
from sodaops.text import bulk_cleaning, cleaning

MANIFEST = "manifest.json"
_RARE = 5
FORMAT = 2  # raise when the same table would give other splits: older splits are then stale
PART_CODE = (bulk_cleaning, cleaning, parts)  # what a part's content comes from
# Keys that do not change what the splits hold.
_PLACE_KEYS = {"name", "path", "files", "watch", "added", "ray"}


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
    digests = _digests(sources)
    wanted = _fingerprint(config, sources, digests)
    with work_folder(splits_dir, _fingerprint_of_parts(wanted)) as work:
        made = _make_parts(config, sources, work)
        labels, rows = read_rows(config, sources, made)
        kept, dropped = choose(rows, labels, config)
        split = np.where(kept, split_of(rows, config), np.int8(-1))
        _check_labels_per_split(rows, split, labels, config)
        described = write_splits(work, made, rows.label_id, split, labels, config)
        manifest = {
            "format": FORMAT,
            "name": config.name,
            "fingerprint": wanted,
            "cleaning": config.cleaning,
            "labels": labels,
            "slice_columns": config.slice_columns,
            "sources": [{"path": path, "sha256": digests[path]} for path in dict.fromkeys(sources.values())],
            "n_read": len(split),
            "n_kept": int(kept.sum()),
            "dropped": dropped,
            "splits": described,
            "added": _added_rows(config, rows, split),
        }
        with storage.atomic_folder(splits_dir, [MANIFEST, *(f"{name}.parquet" for name in SPLITS)]) as folder:
            for name in SPLITS:
                os.replace(work / f"{name}.parquet", folder / f"{name}.parquet")
                manifest["splits"][name]["sha256"] = storage.sha256_of(folder / f"{name}.parquet")
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
    sources = _sources(config)
    return _fingerprint(config, sources, _digests(sources))


def _fingerprint(config: DataConfig, sources: dict[str, str], digests: dict[str, str]) -> str:
    shape = config.model_dump(mode="json", exclude=_PLACE_KEYS)
    names = {name if name in ("all", *SPLITS) else Path(name).name: path for name, path in sources.items()}
    tables = {name: digests[path] for name, path in names.items()}
    return storage.sha256_of_json({"format": FORMAT, "config": shape, "tables": tables})


def _fingerprint_of_parts(fingerprint: str) -> str:
    """Parts that a stopped run left behind are stale, too, when the code that made them has changed."""
    return storage.sha256_of_json([fingerprint, *(storage.sha256_of(module.__file__) for module in PART_CODE)])


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
        if not local_copy(path).is_file():
            next(read_batches(path, []))  # says what is missing
    return sources


def _digests(sources: dict[str, str]) -> dict[str, str]:
    """Table -> SHA-256 of its bytes."""
    try:
        return {path: storage.sha256_of(local_copy(path)) for path in dict.fromkeys(sources.values())}
    except OSError as error:
        raise DataError(f"{error.filename}: could not be read ({error.strerror}); check who may read it.") from None


def _make_parts(config: DataConfig, sources: dict[str, str], work: Path) -> list[Part]:
    """Reads the tables, and makes a part of every few thousand rows."""
    votes = list((config.vote_columns or {}).values())
    columns = list(dict.fromkeys([config.text_column, config.label_column, *votes, *config.slice_columns]))

    def raw_parts() -> Iterator[tuple[Part, pa.RecordBatch]]:
        for source, path in enumerate(sources.values()):
            first = 1
            for batch in read_batches(path, columns, config.max_rows):
                for raw in cut(batch):
                    name = f"{source:03}-{first:012}-{raw.num_rows:06}.arrow"
                    yield Part(work / name, path, source, first, raw.num_rows), raw
                    first += raw.num_rows

    made = []
    with tqdm(desc="cleaning rows", unit="row", delay=2, leave=False, disable=None) as bar:
        for part in make_parts(raw_parts(), config):
            made.append(part)
            bar.update(part.n_rows)
    return made


def _added_rows(config: DataConfig, rows: Rows, split: np.ndarray) -> dict[str, dict[str, int]]:
    """Added table -> split -> rows."""
    spans = {path: slice(*rows.starts[i : i + 2]) for i, path in enumerate(rows.tables)}
    counts = {path: [int((split[spans[path]] == k).sum()) for k in range(len(SPLITS))] for path in added_tables(config)}
    return {path: {name: n for name, n in zip(SPLITS, found, strict=True) if n} for path, found in counts.items()}


def _check_labels_per_split(rows: Rows, split: np.ndarray, labels: Sequence[str], config: DataConfig) -> None:
    where = next(iter(config.sources.values()))
    for k, name in enumerate(SPLITS):
        if not (split == k).any():
            raise DataError(f"{where}: no row falls into {name}; give more rows, or set data.fractions.")
    counts = np.bincount(rows.label_id[split == SPLITS.index("train")], minlength=len(labels))
    absent = [label for label, count in zip(labels, counts, strict=True) if not count]
    if len(labels) - len(absent) < 2:
        raise DataError(f"{where}: train has one label only; expected at least two of {', '.join(labels)}.")
    if absent:
        raise DataError(
            f"{where}: train has no row with label {', '.join(absent)}; a model cannot learn what it never sees. "
            "Give more rows with it; if it is a slip, correct it or name the labels with data.labels."
        )
