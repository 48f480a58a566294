"""From a raw table to Parquet splits and a manifest that tells what was made, from what, and what was left out."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock
from tqdm import tqdm

from sodaops import storage
from sodaops.config import DataConfig
from sodaops.data.sources import read_table
from sodaops.data.splits import SPLITS, assign_split
from sodaops.errors import DataError, some
from sodaops.labels import label_ids, label_order
from sodaops.text import clean

MANIFEST = "manifest.json"
_RARE = 5
FORMAT = 1  # raise when the same table would give other splits: older splits are then stale
# Keys that do not change what the splits hold.
_PLACE_KEYS = {"name", "path", "files", "watch"}


@dataclass
class Rows:
    """Rows on their way to the splits; lists of equal length."""

    source: list[str] = field(default_factory=list)
    row: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    label_id: list[int] = field(default_factory=list)
    split: list[str | None] = field(default_factory=list)
    votes: list[list[int] | None] = field(default_factory=list)
    slices: list[tuple[str, ...]] = field(default_factory=list)

    def take(self, keep: Iterable[int]) -> "Rows":
        """The rows at these places, in this order."""
        keep = list(keep)
        return Rows(**{name: [column[i] for i in keep] for name, column in vars(self).items()})

    def place(self, i: int) -> str:
        """Where row ``i`` came from, for messages."""
        return f"{self.source[i]} row {self.row[i]}"


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
    labels, rows = _read(config, sources)
    n_read = len(rows.text)
    dropped: dict[str, list[str]] = {}
    rows = _drop_empty(rows, dropped)
    rows = _drop_repeated(rows, labels, config, dropped)
    rows.split = [given or assign_split(text, config.fractions) for given, text in zip(rows.split, rows.text, strict=True)]
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


def _sources(config: DataConfig) -> dict[str, str]:
    sources = config.sources
    for path in sources.values():
        if not Path(path).is_file():
            read_table(path, [])  # says what is missing
    return sources


def _read(config: DataConfig, sources: dict[str, str]) -> tuple[list[str], Rows]:
    votes = list((config.vote_columns or {}).values())
    columns = list(dict.fromkeys([config.text_column, config.label_column, *votes, *config.slice_columns]))
    tables = {split: read_table(path, columns, config.max_rows) for split, path in sources.items()}
    cells = [value for table in tables.values() for value in table[config.label_column].to_pylist()]
    labels = label_order(cells, config.labels, config.label_map)
    if len(labels) < 2:
        raise DataError(
            f"{', '.join(sources.values())}: {config.label_column} has one label only ({labels[0] if labels else 'none'}); "
            "expected at least two."
        )
    rows = Rows()
    for split, table in tables.items():
        path = sources[split]
        raw = table[config.text_column].to_pylist()
        _check_lengths(path, raw, config)
        rows.source += [path] * len(raw)
        rows.row += range(1, len(raw) + 1)
        bar = tqdm(raw, desc=f"cleaning {path}", unit="row", delay=2, leave=False, disable=None)
        rows.text += [clean(text, config.cleaning) for text in bar]
        values = table[config.label_column].to_pylist()
        rows.label_id += label_ids(f"{path} {config.label_column}", values, labels, config.label_map)
        rows.split += [None if split == "all" else split] * len(raw)
        rows.votes += _votes(path, table, config.vote_columns, labels)
        rows.slices += list(zip(*(table[name].to_pylist() for name in config.slice_columns), strict=True)) or [()] * len(raw)
    return labels, rows


def _check_lengths(path: str, texts: Sequence[str], config: DataConfig) -> None:
    long = [row for row, text in enumerate(texts, start=1) if len(text) > config.max_chars]
    if long:
        raise DataError(
            f"{path} row {long[0]}: {config.text_column} has {len(texts[long[0] - 1]):,} characters; at most "
            f"{config.max_chars:,} are allowed ({len(long)} rows: {some(long)}). A quote that is not closed is the usual "
            "cause; if the texts are that long, set data.max_chars."
        )


def _votes(path: str, table: pa.Table, columns: dict[str, str] | None, labels: Sequence[str]) -> list[list[int] | None]:
    if columns is None:
        return [None] * table.num_rows
    counts = []
    for label in labels:
        cells = table[columns[label]].to_pylist()
        bad = [row for row, cell in enumerate(cells, start=1) if cell and not re.fullmatch("[0-9]{1,18}", cell)]
        if bad:
            raise DataError(
                f"{path} row {bad[0]}: {columns[label]}={cells[bad[0] - 1]!r}; expected a number of votes, 0 or more "
                f"({len(bad)} bad rows: {some(bad)})."
            )
        counts.append([int(cell or 0) for cell in cells])
    return [list(votes) if sum(votes) else None for votes in zip(*counts, strict=True)]


def _drop_empty(rows: Rows, dropped: dict[str, list[str]]) -> Rows:
    empty = [i for i, text in enumerate(rows.text) if not text]
    if len(empty) == len(rows.text):
        raise DataError(
            f"{rows.source[0]}: all {len(empty)} texts are empty after cleaning; check data.text_column and data.cleaning."
        )
    if empty:
        dropped["empty_text"] = [rows.place(i) for i in empty]
    gone = set(empty)
    return rows.take(i for i in range(len(rows.text)) if i not in gone)


def _drop_repeated(rows: Rows, labels: Sequence[str], config: DataConfig, dropped: dict[str, list[str]]) -> Rows:
    first: dict[str, int] = {}
    conflicts: dict[str, tuple[int, int]] = {}
    repeated, shared = [], []
    for i, text in enumerate(rows.text):
        j = first.setdefault(text, i)
        if i == j:
            continue
        repeated.append(i)
        if rows.split[i] != rows.split[j]:
            shared.append(f"{rows.place(j)} and {rows.place(i)}")
        if rows.label_id[i] != rows.label_id[j]:
            conflicts.setdefault(text, (j, i))
    if shared:
        raise DataError(
            f"{len(shared)} texts stand in two of the given splits: {some(shared)}. What is tested must not be trained on: "
            "take them out of one, or put all rows into one table (data.path) and let the split be made from the texts."
        )
    if conflicts and config.conflicts == "error":
        pairs = [f"{rows.place(j)} {labels[rows.label_id[j]]}, row {rows.row[i]} {labels[rows.label_id[i]]}"
                 for j, i in conflicts.values()]  # fmt: skip
        raise DataError(
            f"{len(conflicts)} texts have two labels: {some(pairs)}. Fix them, or drop them all with data.conflicts=drop."
        )
    same = [i for i in repeated if rows.text[i] not in conflicts]
    both = [i for i, text in enumerate(rows.text) if text in conflicts]
    for reason, gone in (("repeated_text", same), ("two_labels", both)):
        if gone:
            dropped[reason] = [rows.place(i) for i in gone]
    out = {*same, *both}
    return rows.take(i for i in range(len(rows.text)) if i not in out)


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
