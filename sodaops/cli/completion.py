"""Tab completion for bash and zsh: commands, options, and the groups, options and keys of conf/.

The shell runs the command that is being typed, with the line up to the cursor in SODAOPS_COMPLETE. The command then prints
the words that fit.
"""

import argparse
import os
import re
import shlex
from collections.abc import Iterable, Iterator

from sodaops.cli.commands import COMMANDS, COMPLETE, CONFIG, Argument, find_command
from sodaops.config.keys import conf_dir, defaults_of, group_options, groups

# Both run `python train.py` only if it is the project's. Words that go on (model=, optim.) get no space after them.
_BASH = """\
_sodaops() {
  local IFS=$'\\n' current=${COMP_WORDS[COMP_CWORD]} line=${COMP_LINE:0:COMP_POINT} program=("${COMP_WORDS[0]}")
  if [[ ${program##*/} == python* ]]; then
    grep -qs "from sodaops.cli import" "${COMP_WORDS[1]}" || return
    program+=("${COMP_WORDS[1]}")
  fi
  [[ $current == [=:] ]] && current=
  local word=${line##*[[:space:]]}
  COMPREPLY=($(VARIABLE=$line "${program[@]}" 2>/dev/null))
  COMPREPLY=("${COMPREPLY[@]#"${word%"$current"}"}")
  [[ ${COMPREPLY[0]} == *[=.] ]] && compopt -o nospace
}
complete -o default -F _sodaops sodaops python python3
"""
_ZSH = """\
_sodaops() {
  local -a program=("${(Q)words[1]}") found
  if [[ ${program[1]:t} == python* ]]; then
    if ! grep -qs "from sodaops.cli import" "${(Q)words[2]}"; then
      (( $+functions[_python] )) && _python || _files
      return
    fi
    program+=("${(Q)words[2]}")
  fi
  found=(${(f)"$(VARIABLE="${(j: :)words[1,CURRENT-1]} $PREFIX" "${program[@]}" 2>/dev/null)"})
  if (( $#found )); then
    compadd -S '' -- ${(M)found:#*[=.]}
    compadd -- ${found:#*[=.]}
  else
    compset -P '*='
    _files
  fi
}
compdef _sodaops sodaops python python3
"""


def run_completion(options: argparse.Namespace) -> None:
    """`sodaops completion bash` or `zsh`: prints the function for the shell."""
    print({"bash": _BASH, "zsh": _ZSH}[options.shell].replace("VARIABLE", COMPLETE), end="")


def complete(line: str) -> list[str]:
    """The words that may stand at the end of a line; none where a file is expected, which the shell completes.

    Args:
        line: up to the cursor.

    >>> complete("sodaops annotate me"), complete("python train.py mod"), complete("sodaops select --direction ")
    (['merge'], ['model=', 'model.'], ['maximize', 'minimize'])
    """
    try:
        words = shlex.split(line)
    except ValueError:  # an open quote
        return []
    current = "" if line[-1:].isspace() else words.pop()
    start = next((i for i, word in enumerate(words) if os.path.basename(word) in ("sodaops", "train.py")), None)
    if start is None:
        return []
    words = ["train"] * words[start].endswith(".py") + words[start + 1 :]
    name, rest = find_command(words)
    prefix = f"{name} ".lstrip()
    found = [command.removeprefix(prefix).split()[0] for command in COMMANDS if command.startswith(prefix) and not rest]
    found += _candidates(name, rest, current) if name in COMMANDS else ()
    return [word for word in dict.fromkeys(found) if word.startswith(current)]


def _candidates(name: str, rest: list[str], current: str) -> Iterable[str]:
    """The options, values and KEY=VALUE that a command accepts after the words ``rest``."""
    command = COMMANDS[name]
    arguments = [*command.arguments, *(CONFIG if command.keys else ())]
    options = {flag: argument for argument in arguments for flag in argument[0] if flag.startswith("-")}
    if current.startswith("-"):
        return [*(flag for flag in options if flag.startswith("--")), "--help"]
    before = options.get(rest[-1]) if rest else None
    if before is not None and before[1].get("action") is None:  # the value of an option
        return before[1].get("choices", [])
    choices: list[str] = next(
        (settings["choices"] for names, settings in arguments if names[0][0] != "-" and "choices" in settings), []
    )
    if not command.keys or (current == "" and _takes_path(command.arguments, rest)):
        return choices
    words = _overrides(current, [rest[i + 1] for i, word in enumerate(rest[:-1]) if word == "--config-dir"])
    return (word.rstrip("=") for word in words) if name == "config show" and _takes_path(command.arguments, rest) else words


def _takes_path(arguments: Iterable[Argument], rest: list[str]) -> bool:
    """Whether the command's positional argument, a path, is still missing."""
    return any(names[0][0] != "-" for names, _ in arguments) and not any("=" not in word for word in rest)


def _overrides(current: str, extra_dirs: list[str]) -> Iterator[str]:
    """The groups and keys that begin with a word, up to their next dot, or the values of a group or a Boolean key."""
    sign, text = re.fullmatch(r"(\+\+|\+|~|)(.*)", current, flags=re.DOTALL).groups()  # type: ignore[union-attr]
    key, equals, value = text.partition("=")
    if equals:
        if key in groups():
            earlier = value.rpartition(",")[0]
            prefix = f"{sign}{key}=" + (f"{earlier}," if earlier else "")
            yield from (f"{prefix}{option}" for option in group_options(key, extra_dirs))
        else:
            from sodaops.config.reference import Key, describe_keys  # they load the schema

            flag = isinstance(defaults_of(key.partition(".")[0]).get(key), bool)
            allowed = "`true`, `false`" if flag else describe_keys().get(key, Key("", None, "")).allowed
            yield from (f"{sign}{key}={choice}" for choice in re.findall("`(.+?)`", allowed) if not allowed.startswith("list"))
        return
    section, dot, _ = text.partition(".")
    keys = defaults_of(section) if dot else [name for top in _top_level() for name in defaults_of(top)]
    yield from dict.fromkeys([f"{sign}{group}=" for group in groups() if not dot and len(group_options(group)) > 1])
    for full in keys:
        if full.startswith(text):
            inner, more, _ = full[len(text) :].partition(".")
            yield f"{sign}{text}{inner}" + ("." if more else "=")


def _top_level() -> list[str]:
    """The sections and keys of the configuration."""
    lines = (conf_dir() / "config.yaml").read_text(encoding="utf-8").splitlines()
    keys = [line.partition(":")[0] for line in lines if re.match(r"[a-z_]+:", line)]
    return [key for key in [*keys, *groups()] if key not in ("defaults", "hydra", "experiment", "debug")]
