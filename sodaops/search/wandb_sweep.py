"""The same search space as a sweep on Weights & Biases: its file, and agents that train by it."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sodaops.config.schema import Config
from sodaops.errors import ConfigError
from sodaops.io import storage
from sodaops.search.space import read_space
from sodaops.training.wandb_server import check_key, check_reachable


def definition(config: Config, overrides: Sequence[str]) -> dict[str, Any]:
    """What `wandb sweep` reads.

    Args:
        config: with ``search``.
        overrides: the command line's, which every run gets too.

    Raises:
        ConfigError: no space, or one that does not fit.
    """
    if config.search is None:
        raise ConfigError("a sweep needs a search space; give it as `sodaops sweep wandb search=default`.")
    if config.search.storage is not None:
        raise ConfigError("search.storage: W&B keeps its own sweep; leave it out.")
    monitor = config.checkpoint.monitor
    logger = [] if any(text.startswith("logger=") for text in overrides) else ["logger=wandb"]
    found = {
        "name": config.search.study,
        "method": "bayes",
        "metric": {"name": monitor, "goal": "minimize" if config.checkpoint.mode == "min" else "maximize"},
        "run_cap": config.search.n_trials,
        "parameters": {d.key: d.parameter() for d in read_space(config.search.space)},
        "command": ["${env}", "${interpreter}", "${program}", *overrides, *logger, "${args_no_hyphens}"],
        "program": "train.py",
    }  # fmt: skip
    if config.search.pruner != "none":
        found["early_terminate"] = {"type": "hyperband", "min_iter": 2}
    return found


def write(path: Path, sweep: Mapping[str, Any]) -> None:
    """Writes the file of a sweep."""
    storage.write_text(path, yaml.safe_dump(dict(sweep), sort_keys=False, allow_unicode=True))


def run(config: Config, path: Path, sweep: Mapping[str, Any], n_agents: int, project: str, entity: str | None) -> str:
    """Creates the sweep on W&B and works on it until it has as many runs as asked for.

    Args:
        config: the whole tree.
        path: the file, which stays.
        sweep: its content.
        n_agents: processes that train at the same time.
        project: W&B's.
        entity: W&B's; None is the key's own.

    Returns:
        The sweep's address, for `sodaops select wandb:…`.

    Raises:
        ConfigError: no key, no network, or W&B refuses.
    """
    check_key("sodaops sweep wandb", f"run the search without an account: python train.py -m search=…; {path} is written")
    check_reachable(f"{path} is written; start it later with `wandb sweep {path}`")
    import wandb

    try:
        sweep_id = wandb.sweep(dict(sweep), entity=entity, project=project)
    except (wandb.errors.CommError, wandb.errors.UsageError, ValueError) as error:
        raise ConfigError(f"W&B refuses the sweep: {str(error).splitlines()[0]}.") from None
    owner = entity or wandb.Api().default_entity
    address = f"{owner}/{project}/{sweep_id}"
    agents = [subprocess.Popen([sys.executable, "-m", "wandb", "agent", address], env=os.environ) for _ in range(n_agents)]
    try:
        failed = sum(agent.wait() != 0 for agent in agents)
    except KeyboardInterrupt:
        for agent in agents:
            agent.terminate()
        raise KeyboardInterrupt(f"go on with: wandb agent {address}") from None
    if failed:
        raise ConfigError(f"{failed} of {n_agents} agents ended with an error; go on with `wandb agent {address}`.")
    return address
