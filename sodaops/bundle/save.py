"""Writes a bundle from a trained model, and reads it back into torch."""

import math
import platform
import re
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from tokenizers import Tokenizer

from sodaops.bundle import layout
from sodaops.bundle.files import parsing, printable
from sodaops.config.schema import Config
from sodaops.errors import BundleError, ConfigError
from sodaops.io import storage
from sodaops.modeling.encoder import LINEAR, TextEncoder, from_settings, separator_of, settings_of
from sodaops.tasks.base import Task
from sodaops.tasks.make import SINGLE_LABEL
from sodaops.text import cleaning

_PACKAGES = ("torch", "transformers", "tokenizers", "lightning", "numpy")


class Loaded(NamedTuple):
    """A bundle in memory."""

    info: layout.BundleInfo
    model: TextEncoder  # in eval mode, on the CPU
    tokenizer: Tokenizer
    task: Task


def save_bundle(
    path: str | Path,
    model: TextEncoder,
    tokenizer: Tokenizer,
    pad_token_id: int,
    config: Config,
    manifest: Mapping[str, Any],
    metrics: dict[str, dict[str, float]],
    task: Task = SINGLE_LABEL,
) -> layout.BundleInfo:
    """Writes the bundle, whole or not at all.

    Args:
        path: the folder; an existing bundle is replaced.
        model: with the weights to keep.
        tokenizer: the model's; its padding and truncation are turned off.
        pad_token_id: the token that pads batches.
        config: the run's configuration.
        manifest: of the splits that it was trained on.
        metrics: split -> metric -> value at the end of training.
        task: with its parameters.

    Raises:
        StorageError: the disk is full, or the folder cannot be written to.
    """
    tokenizer.no_padding()
    tokenizer.no_truncation()
    with storage.atomic_folder(path, layout.NAMES) as folder:
        try:
            for name, part in ((layout.WEIGHTS, model.transformer), (layout.HEAD, model.head)):
                weights = {key: tensor.detach().cpu().contiguous() for key, tensor in part.state_dict().items()}
                save_file(weights, folder / name, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from error
        storage.write_json(
            folder / layout.ENCODER, _without_paths({**settings_of(model.transformer), "head": model.head_section})
        )
        (folder / layout.TOKENIZER).write_text(tokenizer.to_str(), encoding="utf-8")
        n_columns = len(config.data.text_columns)
        settings = tokenizer_settings(tokenizer, pad_token_id, config.model.max_tokens, n_columns, model.separator)
        storage.write_json(folder / layout.TOKENIZER_SETTINGS, settings)
        settings = _without_paths(config.model_copy(update={"run_dir": None}).model_dump(mode="json"))
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        (folder / layout.CONFIG).write_text(text, encoding="utf-8")
        storage.write_json(folder / layout.DATA, _without_paths(manifest))
        return layout.write_info(
            folder,
            labels=manifest["labels"],
            task=task.section(),
            cleaning=config.data.cleaning,
            **config.model.limit._asdict(),
            pooling=config.model.pooling,
            pad_token_id=pad_token_id,
            metrics={split: {name: x for name, x in of.items() if math.isfinite(x)} for split, of in metrics.items()},
            data={
                "name": config.data.name,
                "fingerprint": manifest["fingerprint"],
                "text_column": config.data.text_column,
                **({"slice_columns": config.data.slice_columns} if config.data.slice_columns else {}),
            },
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            git_commit=git_commit(),
            versions={
                "python": platform.python_version(),
                **{name: version(name) for name in _PACKAGES},
                **cleaning.code_of(config.data.cleaning),
            },
        )


def tokenizer_settings(
    tokenizer: Tokenizer, pad_token_id: int, max_tokens: int, n_columns: int, separator: int | None
) -> dict[str, Any]:
    """What transformers needs to know about a tokenizer besides tokenizer.json; ``separator`` as of :class:`TextEncoder`."""
    types = [] if separator is None else ["token_type_ids"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": tokenizer.id_to_token(pad_token_id),
        "model_max_length": max_tokens,
        "model_input_names": ["input_ids", "attention_mask", *types],
        **({"split_special_tokens": True} if n_columns > 1 else {}),
    }


def _without_paths(value: Any) -> Any:
    """A JSON value in which absolute paths of this machine are cut to their last part.

    >>> _without_paths({"path": "/home/me/tweets.csv", "_name_or_path": "~/encoder", "rest": ["data/raw", "gs://bucket/x", 1]})
    {'path': 'tweets.csv', '_name_or_path': 'encoder', 'rest': ['data/raw', 'gs://bucket/x', 1]}
    """
    if isinstance(value, Mapping):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    if isinstance(value, str) and re.match(r"/|~|[A-Za-z]:[\\/]|(file|sqlite):", value):
        return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    return value


def load_bundle(path: str | Path) -> Loaded:
    """Reads and verifies a bundle, without any configuration.

    Raises:
        BundleError: missing, incomplete, damaged, or with a class that cannot be imported here.
    """
    info = layout.read_info(path)
    task = layout.task_of(path, info)
    encoder = layout.OLDER_ENCODER if info.format == 1 else layout.ENCODER
    layout.verify(path, info, {*info.files} - {encoder, layout.WEIGHTS, layout.HEAD, layout.TOKENIZER})
    settings = layout.read_json(path, info, encoder)
    weights = _read_weights(path, info, layout.WEIGHTS, "" if info.format == 1 else "transformer.")
    if info.format > 1:
        weights |= _read_weights(path, info, layout.HEAD, "head.")
    with parsing(f"{path}: {encoder} and {layout.WEIGHTS}"):
        for section in (settings, settings.get("head", {})):
            _check_layers(section, len(weights))
        n_outputs = task.n_outputs(len(info.labels))
        with torch.device("meta"):  # compares names and shapes, before memory is taken for them
            _encoder(path, info, settings, n_outputs).load_state_dict(weights, assign=True)
        model = _encoder(path, info, settings, n_outputs)
        model.load_state_dict(weights)
    with parsing(Path(path) / layout.TOKENIZER):
        tokenizer = Tokenizer.from_buffer(layout.read_file(path, info, layout.TOKENIZER))
        model.separator = separator_of(model.transformer, tokenizer, len(info.text_columns))
    return Loaded(info, model.eval(), tokenizer, task)


def _read_weights(path: str | Path, info: layout.BundleInfo, name: str, prefix: str) -> dict[str, torch.Tensor]:
    with parsing(Path(path) / name):
        return {f"{prefix}{key}": tensor for key, tensor in load(layout.read_file(path, info, name)).items()}


def _encoder(path: str | Path, info: layout.BundleInfo, settings: Mapping[str, Any], n_outputs: int) -> TextEncoder:
    # attn_implementation could name code to download; bundles of older versions, which are linear, name no head.
    safe = {key: value for key, value in settings.items() if key != "head" and "attn_implementation" not in key}
    try:
        return TextEncoder(from_settings(safe), n_outputs, info.pooling, dropout=0.0, head=settings.get("head", LINEAR))
    except ConfigError as error:
        raise BundleError(
            f"{path}: {printable(str(error))} Only training, export and the gate need the class; serving and predicting do not."
        ) from error


def _check_layers(settings: Mapping[str, Any], n_weights: int) -> None:
    """Refuses settings that would build layers without end; each layer has weights."""
    for key, value in settings.items():
        if "layer" in key and isinstance(value, int) and value > n_weights:
            raise ValueError(f"{key}={value}, but there are {n_weights} weights")


def git_commit() -> str | None:
    """The commit of the running code, with a ``+`` if tracked files differ from it; None outside its repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # fails if installed within another repository
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
