"""Validates a composed configuration, and reports all faults in one error."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from sodaops.config.extensions import construct
from sodaops.config.reference import unknown_key
from sodaops.config.schema import FORMATS, Config, LoggerConfig, table_format
from sodaops.errors import ConfigError, nearest
from sodaops.text import trust

# In JSON: a value with the name of a secret, or an address with a password.
_SECRET = re.compile(r'(?i)"(\w*(?:password|passwd|secret|token|api_?key))": "|://[^/@\s"]*:[^/@\s"]+@')


def build_config(tree: Mapping[str, Any]) -> Config:
    """Validates a composed configuration.

    Args:
        tree: plain dictionaries, lists and scalars, as from ``OmegaConf.to_container``.

    Raises:
        ConfigError: all unknown keys, wrong types, invalid values and contradictions between keys.
    """
    try:
        config = Config.model_validate(dict(tree))
    except ValidationError as error:
        raise _error([_fault(detail) for detail in error.errors()]) from None
    faults = [*_contradictions(config), *_task_faults(config)]
    if faults:
        raise _error(faults)
    trust.configured.update((config.data.cleaning, config.task["_target_"]))  # bundles may name them in this process
    return config


def _error(faults: Sequence[str]) -> ConfigError:
    heading = "" if len(faults) == 1 else f"{len(faults)} faults in the configuration:\n- "
    return ConfigError(heading + "\n- ".join(faults))


def _fault(detail: Mapping[str, Any]) -> str:
    """One of pydantic's errors in words."""
    loc = [part for part in detail["loc"] if part not in ("str", "int")]  # without the members of a union of types
    key, value = ".".join(map(str, loc)), detail["input"]
    if detail["type"] == "extra_forbidden":
        return unknown_key(key) or f"{key} is not a key."
    if detail["type"] == "missing":
        return f"{key} is missing; set {key}=VALUE."
    if loc[:1] == ["data"] and isinstance(value, bool | float | None) and detail["type"] in ("string_type", "int_type"):
        text = "null" if value is None else str(value).lower()
        return f'{key}={value!r}: expected text; write it as in the table, in quotes ("{text}").'
    message = detail["msg"].replace("Input should be ", "expected ")
    hint = nearest(value, re.findall(r"'([^']+)'", message))
    if loc[0] == "logger" and detail["type"] == "target":
        hint = nearest(loc[-1], LoggerConfig.model_fields)
    return f"{key}={value!r}: {message[0].lower()}{message[1:]}{hint}."


def _task_faults(config: Config) -> Iterator[str]:
    task = construct("task", config.task)
    if not hasattr(task, "faults"):
        raise ConfigError(f"task._target_={config.task['_target_']}: expected a class derived from sodaops.tasks.base.Task.")
    yield from task.faults(config)


def _contradictions(config: Config) -> Iterator[str]:
    """Faults that involve several values."""
    data = config.data
    files = data.files.model_dump()
    given = [path is not None for path in files.values()]
    if [data.path is not None, data.source is not None, any(given)].count(True) != 1 or any(given) != all(given):
        yield "data.path or data.files or data.source: set one (data.path=FILE, or data.files.train=, .val= and .test=)."
    if (secret := _SECRET.search(json.dumps(data.source, default=str))) is not None:
        name = secret[1] or "the password in an address"
        yield f"data.source has a secret ({name}), which runs would store; read it from the environment in the function."
    for key, path in {"data.path": data.path, **{f"data.files.{split}": path for split, path in files.items()}}.items():
        if path is not None and table_format(path) is None:
            yield f"{key}={path!r}: expected a name that ends in {', '.join(FORMATS)}, with or without .gz."
    if abs(sum(data.fractions) - 1) > 1e-9:
        yield f"data.fractions={data.fractions}: they sum to {sum(data.fractions):g}; expected 1."
    if data.unlabelled is not None and not config.teachers:
        yield f"data.unlabelled={data.unlabelled} has no effect without teacher; set teacher=RUN/bundle."
    if isinstance(layers := config.model.layers, list) and (not layers or layers != sorted(set(layers))):
        yield f"model.layers={layers}: expected increasing indices of layers, such as [0, 2, 4], or a number of layers."
    shares = config.annotate.shares.model_dump()
    if abs(sum(shares.values()) - 1) > 1e-9:
        yield f"annotate.shares={shares}: they sum to {sum(shares.values()):g}; expected 1."
    drift = config.drift  # eight features share alpha, and the smallest p-value is 1 / (n_permutations + 1)
    if (drift.n_permutations + 1) * drift.alpha / 8 <= 1:
        yield (
            f"drift.alpha={drift.alpha:g} with drift.n_permutations={drift.n_permutations}: no p-value can be so small; set "
            f"drift.n_permutations={int(8 / drift.alpha) + 1} or more."
        )
    if drift.last > drift.max_rows:
        yield f"drift.last={drift.last} is above drift.max_rows={drift.max_rows}; raise drift.max_rows as well."
    if data.labels is not None:
        names = [str(label) for label in data.labels]
        if len(set(names)) < max(2, len(names)):
            yield f"data.labels={data.labels}: expected at least two labels, each once."
        for value, label in (data.label_map or {}).items():
            if label not in names:
                yield f"data.label_map.{value}={label!r}: expected one of {', '.join(names)}{nearest(label, names)}."
        if data.vote_columns is not None and sorted(data.vote_columns) != sorted(names):
            yield f"data.vote_columns has {', '.join(data.vote_columns)}; expected a column for each of {', '.join(names)}."
    elif data.vote_columns is not None:
        yield "data.vote_columns needs data.labels."
    if "int8" in config.export.variants and "float32" not in config.export.variants:
        yield f"export.variants={config.export.variants}: int8 is compared with float32; list both."
    if not config.export.variants and config.evaluate.split != "none" and config.evaluate.bundle is None:
        yield "export.variants=[]: evaluation needs an ONNX model; set evaluate.split=none too."
    if config.evaluate.promises and not config.export.variants:
        yield f"export.variants=[]: evaluate.{next(iter(config.evaluate.promises))} needs an ONNX model; set it to null too."
    if config.model.long_texts == "windows" and len(data.text_columns) > 1:
        yield f"model.long_texts=windows: not with several columns, data.text_column={data.text_columns}; set truncate."
    for key in ("stride", "max_windows") if config.model.long_texts == "truncate" else ():
        if (value := getattr(config.model, key)) is not None:
            yield f"model.{key}={value} has no effect without model.long_texts=windows; set that, or model.{key}=null."
    if config.model.encoder is not None and config.model.overrides:
        yield "model.overrides has no effect on model.encoder; set model.overrides=null."
    if config.model.encoder is not None and config.model.layers is not None:
        yield f"model.layers={config.model.layers} has no effect on model.encoder; set model.layers=null."
    if config.model.lora is not None and config.optim.frozen_layers is not None:
        yield f"model.lora freezes the encoder; set optim.frozen_layers=null, not {config.optim.frozen_layers}."
    if config.model.lora is not None and config.trainer.get("strategy") == "fsdp":
        yield "model.lora: not with trainer.strategy=fsdp; set trainer=ddp."
    if config.optim.batch_texts is not None and config.trainer.get("accumulate_grad_batches", 1) != 1:
        yield (
            f"optim.batch_texts={config.optim.batch_texts} sets trainer.accumulate_grad_batches; "
            "set trainer.accumulate_grad_batches=1, or optim.batch_texts=null."
        )
    if config.optim.batch_tokens < config.model.max_tokens:
        yield (
            f"optim.batch_tokens={config.optim.batch_tokens} is under model.max_tokens={config.model.max_tokens}; "
            "a batch must hold the longest text."
        )
