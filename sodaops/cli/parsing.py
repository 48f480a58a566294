"""Parses the arguments of a command, and formats its help, without importing a stage, Hydra or the schema."""

import argparse
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from sodaops.cli.commands import COMMANDS, CONFIG, MODULE_OF, find_command, subcommands
from sodaops.errors import ConfigError, nearest

_OVERRIDE = re.compile(r"(\+\+?|~)?[A-Za-z_][\w./@:-]*=|~[A-Za-z_]")


class CommandParser(argparse.ArgumentParser):
    """The parser of a command. Its help names the configuration keys, and ends with an example.

    Args:
        name: of the command.
    """

    def __init__(self, name: str) -> None:
        self._command = command = COMMANDS[name]
        description = f"{command.summary[0].upper()}{command.summary[1:]}. {command.note}".strip()
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(f"sodaops {name}", description=description, formatter_class=formatter, allow_abbrev=False)
        for names, settings in command.arguments:
            self.add_argument(*names, **settings)
        if command.keys:
            self.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="changes a key of the configuration")
            one_of = self.add_mutually_exclusive_group()
            for names, settings in CONFIG:
                one_of.add_argument(*names, **settings)

    def error(self, message: str) -> NoReturn:
        """Raises a ConfigError in place of argparse's exit."""
        raise ConfigError(f"{self.prog}: {message}; expected for example `{self._command.example}` (see {self.prog} --help).")

    def format_help(self) -> str:
        """The help of argparse, the keys and the example."""
        text = super().format_help()
        if self._command.keys:
            lines = "\n".join(f"  {line}" for key in self._command.keys for line in _key_lines(key))
            text += (
                f"\nconfiguration that it reads, with defaults (`sodaops config show` describes groups and keys):\n{lines}\n"
            )
        return f"{text}\nexample:\n  {self._command.example}\n"


def _key_lines(key: str) -> Iterator[str]:
    """A line for each key of a section; only the section for ``SECTION.*``; all groups for ``*``."""
    from sodaops.config.keys import comments_of, defaults_of, group_options, groups, inline_yaml

    section, _, rest = key.partition(".")
    if key == "*":
        for group, note in groups().items():
            yield f"{group:<11} {note}: {', '.join(group_options(group))}"
    elif rest.endswith("*"):
        yield key
    else:
        notes = comments_of(section)
        for name, value in defaults_of(section).items():
            if name == key or name.startswith(f"{key}."):
                yield f"{f'{name}={inline_yaml(value)}':<40} {notes.get(name, '')}".rstrip()


def is_override(word: str) -> bool:
    """Whether a word changes the configuration, and is no path that has an equals sign in it.

    >>> is_override("optim.lr=1e-3"), is_override("~logger"), is_override("outputs/first"), is_override("gs://b/lr=1")
    (True, True, False, False)
    """
    return _OVERRIDE.match(word) is not None and "://" not in word.partition("=")[0] and not Path(word).exists()


def parse(words: Sequence[str]) -> tuple[str, argparse.Namespace]:
    """Finds the command and parses its arguments; KEY=VALUE may stand anywhere among them.

    Returns:
        The name of the command, and its arguments; ``overrides`` are its KEY=VALUE. Those of ``train`` are not parsed, since
        Hydra does it; ``words`` has them.

    Raises:
        ConfigError: no such command, or an argument that is missing or not valid.
        SystemExit: the help was asked for, and printed.
    """
    name, rest = find_command(list(words))
    if name not in COMMANDS:
        _show_commands(name, rest)
    parser = CommandParser(name)
    if name == "train":
        if {"-h", "--help"} & set(rest):
            parser.parse_args(["--help"])
        return name, argparse.Namespace(words=rest)
    if not COMMANDS[name].keys:
        return name, parser.parse_intermixed_args(rest)
    with_value = {flag for flag, action in parser._option_string_actions.items() if action.nargs != 0}
    chosen = [is_override(word) and before not in with_value for before, word in zip(["", *rest], rest, strict=False)]
    options = parser.parse_intermixed_args(list(itertools.compress(rest, (not is_chosen for is_chosen in chosen))))
    if options.overrides:
        parser.error(f"{options.overrides[0]!r} is not understood; expected KEY=VALUE")
    options.overrides = list(itertools.compress(rest, chosen))
    return name, options


def _show_commands(name: str, rest: Sequence[str]) -> NoReturn:
    """Prints the list of all commands, or of those that start with a word, if the help is asked for.

    Raises:
        ConfigError: no such command.
        SystemExit: the list was printed.
    """
    below = subcommands(name)
    word = name if not below else rest[0] if rest else ""
    if word not in ("-h", "--help"):
        if below:
            raise ConfigError(f"sodaops {name} {word}: expected one of {', '.join(below)}{nearest(word, below)}.")
        raise ConfigError(
            f"{name!r} is not a command{nearest(name, MODULE_OF)}; expected one of {', '.join(MODULE_OF)}. "
            "`sodaops --help` describes them."
        )
    first = f"{name} " if below else ""
    lines = [f"  {command:<18}{about.summary}" for command, about in COMMANDS.items() if command.startswith(first)]
    print("\n".join([
        f"usage: sodaops {first}COMMAND [ARGUMENTS] [KEY=VALUE ...]", "", *lines, "",
        "`sodaops COMMAND --help` shows its arguments, its configuration keys and an example. KEY=VALUE changes the",
        "configuration in conf/ (model=distilbert, trainer.max_epochs=3).",
    ]))  # fmt: skip
    raise SystemExit(0)
