"""The default of ``data.name``, as a resolver that conf/data uses; Hydra's plugin registers it in DVC's process too."""

import re
from pathlib import PurePosixPath

from omegaconf import DictConfig, OmegaConf


def table_name(path: str) -> str:
    """A name for the splits of a table: that of its file, without what a folder's name must not have.

    >>> table_name("gs://bucket/Reviews 2024.csv.gz")
    'Reviews-2024'
    """
    stem = PurePosixPath(re.sub(r"\.gz$", "", path, flags=re.IGNORECASE)).stem
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", stem).strip("-_.") or "data"


def _data_name(*, _parent_: DictConfig) -> str:
    """The name of ``data.path``, of the folder of ``data.files.train``, or of ``data.source``; its faults are found later."""
    for section, key in ((_parent_, "path"), (_parent_.get("files"), "train"), (_parent_.get("source"), "_target_")):
        if isinstance(section, DictConfig) and not OmegaConf.is_missing(section, key) and isinstance(section.get(key), str):
            path = section[key]
            return table_name({"path": path, "train": str(PurePosixPath(path).parent)}.get(key, path.rpartition(".")[2]))
    return "data"


OmegaConf.register_new_resolver("data_name", _data_name, replace=True)
