"""Trains a model: from a configuration to a run folder with checkpoints and a bundle."""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities.exceptions import SIGTERMException

from sodaops.bundle.layout import BundleInfo
from sodaops.bundle.save import save_bundle
from sodaops.config.schema import Config
from sodaops.data.batching import TokenLoader
from sodaops.data.datamodule import TextDataModule
from sodaops.data.preprocess import ensure_splits, summarize_manifest
from sodaops.errors import ConfigError, Terminated, TrainingError
from sodaops.export.abstention import add_promises, check_promises
from sodaops.export.onnx_export import Exported, export_onnx
from sodaops.io import ranks, storage
from sodaops.modeling.classifier import TextClassifier
from sodaops.modeling.dropout import use_cpu_dropout
from sodaops.modeling.encoder import Pretrained, TextEncoder, hidden_size_of, separator_of
from sodaops.modeling.large import adapter_signature, attention, merge_adapters
from sodaops.modeling.losses import make_loss
from sodaops.modeling.metrics import OwnMetrics
from sodaops.modeling.optim import freeze
from sodaops.modeling.pretrained import load_pretrained
from sodaops.modeling.probe import check_head_and_loss
from sodaops.tasks.base import Task
from sodaops.tasks.make import make_task
from sodaops.training import resume
from sodaops.training.callbacks import Checkpoint, Terminate, make_profiler, profile_table
from sodaops.training.peers import Peers
from sodaops.training.precision import with_precision
from sodaops.training.preflight import check_bundle, check_targets
from sodaops.training.teacher import TeacherAnswers, teacher_answers
from sodaops.training.tracking import Tracker, tracked
from sodaops.training.trainer import make_callbacks, make_checkpoints, make_trainer, silence_loggers, trainer_arguments

log = logging.getLogger(__name__)
_PEER_ENDED = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # in messages of gloo
_MAY_DIFFER = {"name_or_path", "enable_progress_bar", "profiler"}  # between the machines of one training


@dataclass(frozen=True)
class Trained:
    """The result of a training."""

    run_dir: Path
    bundle_dir: Path | None  # None after fast_dev_run, and in all processes but the first
    info: BundleInfo | None
    exported: Exported | None  # the ONNX models, if export.variants names any
    metrics: dict[str, float]  # of the best epoch, on val
    score: float | None  # of the best epoch: the metric checkpoint.monitor


class _Job(NamedTuple):
    """A training that is ready to start."""

    config: Config
    manifest: Mapping[str, Any]
    pretrained: Pretrained
    module: TextClassifier
    data: TextDataModule
    trainer: L.Trainer
    best: Checkpoint


def fit(
    config: Config, tracker: Tracker | None = None, callbacks: Sequence[Callback] = (), teachers: Sequence[Path] = ()
) -> Trained:
    """Preprocesses if needed, trains, and writes the bundle of the best epoch to ``run_dir/bundle``.

    The bundle holds the ONNX models of ``export.variants``, and :class:`sodaops.inference.predictor.Predictor` loads it.

    Args:
        config: the whole configuration.
        tracker: receives parameters and metrics; None: one is made, and closed at the end.
        callbacks: of Lightning, in addition to those of the configuration.
        teachers: local folders of the bundles that ``teacher`` names.

    Raises:
        ConfigError, DataError, ModelError: an error in configuration, data or model.
        PrunedError: a sweep stopped this trial.
        StorageError: a checkpoint or the bundle could not be written.
    """
    config = with_precision(resume.resolve_last_checkpoint(config))
    if tracker is None:
        check_targets(config)
        with tracked(config) as tracker:
            return fit(config, tracker, callbacks, teachers)
    run_dir, peers = tracker.run_dir, Peers(os.environ)
    with peers.preparing():
        job = _prepare(config, tracker, callbacks, teachers)
        config = job.config
        peers.agree(_shared_settings(config, job.module.run_signature))
    with storage.writing(run_dir):
        _run(job, run_dir)
    if not job.trainer.is_global_zero:
        return Trained(run_dir, None, None, None, {}, None)
    if isinstance(job.trainer.profiler, SimpleProfiler):
        log.info("%s", profile_table(job.trainer.profiler.recorded_durations))
    if not _has_best(job):
        return Trained(run_dir, None, None, None, {}, None)
    # With fsdp the module's parameters are spread over all devices, so the weights are loaded into a new module.
    sharded = config.trainer["strategy"] == "fsdp"
    module = _module_and_data(config, job.manifest, load_pretrained(config.model))[0] if sharded else job.module
    metrics = _load_best(job.best.best_model_path, module)
    merge_adapters(module.model.transformer)
    tokenizer, pad_token_id = job.pretrained.tokenizer, job.pretrained.pad_token_id
    task, measured = _fitted(module, job.data)
    metrics |= {name: measured[name] for name in metrics.keys() & measured.keys()}
    info = save_bundle(run_dir / "bundle", module.model, tokenizer, pad_token_id, config, job.manifest, {"val": metrics}, task)
    tracker.trained(info, metrics)
    exported = export_onnx(run_dir / "bundle", config.splits_dir, config.export.variants) if config.export.variants else None
    if exported:
        info = _with_promises(config, run_dir, exported.info)
        exported = replace(exported, info=info)
    tracker.bundled(run_dir / "bundle", info)
    return Trained(run_dir, run_dir / "bundle", info, exported, metrics, float(job.best.best_model_score))


def _prepare(config: Config, tracker: Tracker, callbacks: Sequence[Callback], teachers: Sequence[Path]) -> _Job:
    """Checks everything that can be checked before the first step, and builds the trainer."""
    silence_loggers()
    run_dir, arguments = tracker.run_dir, trainer_arguments(config.trainer)
    in_place = config.ckpt_path is not None and resume.continues_in_place(config, run_dir)  # a finished run stays as it is
    if config.ckpt_path is not None:
        resume.check_checkpoint(config.ckpt_path, None if in_place else arguments.get("max_epochs"))
    arguments["profiler"] = make_profiler(arguments.get("profiler"), run_dir)
    L.seed_everything(config.seed, workers=True, verbose=False)
    pretrained = load_pretrained(config.model)
    n_labels = len(config.data.labels or ())
    if n_labels:
        check_bundle(config, pretrained, n_labels)
    manifest = ensure_splits(config.data, config.splits_dir, make_task(config.task))
    if not n_labels:
        check_bundle(config, pretrained, len(manifest["labels"]))
    if config.evaluate.promises:
        check_promises(config.evaluate.promises, make_task(config.task), manifest)
    log.info("%s", summarize_manifest(manifest))
    taught = teacher_answers(config, manifest, teachers, hidden_size_of(pretrained.transformer))
    if taught is not None:
        manifest = {**manifest, "distillation": taught.record}
        log.info("%s", taught.summary())
    module, data = _module_and_data(config, manifest, pretrained, taught)
    data.log_cut_shares()
    if config.optim.batch_texts is not None:
        arguments["accumulate_grad_batches"] = data.log_batches_per_step(ranks.world_size(os.environ))
    if arguments.get("max_epochs") == "auto":
        arguments["max_epochs"] = data.enough_epochs(ranks.world_size(os.environ))
        config = config.model_copy(update={"trainer": {**config.trainer, "max_epochs": arguments["max_epochs"]}})
        if config.ckpt_path is not None and not in_place:
            resume.check_checkpoint(config.ckpt_path, arguments["max_epochs"])
    cut_at = {name: value for name, value in config.model.limit._asdict().items() if value}
    manifest = {**manifest, "cut_share": {**cut_at, **data.cut_shares}}
    checkpoints = make_checkpoints(config, run_dir)
    callbacks = [*make_callbacks(config, run_dir), *callbacks, Terminate(run_dir / resume.LAST), *checkpoints]
    tracker.start(config, manifest)
    trainer = make_trainer(arguments, tracker.loggers, callbacks, run_dir)
    if trainer.world_size > 1 and not ranks.is_distributed(os.environ):
        raise ConfigError(
            f"trainer.devices and trainer.num_nodes ask for {trainer.world_size} processes; `sodaops train` and torchrun start "
            "them, fit does not."
        )
    if (note := data.few_steps_note(trainer.world_size)) is not None:
        log.info(note)
    return _Job(config, manifest, pretrained, module, data, trainer, checkpoints[0])


def _module_and_data(
    config: Config, manifest: Mapping[str, Any], pretrained: Pretrained, taught: TeacherAnswers | None = None
) -> tuple[TextClassifier, TextDataModule]:
    n_labels, task = len(manifest["labels"]), make_task(config.task)
    n_outputs = task.n_outputs(n_labels)
    separator = separator_of(pretrained.transformer, pretrained.tokenizer, len(config.data.text_columns))
    model = TextEncoder(pretrained.transformer, n_outputs, config.model.pooling, config.model.dropout, config.head, separator)
    loss = make_loss(config.loss, lambda: torch.ones(n_outputs))
    check_head_and_loss(model, loss, task.example_targets(n_labels), task.any_truth(2, n_labels))
    metrics = OwnMetrics(config.metrics, n_labels, task) if config.metrics else None
    if config.model.random_weights and config.optim.frozen_layers is not None:
        raise ConfigError(
            f"optim.frozen_layers={config.optim.frozen_layers}: with model.random_weights the frozen layers would stay random; "
            "set optim.frozen_layers=null."
        )
    freeze(model, config.optim.frozen_layers)
    use_cpu_dropout(model)
    more = (taught.texts, taught.probs, taught.embeddings) if taught else None
    data = TextDataModule(config, pretrained.tokenizer, pretrained.pad_token_id, manifest["labels"], task, more)
    data.setup()
    signature = resume.run_signature(config, manifest) | adapter_signature(model.transformer)
    if config.ckpt_path is not None:
        resume.check_signature(config.ckpt_path, signature)
    loss = make_loss(config.loss, data.balanced_weights)
    hidden = config.distill.hidden if taught else 0.0
    return TextClassifier(model, config.optim, loss, config.seed, signature, metrics, data.task, n_labels, hidden), data


def _shared_settings(config: Config, signature: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that all processes of a training must share, as JSON values."""
    trainer = {f"trainer.{name}": value for name, value in config.trainer.items() if name not in _MAY_DIFFER}
    model = {f"model.{name}": value for name, value in config.model.model_dump().items() if name not in _MAY_DIFFER}
    shared = {**signature, **trainer, **model, "has ckpt_path": config.ckpt_path is not None}
    return json.loads(json.dumps(shared, default=str))


def _run(job: _Job, run_dir: Path) -> None:
    """Trains, and turns errors of Lightning and torch into those of SoDaOps."""
    trainer, ckpt_path = job.trainer, job.config.ckpt_path
    try:
        with attention(job.module.model.transformer, job.config.model.attention):
            trainer.fit(job.module, datamodule=job.data, ckpt_path=ckpt_path, weights_only=True)
    except SystemExit as stop:
        if trainer.state.status != TrainerStatus.INTERRUPTED:
            raise
        # Lightning turns Ctrl-C and SIGTERM into an exit with code 1.
        kind = Terminated if isinstance(stop, SIGTERMException) else KeyboardInterrupt
        raise kind(resume.resume_hint(run_dir)) from None
    except MisconfigurationException as error:
        raise ConfigError(f"trainer: {str(error).splitlines()[0]}") from error
    except RuntimeError as error:
        message = str(error)
        if trainer.world_size > 1 and any(text in message for text in _PEER_ENDED):
            raise TrainingError("another process of this training has ended.") from error
        if "PytorchStreamWriter" in message or "file write failed" in message:
            raise OSError(message.splitlines()[0]) from error
        if "Early stopping conditioned" in message:
            raise ConfigError(
                "no validation took place in the first epoch, so no epoch can be chosen; check trainer.max_steps, "
                "trainer.check_val_every_n_epoch and trainer.limit_val_batches."
            ) from error
        if "loading state_dict" in message:
            raise ConfigError(f"ckpt_path={ckpt_path}: the checkpoint of another model than the configured one.") from error
        raise


def _has_best(job: _Job) -> bool:
    """Whether a best epoch was kept; raises where one should have been."""
    if job.best.best_model_path:
        return True
    if job.config.trainer.get("enable_checkpointing") is False or job.config.trainer.get("fast_dev_run"):
        return False
    raise ConfigError(
        "no epoch was trained and validated, so there is no model to keep; check trainer.max_epochs, trainer.max_steps, "
        "trainer.limit_train_batches and trainer.check_val_every_n_epoch."
    )


def _fitted(module: TextClassifier, data: TextDataModule) -> tuple[Task, dict[str, float]]:
    """The task with the parameters that depend on the model's answers on val, and the metrics of val that they change."""
    task = data.task
    if not task.needs_val:
        return task, {}
    probs, truth = [], []
    module.eval()
    with torch.inference_mode():
        for batch in TokenLoader(data.splits["val"], data.config.optim.batch_tokens, None):
            logits = module.logits_of({key: value.to(module.device) for key, value in batch.items()})
            probs.append(task.torch_probs(logits).cpu().numpy())
            truth.append(batch["truth"].numpy())
    answers, true = np.concatenate(probs), np.concatenate(truth)
    task = task.fitted(answers, true, data.labels)
    return task, task.summary(answers, true)


def _with_promises(config: Config, run_dir: Path, info: BundleInfo) -> BundleInfo:
    """The bundle with thresholds for the targets of ``evaluate``; without, if none reaches them: the training is not lost."""
    try:
        return add_promises(run_dir / "bundle", config.splits_dir, config.evaluate.promises)
    except ConfigError as error:
        log.warning("the bundle has no thresholds: %s", error)
        return info


def _load_best(path: str, module: TextClassifier) -> dict[str, float]:
    """Loads the best epoch's weights into the module, and returns that epoch's metrics on val."""
    best = torch.load(path, map_location="cpu", weights_only=True)
    module.on_load_checkpoint(best)
    module.load_state_dict(best["state_dict"])
    return {"epoch": best["epoch"] + 1, **best["val_metrics"]}
