"""Resuming a run: which checkpoint it continues from, and whether that checkpoint fits the configuration."""

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sodaops.config.schema import Config
from sodaops.errors import ConfigError, some
from sodaops.io import ranks
from sodaops.modeling.classifier import SIGNATURE_KEY
from sodaops.modeling.encoder import LINEAR

LAST = Path("checkpoints/last.ckpt")  # in the run folder
FULL_PRECISION = "32-true"
_FIX = "give RUN/checkpoints/last.ckpt of an earlier run"


def run_dir_of(config: Config) -> Path:
    """The run folder of a configuration; ``outputs/run`` where it names none."""
    return Path(config.run_dir or "outputs/run")


def resolve_last_checkpoint(config: Config) -> Config:
    """Replaces ``ckpt_path=last`` by the run's last checkpoint, or by null if it has none yet."""
    if config.ckpt_path != "last":
        return config
    last = run_dir_of(config) / LAST
    return config.model_copy(update={"ckpt_path": str(last) if last.is_file() else None})


def resume_hint(run_dir: Path) -> str:
    """The end of the message of an interrupted run: how to resume it."""
    if not (run_dir / LAST).is_file():
        return "no epoch was finished, so there is no checkpoint to resume from"
    return f"resume with run_dir={run_dir} ckpt_path=last"


def continues_in_place(config: Config, run_dir: Path) -> bool:
    """Whether the run resumes from the last checkpoint of its own folder."""
    return config.ckpt_path is not None and Path(config.ckpt_path).resolve() == (run_dir / LAST).resolve()


def check_checkpoint(path: str, max_epochs: int | str | None) -> None:
    """Checks that a run can resume from a checkpoint.

    Args:
        path: the checkpoint.
        max_epochs: which the checkpoint must not have reached; not a number: not checked.

    Raises:
        ConfigError: there is no such file, it holds no training state, or that run has reached ``max_epochs``.
    """
    if not Path(path).is_file():
        raise ConfigError(f"ckpt_path={path}: no such file; {_FIX}.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ConfigError(f"ckpt_path={path}: could not be read ({str(error).splitlines()[0]}); {_FIX}.") from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "optimizer_states", "loops"} <= checkpoint.keys():
        raise ConfigError(f"ckpt_path={path}: holds no training state; {_FIX}.")
    n_epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    if isinstance(max_epochs, int) and 0 <= max_epochs <= n_epochs:
        raise ConfigError(f"ckpt_path={path}: that run has finished {n_epochs} epochs; set trainer.max_epochs above that.")


def run_signature(config: Config, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a resumed run must share with the run that wrote the checkpoint.

    With other labels, data or optimizer settings the saved state would mean something else.

    Args:
        config: of this run.
        manifest: of the splits.
    """
    distilled = manifest.get("distillation")
    return {
        "seed": config.seed,
        "data.labels": list(manifest["labels"]),
        "model.encoder": config.model.encoder,
        "model.lora": config.model.lora and config.model.lora.model_dump(),
        "task": config.task,
        "head": config.head,
        "loss": config.loss,
        "the data's fingerprint": manifest["fingerprint"],
        **{f"optim.{name}": value for name, value in config.optim.model_dump().items()},
        "trainer.accumulate_grad_batches": config.trainer["accumulate_grad_batches"],
        "processes": ranks.world_size(os.environ),  # an optimizer step sees the batches of all processes
        "trainer.precision": config.trainer["precision"] or FULL_PRECISION,
        "teacher": distilled and distilled["teachers"],
        "data.unlabelled": distilled and sorted(table["sha256"] for table in distilled["unlabelled"]),
        "distill": distilled and config.distill.model_dump(),
        "trainer.strategy=fsdp": config.trainer["strategy"] == "fsdp",  # it numbers the optimizer's state differently
    }


def check_signature(path: str, signature: Mapping[str, Any]) -> None:
    """Checks that a checkpoint's run had this signature.

    Raises:
        ConfigError: the settings that differ.
    """
    saved = torch.load(path, map_location="cpu", weights_only=True).get(SIGNATURE_KEY, {})
    # Checkpoints of older versions lack these keys.
    loss = {name: saved.get(f"optim.{name}") for name in ("class_weights", "label_smoothing")}
    defaults = {
        "processes": 1,
        "trainer.strategy=fsdp": False,
        "trainer.precision": signature["trainer.precision"],
        "model.encoder": None,
        "task": {"_target_": "sodaops.tasks.single_label.SingleLabel"},
        "head": LINEAR,
        "loss": {"_target_": "sodaops.modeling.losses.CrossEntropyLoss", **loss},
    }
    if "optim.schedule" in saved:
        scheduler = {"_target_": "sodaops.modeling.optim.warmup_schedule"}
        scheduler |= {"warmup": saved["optim.warmup"], "decay": saved["optim.schedule"]}
        defaults |= {"optim.optimizer": {"_target_": "torch.optim.AdamW"}, "optim.scheduler": scheduler}
    saved = {**defaults, **saved}
    faults = [f"{key}={value}, its run {saved.get(key)}" for key, value in signature.items() if saved.get(key) != value]
    if faults:
        raise ConfigError(f"ckpt_path={path}: its run had other settings ({some(faults)}). Resume with the same settings.")


def checkpoint_precision(path: str | None) -> str | int | None:
    """The precision of a checkpoint's run; None without a checkpoint, and for an unreadable one, which ``fit`` refuses."""
    if path is None or not os.path.isfile(path):
        return None
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError):
        return None
    return checkpoint.get(SIGNATURE_KEY, {}).get("trainer.precision", FULL_PRECISION) if isinstance(checkpoint, dict) else None
