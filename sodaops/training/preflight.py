"""Checks before a training of what would otherwise fail during or after it: tables, folders, servers, disk space, export."""

import contextlib
import copy
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from sodaops.bundle.save import load_bundle, save_bundle
from sodaops.config.extensions import load
from sodaops.config.monitor import monitor_mode
from sodaops.config.schema import Config
from sodaops.data.preprocess import check_table
from sodaops.data.tokens import tokenise
from sodaops.data.unlabelled import check_unlabelled
from sodaops.errors import ModelError, SodaOpsError, StorageError, joined, reason_of
from sodaops.export import onnx_export, packing, quantization
from sodaops.io import ranks, remote, storage
from sodaops.io.runs import flatten
from sodaops.modeling import encoder, heads
from sodaops.modeling.encoder import Pretrained, TextEncoder, from_settings, random_encoder, separator_of, settings_of
from sodaops.modeling.losses import make_loss
from sodaops.modeling.optim import freeze, make_optimizer, make_scheduler, parameter_groups
from sodaops.modeling.pretrained import load_pretrained
from sodaops.modeling.probe import TEXT, check_head_and_loss, name_of
from sodaops.tasks.base import Task
from sodaops.tasks.make import make_task
from sodaops.text import cleaning, columns
from sodaops.training.resume import run_dir_of
from sodaops.training.tracking import check_loggers
from sodaops.training.trainer import trainer_arguments
from sodaops.training.upload import check_address
from sodaops.training.wandb_server import check_key

_DEPTH = 2  # layers of the copy that is saved and exported; that takes 3 s for MiniLM, and 6 s with all its layers
_CODE, _PACKAGES = (encoder, heads, onnx_export, packing, quantization), ("torch", "transformers", "onnxscript", "onnxruntime")


def check_targets(config: Config) -> None:
    """Checks what needs no model: arguments of the trainer, tables, and all places that a training writes to.

    Raises:
        SodaOpsError: all faults in one, with those of the model.
    """
    if not ranks.is_rank_zero(os.environ):
        return
    faults = _faults(_target_checks(config))
    if faults:
        raise joined(
            [*faults, *_faults([lambda: check_bundle(config, load_pretrained(config.model), len(config.data.labels or "ab"))])]
        )


def check_bundle(config: Config, pretrained: Pretrained, n_labels: int) -> None:
    """Checks the disk space, and that an untrained, shallow copy of the model can be saved, read, and exported.

    No random number is drawn, so that a training is the same with and without this check.

    Raises:
        SodaOpsError: all faults in one.
    """
    writes = config.trainer.get("enable_checkpointing") is not False and not config.trainer.get("fast_dev_run")
    if not writes or not ranks.is_rank_zero(os.environ):
        return
    with isolate_rng(include_cuda=False):
        checks = (_check_disk, _check_optimizer, partial(_check_export, n_labels=n_labels))
        faults = _faults([partial(check, config, pretrained) for check in checks])
    if faults:
        raise joined(faults)


def _faults(checks: Iterable[Callable[[], object]]) -> list[SodaOpsError]:
    faults = []
    for check in checks:
        try:
            check()
        except SodaOpsError as error:
            faults.append(error)
    return faults


def _target_checks(config: Config) -> Iterable[Callable[[], object]]:
    yield partial(trainer_arguments, config.trainer)
    for key, path in flatten(config.model_dump()):
        if key.endswith("._target_") and not key.startswith("data.source."):  # check_table calls it
            yield partial(load, key, path)
    yield partial(cleaning.clean, "A word", config.data.cleaning)
    yield partial(monitor_mode, config)
    for path in config.data.sources.values():
        yield partial(check_table, config.data, path, make_task(config.task))
    yield partial(check_unlabelled, config.data)
    if remote.is_address(config.run_dir):
        yield partial(check_address, config.run_dir)
    else:
        yield partial(_check_folder, "run_dir", str(run_dir_of(config)))
    if config.evaluate.split != "none" and config.evaluate.output_dir is not None:
        yield partial(_check_folder, "evaluate.output_dir", config.evaluate.output_dir)
    yield partial(_check_folder, "registry.path", config.registry.path)
    if config.registry.wandb:
        yield partial(check_key, "registry.wandb=true", "set registry.wandb=false")
    yield partial(check_loggers, config)


def _check_folder(key: str, path: str) -> None:
    """Writes an empty file to a folder, or to the nearest one above it that exists, and deletes it."""
    if remote.is_address(path):
        remote.check_writable(path)
        return
    with storage.writing(f"{key}={path}"), tempfile.TemporaryFile(dir=_existing(Path(path))):
        pass


def _existing(path: Path) -> Path:
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if os.path.lexists(folder))


def _check_disk(config: Config, pretrained: Pretrained) -> None:
    """Compares the free space with the largest size of the run's checkpoints and bundle."""
    model = TextEncoder(pretrained.transformer, 2)
    freeze(model, config.optim.frozen_layers)
    n_all = sum(parameter.numel() for parameter in model.parameters())
    n_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    n_kept = n_trained if config.model.lora is not None else n_all
    checkpoint = 4 * (n_kept + 2 * n_trained)  # bytes: float32 weights, and two moments of each trained one
    n_checkpoints = 3 + (config.checkpoint.every_n_train_steps is not None)  # best, last, and one that is being written
    # The export writes a second bundle, with its models, before the first one is deleted.
    bundles = 4 * n_all * 2 + sum({"float32": 4, "int8": 1}[variant] * n_all for variant in set(config.export.variants))
    needed, run_dir = n_checkpoints * checkpoint + bundles, run_dir_of(config)
    free = shutil.disk_usage(_existing(run_dir)).free
    replaced = [file.stat().st_size for name in ("checkpoints", "bundle") for file in (run_dir / name).glob("*")]
    if needed > free + sum(replaced):
        raise StorageError(
            f"run_dir={run_dir}: checkpoints and bundle take up to {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; "
            "free some space, or set run_dir to a folder on another disk."
        )


def _check_optimizer(config: Config, pretrained: Pretrained) -> None:
    """Makes an optimizer and a scheduler as the training does, of any number of steps."""
    model = TextEncoder(pretrained.transformer, 2)
    freeze(model, config.optim.frozen_layers)
    make_scheduler(make_optimizer(parameter_groups(model, config.optim), config.optim), config.optim, n_steps=1000)


def _check_export(config: Config, pretrained: Pretrained, n_labels: int) -> None:
    """Saves, reads and exports a copy of the model with random weights and few layers, once for each architecture.

    An empty file in the user's cache records that it was done with these versions of code and packages. Classes of the user's
    own may change at any time, so they are always checked.
    """
    name = name_of(config.model)
    task = make_task(config.task)
    n_outputs = task.n_outputs(n_labels)
    n_columns = len(config.data.text_columns)
    separator = separator_of(pretrained.transformer, pretrained.tokenizer, n_columns)
    copied = TextEncoder(_shallow(pretrained.transformer), n_outputs, config.model.pooling, 0.0, config.head, separator)
    loss = make_loss(config.loss, lambda: torch.ones(n_outputs))
    check_head_and_loss(copied, loss, task.example_targets(n_labels), task.any_truth(2, n_labels))
    copied.eval()
    variants = sorted(config.export.variants)
    versions = [*map(version, _PACKAGES), *(storage.sha256_of(str(module.__file__)) for module in _CODE)]
    limit, has_windows = config.model.limit, config.model.limit.max_windows is not None
    settings = [settings_of(copied.transformer), config.model.pooling, config.head, n_labels, config.task, has_windows]
    texts = [columns.join([TEXT[:n_chars]] * n_columns) for n_chars in (len(TEXT), 1, len(TEXT) // 2)]
    tokens = tokenise(pretrained.tokenizer, texts, limit)
    record = storage.cache_dir() / "exported" / storage.sha256_of_json([*settings, separator, variants, versions])
    targets = [config.head["_target_"], config.task["_target_"]]
    is_own = config.model.encoder is not None or not all(target.startswith("sodaops.") for target in targets)
    if record.exists() and not is_own:
        return
    manifest = {"labels": [str(i) for i in range(n_labels)], "fingerprint": ""}
    task = _fitted(task, manifest["labels"])
    rows = [tokens.rows[i] for i in tokens.kept]
    if has_windows:
        rows.append(np.resize(rows[0], limit.max_tokens + len(rows[0])))  # two windows
    with tempfile.TemporaryDirectory(prefix="sodaops.") as folder:
        bundle = Path(folder) / "bundle"
        try:
            save_bundle(bundle, copied, pretrained.tokenizer, pretrained.pad_token_id, config, manifest, {}, task)
            load_bundle(bundle)
        except (RuntimeError, ValueError, TypeError, SodaOpsError) as error:
            raise ModelError(f"{name}: cannot be saved and read again ({reason_of(error)}); choose another model.") from error
        if variants:
            onnx_export.try_export(name, bundle, variants, rows)
    with contextlib.suppress(OSError):  # without a cache it is done again
        record.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        record.touch()


def _fitted(task: Task, labels: Sequence[str]) -> Task:
    """The task with parameters as after a training, of made answers."""
    truth = task.any_truth(2, len(labels))
    task = task.fitted_on_train(truth)
    answers = task.probs(np.zeros((2, task.n_outputs(len(labels))), np.float32))
    return task.fitted(answers, truth, labels) if task.needs_val else task


def _shallow(transformer: nn.Module) -> nn.Module:
    """An encoder of the same architecture with random weights, and with fewer layers where it can be built so."""
    if "_target_" in settings_of(transformer):
        return from_settings(settings_of(transformer))
    settings = copy.deepcopy(transformer.config)
    depth = getattr(settings, "num_hidden_layers", 0)
    if depth > _DEPTH:
        with contextlib.suppress(Exception):  # a configuration of its own kind
            shallow = copy.deepcopy(settings)
            of_layers = [key for key, value in vars(shallow).items() if isinstance(value, list) and len(value) == depth]
            shallow.update({key: getattr(shallow, key)[:_DEPTH] for key in of_layers} | {"num_hidden_layers": _DEPTH})
            return random_encoder(shallow)
    return random_encoder(settings)
