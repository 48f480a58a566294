"""Copies of the registry's versions and aliases as artifacts on Weights & Biases, for display only."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sodaops.bundle.layout import read_info
from sodaops.config.schema import Config, WandbConfig
from sodaops.errors import ConfigError
from sodaops.registry.registry import Registry
from sodaops.training.wandb_server import check_key, check_reachable

log = logging.getLogger(__name__)


def mirror(config: Config, registry: Registry, version: str, aliases: Sequence[str]) -> None:
    """Copies a version to W&B if ``registry.wandb`` is set. A failure is a warning: the registry itself has been changed."""
    if not config.registry.wandb:
        return
    from sodaops.config.compose import compose

    settings: Any = config.logger.wandb or compose(["logger=wandb"]).logger.wandb
    try:
        with registry.local(version) as folder:
            _log_artifact(folder, version, aliases, settings)
    except (ConfigError, ModuleNotFoundError) as error:
        log.warning("registry.wandb=true: %s was not copied to W&B: %s", version, error)


def _log_artifact(folder: Path, version: str, aliases: Sequence[str], settings: WandbConfig) -> None:
    """Logs a version's folder as an artifact; W&B stores equal content once, and moves the aliases."""
    import wandb

    mode = settings.mode or os.environ.get("WANDB_MODE") or "online"
    if mode == "online":
        check_key("registry.wandb=true", "set registry.wandb=false")
        check_reachable("set registry.wandb=false")
    info = read_info(folder)
    try:
        run = wandb.init(
            project=settings.project, entity=settings.entity, mode=mode, job_type="registry", name=f"registry {version}",
            dir=os.getcwd(),  # the default is the folder in which this process first used W&B
        )  # fmt: skip
    except (wandb.errors.CommError, wandb.errors.UsageError) as error:
        raise ConfigError(f"registry.wandb=true: W&B rejects the artifact: {str(error).splitlines()[0]}.") from None
    with run:
        artifact = wandb.Artifact(
            f"registry-{info.data['name']}", type="model", metadata={"bundle_id": version, "data": info.data}
        )
        artifact.add_dir(str(folder))
        run.log_artifact(artifact, aliases=[version, *aliases])
