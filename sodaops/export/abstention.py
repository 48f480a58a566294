"""Chooses a bundle's thresholds and cutoffs on val, and writes them to its bundle.json."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sodaops.bundle import layout
from sodaops.config.model import PromiseConfig
from sodaops.data.preprocess import read_split
from sodaops.errors import ConfigError
from sodaops.inference.predictor import Predictor
from sodaops.io import storage
from sodaops.tasks.abstention import check_counts, choose_levels
from sodaops.tasks.base import Task


def promises_of(settings: PromiseConfig, info: layout.BundleInfo) -> dict[str, Any]:
    """The targets that are set, or else those that a bundle was last exported with."""
    return settings.promises or {name: of for name, of in (info.abstention or {}).items() if name != "variants"}


def check_promises(promises: Mapping[str, Any], task: Task, manifest: Mapping[str, Any]) -> None:
    """Refuses promises that this task, or val with so many rows, cannot give.

    Raises:
        ConfigError: names the key.
    """
    if not task.has_one_label:
        raise ConfigError(f"evaluate.{next(iter(promises))}: task={task.name} has no single label with a confidence.")
    check_counts(promises, manifest["labels"], manifest["splits"]["val"]["labels"])


def add_promises(path: str | Path, splits_dir: str | Path, promises: Mapping[str, Any]) -> layout.BundleInfo:
    """Chooses thresholds and cutoffs for each ONNX variant of a bundle; they change its bundle.json, and its id.

    Args:
        path: the bundle.
        splits_dir: the splits that it was trained with; only val is read.
        promises: the targets, as in conf/evaluate; none: the bundle stays as it is.

    Raises:
        ConfigError: no threshold reaches a target.
    """
    info = layout.read_info(path)
    if not promises:
        return info
    table, variants = read_split(splits_dir, "val"), {}
    for variant in info.onnx:
        predictor = Predictor(path, variant)
        probs = predictor.probs_of_cleaned(table["text"].to_pylist())
        kept = ~np.isnan(probs).any(axis=1)
        probs, truth = probs[kept], predictor.task.truth(table)[kept]
        levels = choose_levels(promises, probs, predictor.task.groups(probs), truth, info.labels)
        variants[variant] = {"model": info.files[layout.ONNX[variant]], **levels}
    fields = {name: value for name, value in vars(info).items() if name not in ("files", "bundle_id")}
    fields["abstention"] = {**promises, "variants": variants}
    with storage.atomic_folder(path, layout.NAMES) as folder:
        for name in info.files:
            shutil.copyfile(Path(path) / name, folder / name)
        return layout.write_info(folder, **fields)
