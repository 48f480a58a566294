"""Writes a bundle from a trained model, and reads it back into torch."""

import json
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from sodaops.bundle import layout
from sodaops.config.schema import Config
from sodaops.errors import BundleError
from sodaops.io import storage
from sodaops.modeling.encoder import TextEncoder, from_settings, settings_of

_PACKAGES = ("torch", "transformers", "tokenizers", "lightning", "numpy")


class Loaded(NamedTuple):
    """A bundle in memory."""

    info: layout.BundleInfo
    model: TextEncoder  # in eval mode, on the CPU
    tokenizer: Tokenizer


def save_bundle(
    path: str | Path,
    model: TextEncoder,
    tokenizer: Tokenizer,
    pad_token_id: int,
    config: Config,
    manifest: Mapping[str, Any],
    metrics: dict[str, dict[str, float]],
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

    Raises:
        StorageError: the disk is full, or the folder cannot be written to.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    tokenizer.no_padding()
    tokenizer.no_truncation()
    with storage.atomic_folder(path, layout.NAMES) as folder:
        try:
            save_file(weights, folder / layout.WEIGHTS)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        storage.write_json(folder / layout.ENCODER, settings_of(model.transformer))
        (folder / layout.TOKENIZER).write_text(tokenizer.to_str(), encoding="utf-8")
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        (folder / layout.CONFIG).write_text(text, encoding="utf-8")
        storage.write_json(folder / layout.DATA, dict(manifest))
        return layout.write_info(
            folder,
            labels=manifest["labels"],
            cleaning=config.data.cleaning,
            max_tokens=config.model.max_tokens,
            pooling=config.model.pooling,
            pad_token_id=pad_token_id,
            metrics=metrics,
            data={
                "name": config.data.name,
                "fingerprint": manifest["fingerprint"],
                "text_column": config.data.text_column,
            },
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            git_commit=git_commit(),
            versions={"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        )


def load_bundle(path: str | Path) -> Loaded:
    """Reads and verifies a bundle, without any configuration.

    Raises:
        BundleError: missing, incomplete or damaged.
    """
    info = layout.read_info(path)
    layout.verify(path, info)
    path = Path(path)
    try:
        transformer = from_settings(json.loads((path / layout.ENCODER).read_text(encoding="utf-8")))
        model = TextEncoder(transformer, len(info.labels), info.pooling, dropout=0.0)  # type: ignore[arg-type]
        model.load_state_dict(load_file(path / layout.WEIGHTS))
        tokenizer = Tokenizer.from_file(str(path / layout.TOKENIZER))
    except (RuntimeError, KeyError, ValueError, SafetensorError) as error:
        first = str(error).splitlines()[0]
        raise BundleError(f"{path}: its files do not fit together ({first}). Copy it again or train again.") from error
    return Loaded(info, model.eval(), tokenizer)


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
