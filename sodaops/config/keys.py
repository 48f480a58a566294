"""The groups, keys, defaults and comments of conf/, read without Hydra, for help and completion."""

import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml


def conf_dir() -> Path:
    """The folder with config.yaml: in the installed package, or beside it in the repository."""
    package = Path(__file__).resolve().parents[1]
    return next(folder for folder in (package / "conf", package.parent / "conf") if (folder / "config.yaml").is_file())


def groups() -> dict[str, str]:
    """Group -> the comment on its line in the defaults list of config.yaml, in that order."""
    return dict(re.findall(r"(?m)^  - (\w+): \w+ +# (.+)$", (conf_dir() / "config.yaml").read_text(encoding="utf-8")))


def group_options(group: str, extra_dirs: Sequence[str | Path] = ()) -> dict[str, str]:
    """Option of a group -> the first sentence of the comment in its file.

    Args:
        group: its name.
        extra_dirs: folders given by ``--config-dir``.
    """
    files = {file.stem: file for folder in (conf_dir(), *map(Path, extra_dirs)) for file in (folder / group).glob("*.yaml")}
    return {option: _first_sentence(files[option]) for option in sorted(files) if option != "base"}


def _first_sentence(file: Path) -> str:
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if "@package" not in line]
    comment = itertools.takewhile(lambda line: line.startswith("#"), lines)
    return re.split(r"\. |: |\.$", " ".join(line.lstrip("# ") for line in comment))[0]


def inline_yaml(value: Any) -> str:
    """A value as YAML on one line.

    >>> inline_yaml({"a": [1, None], "b": "no"})
    "{a: [1, null], b: 'no'}"
    """
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _files_of(section: str) -> list[Path]:
    """The files that define a section; later ones have precedence."""
    folder = conf_dir() / section
    if not folder.is_dir():
        return [conf_dir() / "config.yaml"]
    return sorted(folder.glob("*.yaml"), key=lambda file: (file.stem == "base", file.stem == "default", file.stem))


@functools.cache
def comments_of(section: str) -> dict[str, str]:
    """Dotted key -> the comment at the end of its line in conf/, of a section, or of config.yaml for a key at the top level."""
    return {key: text for file in _files_of(section) for key, text in _comments(file)}


def _comments(file: Path) -> Iterator[tuple[str, str]]:
    path: list[str] = []
    root = [] if file.parent == conf_dir() else [file.parent.name]
    for line in file.read_text(encoding="utf-8").splitlines():
        parsed = re.fullmatch(r"( *)(\w+):(?: .*?)?(?:\s+#\s*(.+))?", line)
        if parsed:
            path = [*path[: len(parsed[1]) // 2], parsed[2]]
            if parsed[3]:  # `@package _global_` files name their section themselves
                yield ".".join(path if path[:1] == root else [*root, *path]), parsed[3]


@functools.cache
def defaults_of(section: str) -> dict[str, Any]:
    """Dotted key -> default, of all keys of a section, or of a single key at the top level.

    >>> defaults_of("registry")["registry.path"], defaults_of("seed")
    ('registry', {'seed': 42})
    """
    tree: Any = {}
    for file in _files_of(section):
        text = file.read_text(encoding="utf-8")
        content = yaml.load(text, yaml.CSafeLoader) or {}
        if file.parent == conf_dir() or "# @package _global_" in text:
            content = content.get(section, {})
        tree = tree | content if isinstance(content, Mapping) else content
    return {key: value for key, value in _leaves(section, tree) if key != f"{section}.defaults"}


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaves(f"{prefix}.{name}", inner)
    else:
        yield prefix, value
