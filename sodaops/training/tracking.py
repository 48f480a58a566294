"""Where metrics go: a CSV file, Weights & Biases, both or nowhere."""

import importlib.util
import os
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from sodaops.config import Config, WandbConfig
from sodaops.errors import ConfigError


def make_loggers(config: Config, run_dir: Path) -> list[Logger]:
    """The loggers that conf/logger asks for, each told the whole configuration.

    Raises:
        ConfigError: W&B online without a key.
    """
    loggers: list[Logger] = []
    if config.logger.csv is not None:
        loggers.append(CSVLogger(run_dir, name="", version="metrics"))
    if config.logger.wandb is not None:
        loggers.append(_wandb(config.logger.wandb, run_dir))
    for logger in loggers:
        logger.log_hyperparams(config.model_dump(mode="json"))
    return loggers


def _wandb(config: WandbConfig, run_dir: Path) -> WandbLogger:
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "logger=wandb: wandb is not installed; get it with `pip install 'sodaops[wandb]'`, or set logger=csv."
        )
    mode = config.mode or os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
    if mode == "online" and not os.environ.get("WANDB_API_KEY"):
        raise ConfigError(
            "logger.wandb.mode=online: WANDB_API_KEY is not set. Export your key, or set logger.wandb.mode=offline "
            "and send the run later with `wandb sync`."
        )
    return WandbLogger(
        project=config.project, name=config.name, group=config.group, tags=config.tags, save_dir=str(run_dir),
        entity=config.entity, mode=mode,
    )  # fmt: skip


def close_loggers(loggers: list[Logger], failed: bool) -> None:
    """Ends every logger's run, as failed where it did; nothing leaks into the next run of this process."""
    for logger in loggers:
        logger.finalize("failed" if failed else "success")
        if isinstance(logger, WandbLogger):
            logger.experiment.finish(exit_code=1 if failed else 0)
