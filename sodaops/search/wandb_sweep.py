"""A search as a sweep on Weights & Biases: its definition, and agents that run it."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sodaops.config.monitor import monitor_mode
from sodaops.config.schema import Config
from sodaops.errors import ConfigError
from sodaops.io import storage
from sodaops.search.space import read_space
from sodaops.training.wandb_server import check_key, check_reachable


def sweep_definition(config: Config, overrides: Sequence[str]) -> dict[str, Any]:
    """The definition of a sweep, as `wandb sweep` reads it.

    Args:
        config: with ``search``.
        overrides: from the command line; every run gets them too.

    Raises:
        ConfigError: no search space, or one that W&B cannot use.
    """
    if config.search is None:
        raise ConfigError("search=null: a sweep needs a search space, for example `sodaops sweep wandb search=default`.")
    if config.search.storage is not None:
        raise ConfigError(f"search.storage={config.search.storage}: W&B stores the sweep itself; remove the key.")
    monitor = config.checkpoint.monitor
    logger = [] if any(text.startswith("logger=") for text in overrides) else ["logger=wandb"]
    definition = {
        "name": config.search.study,
        "method": "bayes",
        "metric": {"name": monitor, "goal": f"{monitor_mode(config)}imize"},
        "run_cap": config.search.n_trials,
        "parameters": {d.key: d.parameter() for d in read_space(config.search.space)},
        "command": ["${env}", "${interpreter}", "${program}", *overrides, *logger, "${args_no_hyphens}"],
        "program": "train.py",
    }  # fmt: skip
    if config.search.pruner != "none":
        definition["early_terminate"] = {"type": "hyperband", "min_iter": 2}
    return definition


def write_sweep_file(path: Path, definition: Mapping[str, Any]) -> None:
    """Writes a sweep's definition as YAML."""
    storage.write_text(path, yaml.safe_dump(dict(definition), sort_keys=False, allow_unicode=True))


def run_wandb_sweep(
    config: Config, path: Path, definition: Mapping[str, Any], n_agents: int, project: str, entity: str | None
) -> str:
    """Creates the sweep on W&B, and runs agents until it has as many runs as asked for.

    Args:
        config: the whole configuration.
        path: the file with the definition.
        definition: of the sweep.
        n_agents: processes that train at the same time.
        project: on W&B.
        entity: on W&B; None is the default of the API key.

    Returns:
        The sweep's address, for `sodaops select wandb:ADDRESS`.

    Raises:
        ConfigError: no API key, no network, or W&B rejects the sweep.
    """
    check_key(
        "sodaops sweep wandb", f"run the search without an account: python train.py -m search=NAME; {path} has been written"
    )
    check_reachable(f"{path} has been written; start it later with `wandb sweep {path}`")
    import wandb

    try:
        sweep_id = wandb.sweep(dict(definition), entity=entity, project=project)
    except (wandb.errors.CommError, wandb.errors.UsageError, ValueError) as error:
        raise ConfigError(f"{path}: W&B rejects the sweep: {str(error).splitlines()[0]}.") from None
    owner = entity or wandb.Api().default_entity
    address = f"{owner}/{project}/{sweep_id}"
    agents = [subprocess.Popen([sys.executable, "-m", "wandb", "agent", address], env=os.environ) for _ in range(n_agents)]
    try:
        failed = sum(agent.wait() != 0 for agent in agents)
    except KeyboardInterrupt:
        for agent in agents:
            agent.terminate()
        raise KeyboardInterrupt(f"resume with: wandb agent {address}") from None
    if failed:
        raise ConfigError(f"{failed} of {n_agents} agents ended with an error; resume with `wandb agent {address}`.")
    return address
