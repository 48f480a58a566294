"""Composes conf/ or reads params.yaml into a typed configuration, and explains Hydra's errors."""

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from traceback import walk_tb

import yaml
from hydra import compose as hydra_compose, initialize_config_dir, main as hydra_main
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

import sodaops.config.naming  # noqa: F401  # registers the resolver of data.name
from sodaops.config.keys import conf_dir, group_options
from sodaops.config.reference import unknown_key
from sodaops.config.schema import Config
from sodaops.config.spelling import keep_spelling
from sodaops.config.validation import build_config
from sodaops.errors import ConfigError, SodaOpsError, nearest, some
from sodaops.io.ranks import is_rank_zero


def compose(overrides: Sequence[str] = (), extra_dir: str | None = None) -> Config:
    """Composes conf/ with overrides in Hydra's syntax.

    Args:
        overrides: for example ``model=tiny``, ``trainer.max_epochs=1``.
        extra_dir: a folder with more groups and options.

    Raises:
        ConfigError, HydraException: an invalid group, key or value.
    """
    if extra_dir is not None:
        if not Path(extra_dir).is_dir():
            raise ConfigError(f"--config-dir {extra_dir}: no such folder.")
        _check_names(Path(extra_dir))
        paths = "hydra.searchpath=["
        given = [text[len(paths) :].rstrip("] ") for text in overrides if text.startswith(paths)]
        paths += ",".join([f'"file://{Path(extra_dir).resolve()}"', *filter(None, given)]) + "]"
        overrides = [*(text for text in overrides if not text.startswith("hydra.searchpath=")), paths]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return to_config(hydra_compose("config", overrides=[keep_spelling(text) for text in overrides]))


def _check_names(folder: Path) -> None:
    """Refuses options with the names of built-in ones, which Hydra would take in their place."""
    for built_in in sorted(conf_dir().rglob("*/*.yaml")):
        name = built_in.relative_to(conf_dir())
        if (file := folder / name).is_file() and file.read_bytes() != built_in.read_bytes():
            raise ConfigError(f"{file}: {name.parent}={name.stem} is built in, and would be used instead; rename the file.")


def load_params(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a composed configuration, such as params.yaml, and changes some of its keys.

    Args:
        path: a YAML file with the whole configuration.
        overrides: ``KEY=VALUE`` for existing keys.

    Raises:
        ConfigError: no such file, or an invalid key or value.
    """
    try:
        tree = OmegaConf.load(path)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"--params {path}: not readable ({error}); create it with `python train.py --cfg job > {path}`."
        ) from None
    malformed = [text for text in overrides if "=" not in text]
    if malformed:
        raise ConfigError(f"{malformed[0]!r}: expected KEY=VALUE.")
    return to_config(OmegaConf.merge(tree, OmegaConf.from_dotlist([keep_spelling(text) for text in overrides])))


def to_config(tree: DictConfig) -> Config:
    """Resolves and validates a composed tree."""
    return build_config(OmegaConf.to_container(tree, resolve=True, throw_on_missing=True))


def run_hydra(command: Callable[[Config], float | None], argv: Sequence[str], config_path: str | None = None) -> None:
    """Runs a command as a Hydra application, with run folders, ``--multirun``, ``--cfg job`` and Hydra's other options.

    Args:
        command: called with the configuration of each run; what it returns is the value for a sweep.
        argv: overrides and options of Hydra.
        config_path: the folder with the primary configuration, in place of conf/.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors instead of printing them
    for text in argv:
        if re.match(r"hydra\.(run|sweep)\.\w+=.*://", text):
            raise ConfigError(f"{text}: expected a local path; to upload a run, set run_dir=gs://BUCKET/FOLDER.")
    argv = [keep_spelling(text) for text in argv]
    for i, text in enumerate(argv):
        if re.match(r"(--config-dir|-cd)(=|$)", text):
            _check_names(Path(text.partition("=")[2] or "".join(argv[i + 1 : i + 2])))
    errors: list[SodaOpsError] = []

    folder = config_path if config_path and "://" in config_path else str(Path(config_path or conf_dir()).absolute())

    @hydra_main(version_base="1.3", config_path=folder, config_name="config")
    def job(tree: DictConfig) -> float | None:
        hydra = HydraConfig.get()
        try:
            config = to_config(tree)
            if config.run_dir is not None and hydra.mode == RunMode.MULTIRUN:
                raise ConfigError(
                    f"run_dir={config.run_dir}: the jobs of a sweep would overwrite each other; set hydra.sweep.dir instead."
                )
            if config.search is not None and hydra.mode != RunMode.MULTIRUN and "WANDB_SWEEP_ID" not in os.environ:
                raise ConfigError(f"search={hydra.runtime.choices.search} is a sweep; run it with -m: python train.py -m …")
            run_dir = config.run_dir or hydra.runtime.output_dir
            return command(config.model_copy(update={"run_dir": str(run_dir)}))
        except SodaOpsError as error:
            if hydra.mode == RunMode.MULTIRUN:
                raise
            errors.append(error)  # raised below, since Hydra would print its own message first
            return None

    if not is_rank_zero(os.environ):
        argv = [*argv, "hydra.run.dir=.", "hydra.output_subdir=null"]  # of several processes only the first one writes
    original, sys.argv = sys.argv, ["sodaops train", *argv]
    try:
        job()
    finally:
        sys.argv = original
    if errors:
        raise errors[0]


def explain_error(error: Exception) -> SodaOpsError | None:
    """Translates an error of Hydra, OmegaConf or PyYAML for the user; None for any other error."""
    if isinstance(error, MissingMandatoryValue):
        return ConfigError(f"{error.full_key} is missing; set {error.full_key}=VALUE.")
    if isinstance(error, RecursionError) and any(
        "defaults_list.py" in f.f_code.co_filename for f, _ in walk_tb(error.__traceback__)
    ):
        return ConfigError("a configuration file has itself among its defaults; config.yaml of your own starts from `sodaops`.")
    if isinstance(error, yaml.YAMLError):
        return ConfigError(f"a configuration file is not valid YAML: {' '.join(str(error).split())}.")
    of_options = isinstance(error, ValueError) and re.match("Only one of --|The --resolve flag", str(error))
    if not (isinstance(error, HydraException | OmegaConfBaseException) or of_options):
        return None
    text = str(error).strip()
    key = re.search(r"Could not (?:override|append to config at) '([^']+)'", text)
    if isinstance(error, ConfigCompositionException) and key and (message := unknown_key(key[1].split("@")[0])):
        return ConfigError(message)
    option = re.search(r"Could not (?:find|load) '([^']+)/([^'/]+)'", text)
    if option:
        listed = re.search(r"Available options in .*?:((?:\n\t.*)+)", text)
        present = [name for name in (listed[1].split() if listed else group_options(option[1])) if name != "base"]
        own = {"model": ", or set model.name_or_path to a hub name or a folder", "data": ", or set data=csv data.path=FILE"}
        return ConfigError(
            f"{option[1]}={option[2]}: no such option{nearest(option[2], present)}; {option[1]} has: {some(present, 40)}"
            f"{own.get(option[1], '')}."
        )
    cause = f" ({str(error.__cause__).splitlines()[0]})" if error.__cause__ is not None else ""
    return ConfigError(" ".join(text.split()) + cause)
