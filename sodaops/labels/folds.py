"""Out-of-fold probabilities: each row's are those of a model that was not trained on it.

The folds are ordinary trainings on splits of their own. What a finished one answered is kept beside the splits, in a folder
whose name is a hash of all that determines it; one that was stopped goes on from its last epoch.
"""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from sodaops.config.model import PromiseConfig
from sodaops.config.schema import Config, ExportConfig, LoggerConfig
from sodaops.data.preprocess import MANIFEST, read_split
from sodaops.data.splits import SPLITS, text_hash
from sodaops.errors import DataError, Terminated
from sodaops.inference.predictor import Predictor
from sodaops.io import storage
from sodaops.io.progress import progress
from sodaops.tasks.make import make_task

log = logging.getLogger(__name__)
_SECTIONS = (  # what the models depend on besides the splits
    "seed", "task", "model", "head", "loss", "optim", "trainer", "checkpoint", "early_stopping", "callbacks", "metrics",
)  # fmt: skip


def out_of_fold(config: Config, manifest: Mapping[str, Any], train: Callable[[Config], Any]) -> tuple[pa.Table, np.ndarray]:
    """Trains ``labels.folds`` models, each without a part of the train and val rows, which it then answers.

    Args:
        config: the whole configuration.
        manifest: of the splits.
        train: runs a training, as :func:`sodaops.pipeline.train` does.

    Returns:
        The rows of all splits, with a column ``split``; and their probabilities, float32 [n_rows, n_labels], NaN for a text
        without tokens. Those of test rows, from which no model learns, are the means of all models.

    Raises:
        DataError: a label has fewer rows than there are folds.
        KeyboardInterrupt: it was stopped; the same command goes on.
    """
    tables, n_folds = [read_split(config.splits_dir, split) for split in SPLITS], config.labels.folds
    names = pa.array(np.repeat(SPLITS, [len(table) for table in tables]).tolist(), pa.string())
    rows = pa.concat_tables(tables).append_column("split", names)
    truth, n_known = make_task(config.task).truth(rows), len(rows) - len(tables[-1])
    texts, of_test = rows["text"].to_pylist(), np.full(len(tables[-1]), -1)
    fold = np.concatenate([assign_folds(texts[:n_known], truth[:n_known], n_folds, manifest["labels"]), of_test])
    probs, cache = np.zeros((len(rows), len(manifest["labels"])), np.float32), _cache_of(config, manifest)
    with storage.writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / ".lock"), progress(total=n_folds, desc="out-of-fold trainings", unit="fold") as bar:
        for k in range(n_folds):
            answered, folder = np.flatnonzero((fold == k) | (fold == -1)), cache / str(k)
            answers = _kept(cache / f"{k}.parquet", len(answered))
            if answers is None:
                _write_splits(folder, manifest, rows, truth, fold, k)
                answers = _train_and_answer(config, folder, train, [texts[row] for row in answered])
                with storage.atomic_path(cache / f"{k}.parquet") as file:
                    pq.write_table(pa.table({"probs": list(answers)}), file)
                shutil.rmtree(folder)
            probs[answered] += answers / np.where(fold[answered] == -1, n_folds, 1)[:, None]
            bar.update()
    return rows, probs


def assign_folds(texts: Sequence[str], truth: np.ndarray, n_folds: int, labels: Sequence[str]) -> np.ndarray:
    """The fold of each row, int64 [n_rows]: those of a label are spread evenly, in the order of their texts' hashes.

    Raises:
        DataError: a label has fewer rows than there are folds.
    """
    counts = np.bincount(truth, minlength=len(labels))
    if counts.min() < n_folds:
        rarest = labels[int(counts.argmin())]
        raise DataError(
            f"labels.folds={n_folds}: label {rarest} has {counts.min()} rows in train and val, but each fold needs one. Add "
            "rows of it, or set labels.folds to a smaller number, at least 3."
        )
    fold = np.empty(len(texts), np.int64)
    fold[np.lexsort((np.array([text_hash(text) for text in texts]), truth))] = np.arange(len(texts)) % n_folds
    return fold


def _cache_of(config: Config, manifest: Mapping[str, Any]) -> Path:
    """The folder for answers of models of this configuration on these splits."""
    splits = [manifest["fingerprint"], *(manifest["splits"][split]["sha256"] for split in SPLITS)]
    key = storage.sha256_of_json([splits, config.labels.folds, config.model_dump(mode="json", include=set(_SECTIONS))])
    return config.splits_dir.parent / f".{config.splits_dir.name}.labels" / key[:16]


def _kept(path: Path, n_rows: int) -> np.ndarray | None:
    """What a finished fold answered, float32 [n_rows, n_labels]; None if it has to be trained."""
    if not path.is_file():
        return None
    try:
        probs = np.stack(pq.read_table(path)["probs"].to_numpy())
        if len(probs) != n_rows:
            raise ValueError(f"{len(probs)} rows in place of {n_rows}")
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        log.warning("%s: could not be read (%s); its fold is trained again", path, str(error).splitlines()[0])
        return None
    return probs


def _write_splits(
    folder: Path, manifest: Mapping[str, Any], rows: pa.Table, truth: np.ndarray, fold: np.ndarray, k: int
) -> None:
    """Writes splits with the manifest's fingerprint, so that a training takes them for current: test is the held-out fold."""
    rest = np.flatnonzero((fold != k) & (fold != -1))
    rest = rest[np.argsort(truth[rest], kind="stable")]
    # A tenth of each label's rows chooses the epoch; the first one of a label is always in train.
    is_val = (np.arange(len(rest)) - np.searchsorted(truth[rest], truth[rest])) % 10 == 1
    splits: dict[str, Any] = {}
    with storage.writing(folder):
        folder.mkdir(exist_ok=True)
        for split, places in zip(SPLITS, (rest[~is_val], rest[is_val], np.flatnonzero(fold == k)), strict=True):
            pq.write_table(rows.take(pa.array(np.sort(places))), folder / f"{split}.parquet")
            counts = np.bincount(truth[places], minlength=len(manifest["labels"])).tolist()
            entry = {"n_rows": len(places), "labels": dict(zip(manifest["labels"], counts, strict=True))}
            splits[split] = {**entry, "sha256": storage.sha256_of(folder / f"{split}.parquet")}
        storage.write_json(folder / MANIFEST, {**manifest, "splits": splits})


def _train_and_answer(config: Config, folder: Path, train: Callable[[Config], Any], texts: Sequence[str]) -> np.ndarray:
    """Trains on the splits in a folder, from the last epoch of an earlier try; returns the answers for cleaned texts."""
    no_promises = dict.fromkeys(PromiseConfig.model_fields)  # val of a fold may have too few rows for them
    evaluate = config.evaluate.model_copy(update={**no_promises, "split": "none", "splits_dir": str(folder)})
    more = {"evaluate": evaluate, "export": ExportConfig(variants=["float32"]), "logger": LoggerConfig()}
    try:
        train(config.model_copy(update={"run_dir": str(folder / "run"), "ckpt_path": "last", **more}))
    except (KeyboardInterrupt, Terminated) as stop:
        raise type(stop)("the same command goes on from the last epoch") from None
    return Predictor(folder / "run/bundle", "float32").probs_of_cleaned(texts)
