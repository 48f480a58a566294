"""Training: from a configuration to a run folder with a checkpoint, a bundle and an evaluation."""

import inspect
import json
import logging
import os
import pickle
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities.exceptions import SIGTERMException
from pydantic import ConfigDict, TypeAdapter, ValidationError

from sodaops.bundle.layout import BundleInfo
from sodaops.bundle.save import save_bundle
from sodaops.config.schema import Config
from sodaops.data.datamodule import TextDataModule
from sodaops.data.preprocess import describe, ensure_splits
from sodaops.errors import ConfigError, Terminated, TrainingError, nearest, some
from sodaops.io import ranks, storage
from sodaops.modeling.classifier import TextClassifier
from sodaops.modeling.dropout import use_cpu_dropout
from sodaops.modeling.encoder import Pretrained, TextEncoder, load_pretrained
from sodaops.modeling.optim import freeze
from sodaops.training.callbacks import Bar, Checkpoint, Patience, Terminate, make_profiler, profile_table, progress
from sodaops.training.peers import Peers
from sodaops.training.precision import FULL, with_precision
from sodaops.training.tracking import Tracker, tracked

_PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # as gloo says it
LAST = Path("checkpoints/last.ckpt")  # in the run folder
_OWN_TO_A_MACHINE = {"name_or_path", "enable_progress_bar", "profiler"}
_OURS = {"self", "logger", "callbacks", "plugins", "model_registry", "default_root_dir"}


@dataclass(frozen=True)
class Trained:
    """What a training left behind."""

    run_dir: Path
    bundle_dir: Path | None  # None after fast_dev_run, and in all processes of a training but the first
    info: BundleInfo | None
    metrics: dict[str, float]  # of the kept epoch, on val
    score: float | None  # the monitored one


def fit(config: Config, tracker: Tracker | None = None, callbacks: Sequence[Callback] = ()) -> Trained:
    """Preprocesses where needed, trains, and writes the bundle of the best epoch to ``run_dir/bundle``.

    Args:
        config: the whole tree.
        tracker: what is told of it; None: one that is closed at the end.
        callbacks: Lightning's, beside those of the configuration.

    Raises:
        ConfigError, DataError, ModelError: something that the user can mend.
        PrunedError: a sweep stopped it.
        StorageError: a checkpoint or the bundle could not be written.
    """
    config = with_precision(config)
    if tracker is None:
        with tracked(config) as tracker:
            return fit(config, tracker, callbacks)
    run_dir, peers = tracker.run_dir, Peers(os.environ)
    with peers.preparing():
        arguments = trainer_arguments(config.trainer)
        own = config.ckpt_path is not None and Path(config.ckpt_path).resolve() == (run_dir / LAST).resolve()
        _check_checkpoint(config.ckpt_path, None if own else arguments.get("max_epochs"))
        silence_loggers()
        profiler = arguments["profiler"] = make_profiler(arguments.get("profiler"), run_dir)
        L.seed_everything(config.seed, workers=True, verbose=False)
        manifest = ensure_splits(config.data, config.splits_dir)
        print(describe(manifest), flush=True)
        pretrained = load_pretrained(config.model)
        module, data = _module_and_data(config, manifest, pretrained)
        checkpoints, callbacks = (
            _checkpoints(config, run_dir),
            [*_callbacks(config, own), *callbacks, Terminate(run_dir / LAST)],
        )
        tracker.start(manifest)
        trainer = make_trainer(arguments, tracker.loggers, [*callbacks, *checkpoints], run_dir)
        if trainer.world_size > 1 and not ranks.is_distributed(os.environ):
            raise ConfigError(
                f"trainer asks for {trainer.world_size} processes; `sodaops train` and torchrun start them, fit does not."
            )
        if (note := data.note_of_steps(trainer.world_size)) is not None:
            print(note, flush=True)
        peers.agree(_shared(config, module.run_signature))
    with storage.writing(run_dir):
        _run(trainer, module, data, config.ckpt_path, run_dir)
    if not trainer.is_global_zero:
        return Trained(run_dir, None, None, {}, None)
    if arguments["strategy"] == "fsdp":  # what was trained lies in parts on all devices
        module, _ = _module_and_data(config, manifest, load_pretrained(config.model))
    metrics = _take_best(checkpoints[0], module, arguments)
    if isinstance(profiler, SimpleProfiler):
        print(profile_table(profiler.recorded_durations))
    if not metrics:
        return Trained(run_dir, None, None, {}, None)
    info = save_bundle(
        run_dir / "bundle", module.model, pretrained.tokenizer, pretrained.pad_token_id, config, manifest, {"val": metrics}
    )
    tracker.trained(info, metrics)
    return Trained(run_dir, run_dir / "bundle", info, metrics, float(checkpoints[0].best_model_score))


def resolve_last_checkpoint(config: Config) -> Config:
    """``ckpt_path=last`` made the run's own last checkpoint, or null where it has none yet."""
    if config.ckpt_path != "last":
        return config
    last = Path(config.run_dir) / LAST
    return config.model_copy(update={"ckpt_path": str(last) if last.is_file() else None})


def resume_hint(run_dir: Path) -> str:
    """What a run that was cut off says of how to go on."""
    if not (run_dir / LAST).is_file():
        return "no epoch was finished, so nothing is kept"
    return f"go on with run_dir={run_dir} ckpt_path=last"


def _module_and_data(
    config: Config, manifest: Mapping[str, Any], pretrained: Pretrained
) -> tuple[TextClassifier, TextDataModule]:
    n_labels = len(manifest["labels"])
    model = TextEncoder(pretrained.transformer, n_labels, config.model.pooling, config.model.dropout)
    if config.model.random_weights and config.optim.frozen_layers is not None:
        raise ConfigError(
            f"optim.frozen_layers={config.optim.frozen_layers}: model.random_weights draws the layers at random, and frozen "
            "they would stay so; set optim.frozen_layers=null."
        )
    freeze(model, config.optim.frozen_layers)
    use_cpu_dropout(model)
    data = TextDataModule(config, pretrained.tokenizer, pretrained.pad_token_id, n_labels)
    data.setup()
    run_signature = _run_signature(config, manifest)
    _check_same_run(config.ckpt_path, run_signature)
    return TextClassifier(model, config.optim, config.seed, data.class_weights(), run_signature), data


def trainer_arguments(section: Mapping[str, Any]) -> dict[str, Any]:
    """Checks conf/trainer against the signature of lightning.Trainer: names and types.

    Raises:
        ConfigError: every argument that does not fit, at once.
    """
    allowed = {name for name in inspect.signature(L.Trainer.__init__).parameters if name not in _OURS}
    hints = get_type_hints(L.Trainer.__init__)
    hints["precision"] = Literal["auto"] | hints["precision"]
    faults = []
    for name, value in section.items():
        if name not in allowed:
            faults.append(f"trainer.{name} is not an argument of lightning.Trainer{nearest(name, allowed)}.")
            continue
        adapter = TypeAdapter(hints[name], config=ConfigDict(arbitrary_types_allowed=True, strict=True))
        try:
            adapter.validate_python(value)
        except ValidationError as error:
            wanted = dict.fromkeys(detail["msg"].removeprefix("Input should be ") for detail in error.errors())
            faults.append(f"trainer.{name}={value!r}: expected {' or '.join(wanted)}.")
    if not section.get("limit_val_batches", 1.0) and section.get("limit_val_batches") is not None:
        faults.append("trainer.limit_val_batches=0: the epoch to keep is chosen on val; leave it some batches.")
    if faults:
        raise ConfigError("\n".join(faults))
    return dict(section)


def _run_signature(config: Config, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a resumed run must have in common with the run it goes on from; else the checkpoint would mean other things."""
    optim = {f"optim.{name}": value for name, value in config.optim.model_dump().items()}
    data = {"data.labels": list(manifest["labels"]), "the data's fingerprint": manifest["fingerprint"]}
    processes = ranks.world_size(os.environ)  # a step's batch is that of all processes together
    grads = {"trainer.accumulate_grad_batches": config.trainer["accumulate_grad_batches"]}
    sharded = config.trainer["strategy"] == "fsdp"  # which numbers the optimizer's state in another way
    trainer = {"trainer.precision": config.trainer["precision"] or FULL, "trainer.strategy=fsdp": sharded}
    return {"seed": config.seed, **data, **optim, **grads, "processes": processes, **trainer}


def _shared(config: Config, run_signature: Mapping[str, Any]) -> dict[str, Any]:
    """What all processes of a training must have in common, as JSON values."""
    trainer = {f"trainer.{name}": value for name, value in config.trainer.items() if name not in _OWN_TO_A_MACHINE}
    model = {f"model.{name}": value for name, value in config.model.model_dump().items() if name not in _OWN_TO_A_MACHINE}
    return json.loads(
        json.dumps({**run_signature, **trainer, **model, "a checkpoint": config.ckpt_path is not None}, default=str)
    )


def _check_same_run(path: str | None, run_signature: Mapping[str, Any]) -> None:
    if path is None:
        return
    then = torch.load(path, map_location="cpu", weights_only=True).get("begun_with", {})
    unsaid = {"trainer.precision": run_signature["trainer.precision"]}  # by older ones
    then = {"processes": 1, "trainer.strategy=fsdp": False, **unsaid, **then}
    faults = [f"{key}={value}, begun with {then.get(key)}" for key, value in run_signature.items() if then.get(key) != value]
    if faults:
        raise ConfigError(f"ckpt_path={path}: another run than this configuration's ({some(faults)}). Resume with the same.")


def silence_loggers() -> None:
    """Keeps libraries' notices about themselves off the screen; their warnings stay."""
    for name in ("lightning.pytorch", "lightning.fabric", "gcsfs"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for notice in ("LeafSpec.* is deprecated", "smaller than the logging interval", "exists and is not empty"):
        warnings.filterwarnings("ignore", message=f".*{notice}")


def _check_checkpoint(path: str | None, max_epochs: int | None) -> None:
    if path is None:
        return
    mend = "give RUN/checkpoints/last.ckpt of an earlier run"
    if not Path(path).is_file():
        raise ConfigError(f"ckpt_path={path}: no such file; {mend}.")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ConfigError(f"ckpt_path={path}: could not be read ({str(error).splitlines()[0]}); {mend}.") from error
    if not isinstance(found, dict) or not {"state_dict", "optimizer_states", "loops"} <= found.keys():
        raise ConfigError(f"ckpt_path={path}: holds no training state; {mend}.")
    n_done = found["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    if max_epochs is not None and 0 <= max_epochs <= n_done:
        raise ConfigError(f"ckpt_path={path}: that run has done {n_done} epochs; set trainer.max_epochs above that to go on.")


def make_trainer(arguments: dict[str, Any], loggers: list[Logger], callbacks: list[Callback], run_dir: Path) -> L.Trainer:
    """Lightning's Trainer with these arguments.

    Raises:
        ConfigError: what Lightning refuses, or what this machine does not have.
    """
    shown = progress(arguments.get("enable_progress_bar"))
    callbacks = [*callbacks, *shown]
    arguments = {**arguments, "enable_progress_bar": any(isinstance(callback, Bar) for callback in shown)}
    if arguments.get("enable_checkpointing") is False:
        callbacks = [callback for callback in callbacks if not isinstance(callback, ModelCheckpoint)]
    if arguments["strategy"] == "fsdp":
        n_all = ranks.world_size(os.environ)
        arguments["strategy"] = ModelParallelStrategy(n_all, 1, save_distributed_checkpoint=False)
    try:
        return L.Trainer(**arguments, logger=loggers or False, callbacks=callbacks, default_root_dir=run_dir)
    except (ValueError, TypeError, ZeroDivisionError, ModuleNotFoundError) as error:
        raise ConfigError(f"trainer: {str(error).splitlines()[0]}") from error
    except MisconfigurationException as error:
        asked = ", ".join(f"trainer.{key}={arguments.get(key)}" for key in ("accelerator", "devices", "strategy"))
        raise ConfigError(f"{str(error).splitlines()[0]} ({asked}). Ask for what this machine has.") from error


def _checkpoints(config: Config, run_dir: Path) -> list[Checkpoint]:
    """The best epoch, then what resumes: the last epoch, and steps where asked for; in this order, so that what resumes
    knows of the best. (save_last would keep the last epoch that was the best, not the last.)"""
    folder, resumed = run_dir / "checkpoints", config.ckpt_path
    found = [Checkpoint(folder, resumed, filename="best", monitor=config.checkpoint.monitor, mode=config.checkpoint.mode)]
    if config.checkpoint.every_n_train_steps is not None:
        every = {"every_n_train_steps": config.checkpoint.every_n_train_steps, "save_on_train_epoch_end": False}
        found.append(Checkpoint(folder, resumed, filename="step", **every))
    return [*found, Checkpoint(folder, resumed, filename="last", every_n_epochs=1)]


def _callbacks(config: Config, own: bool) -> list[Callback]:
    callbacks: list[Callback] = []
    if config.early_stopping.patience is not None:
        watched = {"monitor": config.checkpoint.monitor, "mode": config.checkpoint.mode}
        callbacks.append(Patience(None if own else config.ckpt_path, patience=config.early_stopping.patience, **watched))
    for name, settings in config.callbacks.items():
        try:
            made = instantiate(settings)
        except Exception as error:  # a user's class may raise anything; say which key it came from
            raise ConfigError(f"callbacks.{name}: {error}") from error
        if not isinstance(made, Callback):
            raise ConfigError(f"callbacks.{name}._target_={settings['_target_']}: makes a {type(made).__name__}, no Callback.")
        callbacks.append(made)
    return callbacks


def _run(trainer: L.Trainer, module: TextClassifier, data: TextDataModule, ckpt_path: str | None, run_dir: Path) -> None:
    try:
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    except SystemExit as stop:
        if trainer.state.status != TrainerStatus.INTERRUPTED:
            raise
        # Lightning turned Ctrl-C into an exit with code 1
        raise (Terminated if isinstance(stop, SIGTERMException) else KeyboardInterrupt)(resume_hint(run_dir)) from None
    except MisconfigurationException as error:
        raise ConfigError(f"trainer: {str(error).splitlines()[0]}") from error
    except RuntimeError as error:
        if trainer.world_size > 1 and any(text in str(error) for text in _PEER_GONE):
            raise TrainingError("another process of this training has ended.") from error
        if "PytorchStreamWriter" in str(error) or "file write failed" in str(error):
            raise OSError(str(error).splitlines()[0]) from error
        if "Early stopping conditioned" in str(error):
            raise ConfigError(
                "no validation came before the end of the first epoch, so there is no epoch to choose; see trainer.max_steps, "
                "trainer.check_val_every_n_epoch and trainer.limit_val_batches."
            ) from error
        if "loading state_dict" in str(error):
            raise ConfigError(f"ckpt_path={ckpt_path}: of another model than this configuration's.") from error
        raise


def _take_best(checkpoint: Checkpoint, module: TextClassifier, arguments: Mapping[str, Any]) -> dict[str, float]:
    """Loads the best epoch's weights into the module and returns that epoch's metrics on val; none where none was to be
    kept."""
    if not checkpoint.best_model_path:
        if arguments.get("enable_checkpointing") is False or arguments.get("fast_dev_run"):
            return {}
        raise ConfigError(
            "no epoch was trained and validated, so nothing is kept; see trainer.max_epochs, trainer.max_steps, "
            "trainer.limit_train_batches and trainer.check_val_every_n_epoch."
        )
    best = torch.load(checkpoint.best_model_path, map_location="cpu", weights_only=True)
    module.load_state_dict(best["state_dict"])
    return {"epoch": best["epoch"] + 1, **best["val_metrics"]}
