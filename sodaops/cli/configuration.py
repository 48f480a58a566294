"""The command `sodaops config show`."""

import argparse
import inspect

from sodaops.cli.training import configured
from sodaops.config.extensions import load
from sodaops.config.keys import group_options, groups, inline_yaml
from sodaops.config.reference import Key, describe_keys, unknown_key
from sodaops.errors import ConfigError


def run_config_show(options: argparse.Namespace) -> None:
    """`sodaops config show [KEY]`: a key's description, default and allowed values; of a section its options and keys.

    Raises:
        ConfigError: no such key.
    """
    notes, name = groups(), options.key
    keys = {group: Key(note, {}, "") for group, note in notes.items()} | describe_keys(configured(options))
    if name is None:
        below = {key: of for key, of in keys.items() if "." not in key}
    elif name in keys:
        below = {key: of for key, of in keys.items() if key.startswith(f"{name}.")}
        print(f"{name}: {notes.get(name) or keys[name].text}".removesuffix(": "))
    else:
        raise ConfigError(unknown_key(name) or f"{name} has no keys of its own.")
    if name in notes:
        print("\n".join(f"  {f'{name}={option}':<40} {note}".rstrip() for option, note in group_options(name).items()))
    elif name is not None and not below:
        allowed = keys[name].allowed.replace("`", "") or _type(name, keys)
        print(f"  default  {inline_yaml(keys[name].default)}\n  allowed  {allowed}")
    for key, of in below.items():
        is_section = of.allowed == "" and isinstance(of.default, dict)
        print(f"  {key if is_section else f'{key}={inline_yaml(of.default)}':<40} {of.text}".rstrip())


def _type(name: str, keys: dict[str, Key]) -> str:
    """The type of an argument of a class, from its signature."""
    section, _, argument = name.rpartition(".")
    target = keys[section].default.get("_target_", "lightning.Trainer")
    parameter = inspect.signature(load(f"{section}._target_", target)).parameters.get(argument)
    auto = "auto or " if keys[name].default == "auto" else ""
    return (
        f"{auto}{inspect.formatannotation(parameter.annotation)}, an argument of {target}"
        if parameter
        else "a class or function"
    )
