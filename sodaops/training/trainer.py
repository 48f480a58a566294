"""Builds Lightning's Trainer from conf/trainer, and the callbacks of the configuration."""

import inspect
import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_type_hints

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import ModelParallelStrategy
from pydantic import ConfigDict, TypeAdapter, ValidationError

from sodaops.config.extensions import build
from sodaops.config.monitor import monitor_mode
from sodaops.config.schema import Config
from sodaops.errors import ConfigError, nearest
from sodaops.io import ranks
from sodaops.training.callbacks import Checkpoint, Patience
from sodaops.training.progress import Bar, progress_callbacks
from sodaops.training.resume import continues_in_place

_NOT_CONFIGURABLE = {"self", "logger", "callbacks", "plugins", "model_registry", "default_root_dir"}


def trainer_arguments(section: Mapping[str, Any]) -> dict[str, Any]:
    """Checks the names and types in conf/trainer against the signature of lightning.Trainer.

    Raises:
        ConfigError: all arguments that do not fit.
    """
    allowed = {name for name in inspect.signature(L.Trainer.__init__).parameters if name not in _NOT_CONFIGURABLE}
    hints = get_type_hints(L.Trainer.__init__)
    for name in ("precision", "max_epochs"):
        hints[name] = Literal["auto"] | hints[name]
    faults = []
    for name, value in section.items():
        if name not in allowed:
            faults.append(f"trainer.{name} is not an argument of lightning.Trainer{nearest(name, allowed)}.")
            continue
        adapter = TypeAdapter(hints[name], config=ConfigDict(arbitrary_types_allowed=True, strict=True))
        try:
            adapter.validate_python(value)
        except ValidationError as error:
            expected = dict.fromkeys(detail["msg"].removeprefix("Input should be ") for detail in error.errors())
            faults.append(f"trainer.{name}={value!r}: expected {' or '.join(expected)}.")
    if isinstance(n_epochs := section.get("max_epochs"), int) and (n_epochs == 0 or n_epochs < -1):
        faults.append(f"trainer.max_epochs={n_epochs}: expected auto, a number above 0, or -1 for no limit.")
    if section.get("limit_val_batches") == 0:
        faults.append("trainer.limit_val_batches=0: the best epoch is chosen on val; set a number above 0.")
    if faults:
        raise ConfigError("\n".join(faults))
    return dict(section)


def make_trainer(arguments: dict[str, Any], loggers: list[Logger], callbacks: list[Callback], run_dir: Path) -> L.Trainer:
    """Builds Lightning's Trainer.

    Raises:
        ConfigError: Lightning refuses an argument, or this machine lacks the device.
    """
    shown = progress_callbacks(arguments.get("enable_progress_bar"))
    callbacks = [*callbacks, *shown]
    arguments = {**arguments, "enable_progress_bar": any(isinstance(callback, Bar) for callback in shown)}
    if arguments.get("enable_checkpointing") is False:
        callbacks = [callback for callback in callbacks if not isinstance(callback, ModelCheckpoint)]
    if arguments["strategy"] == "fsdp":
        n_shards = ranks.world_size(os.environ)
        arguments["strategy"] = ModelParallelStrategy(n_shards, 1, save_distributed_checkpoint=False)
    try:
        return L.Trainer(**arguments, logger=loggers or False, callbacks=callbacks, default_root_dir=run_dir)
    except (ValueError, TypeError, ZeroDivisionError, ModuleNotFoundError) as error:
        raise ConfigError(f"trainer: {str(error).splitlines()[0]}") from error
    except MisconfigurationException as error:
        given = ", ".join(f"trainer.{key}={arguments.get(key)}" for key in ("accelerator", "devices", "strategy"))
        raise ConfigError(f"{str(error).splitlines()[0]} ({given}). Choose devices that this machine has.") from error


def make_checkpoints(config: Config, run_dir: Path) -> list[Checkpoint]:
    """The callbacks that write best.ckpt, step.ckpt if ``checkpoint.every_n_train_steps`` is set, and last.ckpt.

    In this order, so that step.ckpt and last.ckpt hold the state of the best one. (Lightning's ``save_last`` would keep the
    last epoch that improved the metric, not the last one.)
    """
    folder, resumed = run_dir / "checkpoints", config.ckpt_path
    best = Checkpoint(folder, resumed, filename="best", monitor=config.checkpoint.monitor, mode=monitor_mode(config))
    steps = []
    if config.checkpoint.every_n_train_steps is not None:
        every = {"every_n_train_steps": config.checkpoint.every_n_train_steps, "save_on_train_epoch_end": False}
        steps.append(Checkpoint(folder, resumed, filename="step", **every))
    return [best, *steps, Checkpoint(folder, resumed, filename="last", every_n_epochs=1)]


def make_callbacks(config: Config, run_dir: Path) -> list[Callback]:
    """Early stopping, if it is on, and the callbacks of conf/callbacks.

    Raises:
        ConfigError: a callback that cannot be made, or is none.
    """
    callbacks: list[Callback] = []
    if config.early_stopping.patience is not None:
        metric = {"monitor": config.checkpoint.monitor, "mode": monitor_mode(config)}
        resumed_from = None if continues_in_place(config, run_dir) else config.ckpt_path
        callbacks.append(Patience(resumed_from, patience=config.early_stopping.patience, **metric))
    for name, section in config.callbacks.items():
        callbacks.append(build(f"callbacks.{name}", section, kind=Callback))
    return callbacks


def silence_loggers() -> None:
    """Hides messages of libraries about themselves, but not their warnings."""
    for name in ("lightning.pytorch", "lightning.fabric", "gcsfs"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for notice in ("LeafSpec.* is deprecated", "smaller than the logging interval", "exists and is not empty"):
        warnings.filterwarnings("ignore", message=f".*{notice}")
