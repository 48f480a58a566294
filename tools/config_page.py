"""Writes docs/configuration.md from the schema and conf/; `make params` runs it."""

import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from sodaops.config.compose import compose
from sodaops.config.keys import comments_of
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
    schema = Config.model_json_schema()
    default = compose().model_dump(mode="json")
    default["search"] = compose(["search=default"]).model_dump(mode="json")["search"]
    default["logger"] = compose(["logger=many"]).model_dump(mode="json")["logger"]
    top: list[str] = []
    sections: list[str] = []
    for name, of in schema["properties"].items():
        inner = _section(of, schema)
        if inner is None and name != "trainer":
            top.append(name)
        else:
            sections.append(_section_text(name, inner, default[name], schema))
    top_level = {"properties": {name: schema["properties"][name] for name in top}}
    first = _table(list(_rows("", top_level, default, schema, comments_of(top[0]))))
    return _HEAD + "\n".join([f"## Top level\n\n{first}", *sections])


def _section_text(name: str, section: dict[str, Any] | None, default: Any, schema: dict[str, Any]) -> str:
    folder = REPO / "conf" / name
    comments = comments_of(name)
    if section is None:  # free-form
        text = "Arguments of `lightning.Trainer`, checked against Lightning's signature when training starts."
        rows = [(f"{name}.{key}", "", _value(value), comments.get(f"{name}.{key}", "")) for key, value in default.items()]
    else:
        text = section.get("description", "").split("\n")[0]
        rows = list(_rows(f"{name}.", section, default, schema, comments))
    parts = [f"## {name}", text]
    if name in _PREFIXES:
        key = rows[0][0]
        variable = f"{_PREFIXES[name]}{key.partition('.')[2].upper()}"
        parts.append(f"Each is also an environment variable of the service: `{key}` is `{variable}`.")
    if options := _options(folder):
        parts.append(options)
    return "\n\n".join([*parts, _table(rows)])


def _options(folder: Path) -> str:
    """A list of a group's files with the first sentence of each."""
    options = []
    for file in sorted(folder.glob("*.yaml")):
        lines = file.read_text(encoding="utf-8").splitlines()
        comment = itertools.takewhile(lambda line: line.startswith("#"), (line for line in lines if "@package" not in line))
        summary = re.split(r"\. |: |\.$", " ".join(line.lstrip("# ") for line in comment))[0]
        if file.stem != "base":
            options.append(f"- `{folder.name}={file.stem}`" + (f": {summary}" if summary else ""))
    return "\n".join(options) if len(options) > 1 else ""


def _rows(
    prefix: str, section: Mapping[str, Any], default: Any, schema: Mapping[str, Any], comments: Mapping[str, str]
) -> Iterator[tuple[str, str, str, str]]:
    for name, of in section["properties"].items():
        key, inner = f"{prefix}{name}", _section(of, schema)
        value = None if default is None else default[name]
        if inner is None or value is None:
            text = of.get("description") or comments.get(key, "")
            if "enum" in of and all(str(allowed) in text for allowed in of["enum"]):
                text = ""  # the cell beside it lists the same values
            yield key, _allowed(of, schema), "" if default is None else _value(value), text
        if inner is not None:
            yield from _rows(f"{key}.", inner, value, schema, comments)


def _section(of: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any] | None:
    """The schema of a property that is an object with keys, or may be one besides null."""
    for kind in of.get("anyOf", [of]):
        target = schema["$defs"][kind["$ref"].rpartition("/")[2]] if "$ref" in kind else None
        if target is not None and target.get("properties"):
            return target
    return None


def _allowed(of: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """The allowed values in words."""
    if "anyOf" in of:
        return " or ".join(dict.fromkeys(_allowed(kind, schema) for kind in of["anyOf"]))
    if "$ref" in of:
        return "the keys below" if schema["$defs"][of["$ref"].rpartition("/")[2]].get("properties") else "{}"
    if "enum" in of or "const" in of:
        return ", ".join(f"`{value}`" for value in of.get("enum", [of.get("const")]))
    kind = of.get("type", "any")
    if kind == "array":
        return f"list of {_allowed(of['items'], schema)}"
    names = {"string": "text", "integer": "whole number", "boolean": "`true`, `false`", "object": "mapping"}
    return names.get(kind, kind) + _bounds(of)


def _bounds(of: Mapping[str, Any]) -> str:
    low, high = of.get("minimum", of.get("exclusiveMinimum")), of.get("maximum", of.get("exclusiveMaximum"))
    if low is None and high is None:
        return ""
    least = "" if low is None else f" above {low:,}" if "exclusiveMinimum" in of else f" from {low:,}"
    most = "" if high is None else f" below {high:,}" if "exclusiveMaximum" in of else f" to {high:,}"
    return least + most


def _value(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False, allow_unicode=True)
    text = text.removesuffix("\n").removesuffix("\n...").strip()
    return f"`{text}`" if len(text) <= _MAX_SHOWN else f"`{text[:_MAX_SHOWN]}`…"


def _table(rows: list[tuple[str, str, str, str]]) -> str:
    lines = ["| key | default | allowed | |", "| --- | --- | --- | --- |"]
    for key, allowed, value, text in rows:
        cells = [f"`{key}`", value, allowed, re.sub(r"([\\_*<|\[])", r"\\\1", text)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
