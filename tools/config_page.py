"""Writes docs/configuration.md from the schema and conf/; `make params` runs it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sodaops.config.compose import compose
from sodaops.config.keys import group_options, inline_yaml
from sodaops.config.keywords import KEYWORDS
from sodaops.config.reference import Key, describe_keys
from sodaops.config.schema import Config

REPO = Path(__file__).resolve().parents[1]
PAGE = REPO / "docs/configuration.md"
_PREFIXES = {"serve": "SODAOPS_", "drift": "SODAOPS_DRIFT_", "annotate": "SODAOPS_ANNOTATE_"}
_MAX_SHOWN = 60  # characters of a default
_HEAD = """\
# Configuration

All keys with their defaults. `make params` writes this page from the schema (sodaops/config/schema.py) and conf/.

`KEY=VALUE` on a command line sets a key, `GROUP=OPTION` selects a file of a group, `--config-dir FOLDER` adds your own files,
and `--cfg job` prints the whole configuration. Mistakes are reported together, each with the nearest name and exit code 2. The
grammar is [Hydra's](https://hydra.cc/docs/advanced/override_grammar/basic/).

`hydra.searchpath=[FOLDER]` and search path plugins work too. A config.yaml of your own, for `--config-path FOLDER` or an
application with `@hydra.main`, starts from this configuration, and may replace options and keys:

```yaml
defaults: [sodaops, override model: tiny, _self_]
seed: 7
run_dir: ${hydra:runtime.output_dir}
```

In the application, `sodaops.config.compose.to_config(tree)` validates the tree.

"""


def page() -> str:
    """The whole page, Markdown."""
    keys = describe_keys(compose())
    sections = [name for name in Config.model_fields if any(key.startswith(f"{name}.") for key in keys)]
    top = {name: key for name, key in keys.items() if "." not in name and name not in sections}
    return _HEAD + "\n".join([f"## Top level\n\n{_table(top)}", *(_section_text(name, keys) for name in sections), _keywords()])


def _keywords() -> str:
    lines = ["| keyword | key | of |", "| --- | --- | --- |"]
    for (keyword, key), functions in _functions_of_keywords().items():
        lines.append(f"| `{keyword}` | `{key}` | {', '.join(f'`sodaops.{function}`' for function in functions)} |")
    return "## Keywords of the Python API\n\n" + "\n".join(lines) + "\n"


def _functions_of_keywords() -> dict[tuple[str, str], list[str]]:
    functions: dict[tuple[str, str], list[str]] = {}
    for function, keys in KEYWORDS.items():
        for pair in keys.items():
            functions.setdefault(pair, []).append(function)
    return functions


def _section_text(name: str, keys: Mapping[str, Key]) -> str:
    rows = {
        key: of for key, of in keys.items() if key.startswith(f"{name}.") and not (of.allowed == "" and _is_section(key, keys))
    }
    parts = [f"## {name}", keys[name].text]
    if name in _PREFIXES:
        key = next(iter(rows))
        variable = f"{_PREFIXES[name]}{key.partition('.')[2].upper()}"
        parts.append(f"Each is also an environment variable of the service: `{key}` is `{variable}`.")
    options = [f"- `{name}={option}`" + (f": {text}" if text else "") for option, text in group_options(name).items()]
    if len(options) > 1:
        parts.append("\n".join(options))
    return "\n\n".join([*parts, _table(rows)])


def _is_section(key: str, keys: Mapping[str, Key]) -> bool:
    return any(other.startswith(f"{key}.") for other in keys)


def _value(value: Any) -> str:
    text = "" if value == "???" else inline_yaml(value)
    return text and f"`{text}`" if len(text) <= _MAX_SHOWN else f"`{text[:_MAX_SHOWN]}`…"


def _table(rows: Mapping[str, Key]) -> str:
    lines = ["| key | default | allowed | |", "| --- | --- | --- | --- |"]
    for name, key in rows.items():
        values = re.findall("`(.+?)`", key.allowed) if re.fullmatch("(`[^`]+`(, |$))+", key.allowed) else []
        in_cell = values and values != ["true", "false"] and all(value in key.text for value in values)
        text = "" if in_cell else key.text  # the cell beside it lists the same values
        cells = [f"`{name}`", _value(key.default), key.allowed, re.sub(r"([\\_*<|\[])", r"\\\1", text)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
