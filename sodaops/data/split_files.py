"""Writes the kept rows to one Parquet file per split, in memory of a few parts."""

import contextlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sodaops.config.schema import DataConfig
from sodaops.data.parts import Part, read_part
from sodaops.data.splits import SPLITS
from sodaops.io import storage
from sodaops.io.progress import progress
from sodaops.tasks.base import Targets, Task
from sodaops.text.columns import SEPARATOR

_GROUP_ROWS = 131_072
_GROUP_BYTES = 32 * 2**20
_SHARES = {"min": 0, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "max": 1}


def write_splits(
    folder: Path,
    parts: Sequence[Part],
    label_id: np.ndarray,
    split: np.ndarray,
    targets: Targets,
    config: DataConfig,
    task: Task,
) -> dict[str, Any]:
    """Writes train.parquet, val.parquet and test.parquet.

    Args:
        folder: the folder to write to.
        parts: of all tables, in order.
        label_id: int32 [n_rows], the targets of the parts' rows in order.
        split: int8 [n_rows], an index of SPLITS, or -1 for a dropped row.
        targets: of the table.
        config: conf/data.
        task: counts the labels.

    Returns:
        split -> its entry in the manifest.

    Raises:
        DataError: a part is damaged.
        StorageError: a file could not be written.
    """
    schema = _schema(config, targets)
    start = 0
    bar = progress(total=len(split), desc="writing splits", unit="row")
    with storage.writing(folder), bar, contextlib.ExitStack() as stack:
        files = [_SplitFile(stack.enter_context(_writer(folder / f"{name}.parquet", schema))) for name in SPLITS]
        for part in parts:
            span = slice(start, start + part.n_rows)
            rows, _ = read_part(part)
            for k, file in enumerate(files):
                places = np.flatnonzero(split[span] == k)
                if len(places):
                    file.add(_table(part, rows.take(pa.array(places)), places, label_id[span][places], targets, config, schema))
            start += part.n_rows
            bar.update(part.n_rows)
        for file in files:
            file.flush()
    return {name: files[k].info(task.label_counts(targets, label_id[split == k])) for k, name in enumerate(SPLITS)}


def _writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(path, schema, compression="zstd")


def _schema(config: DataConfig, targets: Targets) -> pa.Schema:
    text = pa.string()
    columns = {"source": text, "row": pa.int64(), "text": text, **{name: of.type for name, of in targets.columns.items()}}
    columns |= {"votes": pa.list_(pa.int64()), **{f"slice_{name}": text for name in config.slice_columns}}
    return pa.schema(list(columns.items()))


def _table(
    part: Part, rows: pa.RecordBatch, places: np.ndarray, label_id: np.ndarray, targets: Targets, config: DataConfig,
    schema: pa.Schema,
) -> pa.Table:  # fmt: skip
    ids = pa.array(label_id, pa.int32())
    columns = {
        "source": pa.repeat(part.table, len(places)),
        "row": pa.array(places + part.first, pa.int64()),
        "text": rows["text"],
        **{name: values.take(ids) for name, values in targets.columns.items()},
        "votes": _votes(rows, targets.labels, config),
    }
    return pa.table({name: columns[name] if name in columns else rows[name] for name in schema.names}, schema=schema)


def _votes(rows: pa.RecordBatch, labels: Sequence[str], config: DataConfig) -> pa.Array:
    """list<int64> in label order, null without votes."""
    if config.vote_columns is None:
        return pa.nulls(rows.num_rows, pa.list_(pa.int64()))
    counts = np.stack([rows[f"vote_{label}"].to_numpy() for label in labels], axis=1)
    voted = counts.any(axis=1)
    offsets = np.concatenate([[0], np.cumsum(voted * len(labels))]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(counts[voted].ravel()), mask=pa.array(~voted))


class _SplitFile:
    """A Parquet file that is written by row groups, and the lengths of its texts."""

    def __init__(self, writer: pq.ParquetWriter) -> None:
        self._writer = writer
        self._pending: list[pa.Table] = []
        self._n_chars: Counter[int] = Counter()
        self._n_words: Counter[int] = Counter()

    def add(self, table: pa.Table) -> None:
        """Adds rows."""
        texts = pc.replace_substring(table["text"], SEPARATOR, " ")
        _count(self._n_chars, pc.utf8_length(texts))
        _count(self._n_words, pc.add(pc.count_substring(texts, " "), 1))  # clean texts have single spaces
        self._pending.append(table)
        if sum(t.num_rows for t in self._pending) >= _GROUP_ROWS or sum(t.nbytes for t in self._pending) >= _GROUP_BYTES:
            self.flush()

    def flush(self) -> None:
        """Writes the pending rows as a row group."""
        if self._pending:
            self._writer.write_table(pa.concat_tables(self._pending), row_group_size=2**20)
            self._pending = []

    def info(self, n_labels: dict[str, int]) -> dict[str, Any]:
        """Number of rows, labels and lengths, for the manifest."""
        lengths = {"chars": _quantiles(self._n_chars), "words": _quantiles(self._n_words)}
        return {"n_rows": self._n_chars.total(), "labels": n_labels, **lengths}


def _count(counts: Counter[int], values: pa.ChunkedArray) -> None:
    distinct, n = np.unique(values.to_numpy(), return_counts=True)
    counts.update(dict(zip(distinct.tolist(), n.tolist(), strict=True)))


def _quantiles(counts: Counter[int]) -> dict[str, float]:
    """The quantiles of all values, from the count of each; equal to numpy.quantile, which interpolates linearly."""
    if not counts:
        return dict.fromkeys(_SHARES, 0.0)
    values = np.array(sorted(counts))
    cumulated = np.cumsum([counts[value] for value in values.tolist()])
    quantiles = {}
    for name, share in _SHARES.items():
        rank = (cumulated[-1] - 1) * share  # a fraction lies between two of the sorted values
        low, high = values[np.searchsorted(cumulated, [np.floor(rank), np.ceil(rank)], side="right")]
        quantiles[name] = float(np.quantile([low, high], rank - np.floor(rank)))
    return quantiles
