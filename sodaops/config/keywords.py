"""The keywords of the Python API: short names of configuration keys, which become overrides as on the command line."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sodaops.config.keys import group_options
from sodaops.errors import ConfigError, nearest, some

_COLUMNS = {"text": "data.text_column", "label": "data.label_column", "label_map": "data.label_map"}
KEYWORDS = {  # function -> keyword -> configuration key
    "train": _COLUMNS | {
        "labels": "data.labels", "slices": "data.slice_columns", "cleaning": "data.cleaning", "name": "data.name",
        "task": "task", "model": "model", "max_tokens": "model.max_tokens", "lr": "optim.lr",
        "batch_tokens": "optim.batch_tokens", "max_epochs": "trainer.max_epochs", "precision": "trainer.precision",
        "devices": "trainer.devices", "patience": "early_stopping.patience", "logger": "logger",
        "experiment": "experiment", "seed": "seed", "run_dir": "run_dir", "ckpt_path": "ckpt_path",
    },
    "evaluate": _COLUMNS | {
        "slices": "data.slice_columns", "variant": "evaluate.variant", "split": "evaluate.split",
        "n_bootstrap": "evaluate.n_bootstrap", "output_dir": "evaluate.output_dir",
    },
    "drift": {key: f"drift.{key}" for key in ("last", "since", "until", "alpha", "output_dir")},
    "Registry": {},
}  # fmt: skip


def as_overrides(function: str, values: Mapping[str, Any], overrides: Iterable[str] = ()) -> list[str]:
    """Keywords as overrides in Hydra's syntax, and further overrides after them.

    Raises:
        ConfigError: keywords that do not exist, or overrides that are none or set the key of a keyword.

    >>> as_overrides("train", {"text": "review", "labels": ["no", "yes"], "model": "org/name"}, ["optim.warmup=0"])
    ["data.text_column='review'", 'data.labels=\\'["no", "yes"]\\'', "model.name_or_path='org/name'", 'optim.warmup=0']
    """
    keys = KEYWORDS[function]
    known = f"it has {some(list(keys), 40)}; overrides=['KEY=VALUE'] sets any key of the configuration"
    unknown = [name for name in values if name not in keys]
    faults = [f"{name} is not a keyword of sodaops.{function}{nearest(name, keys)}; {known}." for name in unknown]
    words = [override(keys[name], value) for name, value in values.items() if name in keys]
    taken = {word.partition("=")[0] for word in words}
    for text in (overrides := [overrides] if isinstance(overrides, str) else list(overrides)):
        if not re.match(r"[+~]*\w[^=]*=", str(text)):
            faults.append(f"overrides: {text!r}: expected KEY=VALUE.")
        elif (key := text.partition("=")[0].lstrip("+~")) in taken:
            faults.append(f"overrides: {text}: a keyword sets {key} too; remove one of them.")
        elif re.match(r"hydra\b", key) and key != "hydra.searchpath":
            faults.append(
                f"overrides: {text}: of Hydra only hydra.searchpath can be set from Python; sweeps need the command line."
            )
    if faults:
        raise ConfigError("\n".join(faults))
    return [*words, *overrides]


def override(key: str, value: Any) -> str:
    """An override that sets a key to a value of Python, whatever characters a text has.

    Raises:
        ConfigError: a value that a configuration cannot hold.
    """
    value = value.tolist() if hasattr(value, "tolist") else value  # of numpy and pandas
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if isinstance(value, str):
        if key == "model" and value not in group_options("model") and (re.search("[/:]", value) or Path(value).is_dir()):
            key = "model.name_or_path"
        escaped = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)  # no interpolation
        escaped = re.sub(r"(\\+)(?='|\Z)", r"\1\1", escaped).replace("'", r"\'")
        return f"{key}='{escaped}'"
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        raise ConfigError(f"{key}={value!r}: expected text, a number, true, false, a list or a dictionary.") from None
    if key.startswith("data.") and '"' in text:  # as JSON, since Hydra would change some labels
        return key + "='" + text.replace("'", r"\u0027").replace("${", r"\u0024{") + "'"
    return f"{key}={text}"
