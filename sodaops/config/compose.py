"""From conf/ or params.yaml to a typed configuration, and what Hydra says of a mistake in the project's own words."""

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml
from hydra import compose as hydra_compose, initialize_config_dir, main as hydra_main
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from sodaops.config.schema import Config
from sodaops.config.validation import build, field_names
from sodaops.errors import ConfigError, SodaOpsError, nearest, some
from sodaops.io.ranks import is_rank_zero


def conf_dir() -> Path:
    """The folder with config.yaml: inside the installed package, or beside it in the repository."""
    package = Path(__file__).resolve().parents[1]
    return next(folder for folder in (package / "conf", package.parent / "conf") if (folder / "config.yaml").is_file())


def compose(overrides: Sequence[str] = (), extra_dir: str | None = None) -> Config:
    """Composes conf/ with overrides in Hydra's grammar.

    Args:
        overrides: ``model=tiny``, ``trainer.max_epochs=1``.
        extra_dir: a folder with more groups and options.

    Raises:
        ConfigError, HydraException: a group, key or value that is not allowed.
    """
    if extra_dir is not None:
        if not Path(extra_dir).is_dir():
            raise ConfigError(f"--config-dir {extra_dir}: no such folder.")
        overrides = [*overrides, f'hydra.searchpath=["file://{Path(extra_dir).resolve()}"]']
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return typed(hydra_compose("config", overrides=list(overrides)))


def from_params(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a composed tree, as DVC keeps it in params.yaml, and changes single keys of it.

    Args:
        path: a YAML file with the whole tree.
        overrides: ``KEY=VALUE`` for keys that are there.

    Raises:
        ConfigError: no such file, or a key or value that is not allowed.
    """
    try:
        tree = OmegaConf.load(path)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"--params {path}: not readable ({error}); `python train.py --cfg job > {path}` makes it.") from None
    malformed = [text for text in overrides if "=" not in text]
    if malformed:
        raise ConfigError(f"{malformed[0]!r}: expected KEY=VALUE.")
    return typed(OmegaConf.merge(tree, OmegaConf.from_dotlist(list(overrides))))


def typed(tree: DictConfig) -> Config:
    """A composed tree, resolved and checked."""
    return build(OmegaConf.to_container(tree, resolve=True, throw_on_missing=True))


def run_hydra(verb: Callable[[Config], float | None], argv: Sequence[str]) -> None:
    """Runs a verb as a Hydra application: run folders, ``--multirun``, ``--cfg job`` and the rest."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises, and the command line says it
    for text in argv:
        if re.match(r"hydra\.(run|sweep)\.\w+=.*://", text):
            raise ConfigError(f"{text}: expected a path on this machine; run_dir=gs://BUCKET/FOLDER lets a run land there.")
    refused: list[SodaOpsError] = []

    @hydra_main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
    def job(tree: DictConfig) -> float | None:
        hydra = HydraConfig.get()
        try:
            config = typed(tree)
            if config.run_dir is not None and hydra.mode == RunMode.MULTIRUN:
                raise ConfigError(
                    f"run_dir={config.run_dir}: jobs would overwrite each other; set hydra.sweep.dir in its place."
                )
            if config.search is not None and hydra.mode != RunMode.MULTIRUN and "WANDB_SWEEP_ID" not in os.environ:
                raise ConfigError(f"search={hydra.runtime.choices.search} is a sweep; run it with -m: python train.py -m …")
            run_dir = config.run_dir or hydra.runtime.output_dir
            return verb(config.model_copy(update={"run_dir": str(run_dir)}))
        except SodaOpsError as error:
            if hydra.mode == RunMode.MULTIRUN:
                raise
            refused.append(error)  # Hydra would print the command line before it
            return None

    if not is_rank_zero(os.environ):
        argv = [*argv, "hydra.run.dir=.", "hydra.output_subdir=null"]  # one of several under torchrun: the first one writes
    kept, sys.argv = sys.argv, ["sodaops train", *argv]
    try:
        job()
    finally:
        sys.argv = kept
    if refused:
        raise refused[0]


def explain(error: Exception) -> SodaOpsError | None:
    """What a Hydra or OmegaConf error means for the user, or None for any other error."""
    if isinstance(error, MissingMandatoryValue):
        return ConfigError(f"{error.full_key} is missing; give it as {error.full_key}=VALUE.")
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return None
    text = str(error).strip()
    key = re.search(r"Could not (?:override|append to config at) '([^']+)'", text)
    if isinstance(error, ConfigCompositionException) and key:
        *section, name = key[1].split("@")[0].split(".")
        if section and section[0] not in field_names([]):
            section, name = [], section[0]
        names = (field_names(section) or _default_keys(section)) if section else sorted({*field_names([]), *groups()})
        if name not in names and names:
            where = ".".join(section) or "the top level"
            return ConfigError(f"{key[1]} is not a key{nearest(name, names)}; {where} has: {some(names, 40)}.")
    option = re.search(r"(?:Could not find|In '[^']+': Could not find) '(\w+)/([^']+)'", text)
    if option and (conf_dir() / option[1]).is_dir():
        present = sorted(path.stem for path in (conf_dir() / option[1]).glob("*.yaml") if path.stem != "base")
        return ConfigError(
            f"{option[1]}={option[2]}: no such option{nearest(option[2], present)}; {option[1]} has: {some(present, 40)}."
        )
    cause = f" ({str(error.__cause__).splitlines()[0]})" if error.__cause__ is not None else ""
    return ConfigError(" ".join(text.split()) + cause)


def _default_keys(section: Sequence[str]) -> list[str]:
    default = conf_dir() / section[0] / "default.yaml"
    return sorted(OmegaConf.load(default)) if len(section) == 1 and default.is_file() else []


def groups() -> list[str]:
    """The groups of conf/."""
    return sorted(path.name for path in conf_dir().iterdir() if path.is_dir())
