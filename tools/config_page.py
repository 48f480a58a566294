"""Writes docs/configuration.md from the schema and conf/: ``python tools/config_page.py`` (`make params` does it)."""

import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from sodaops.config.compose import compose
from sodaops.config.schema import Config

REPO = Path(__file__).resolve().parents[1]
PAGE = REPO / "docs/configuration.md"
_PREFIXES = {"serve": "SODAOPS_", "drift": "SODAOPS_DRIFT_", "annotate": "SODAOPS_ANNOTATE_"}
_LONG = 60  # characters of a default that are shown
_HEAD = """\
# Configuration

Every key, with its default. `make params` makes this page from the schema (sodaops/config/schema.py) and conf/, and
a test compares it with them.

`KEY=VALUE` on a command line changes a key, `GROUP=OPTION` takes another file of a group, `--config-dir FOLDER` adds files of
your own, `--cfg job` prints the whole. A mistake is refused, together with all others, with the nearest name and exit code 2.
The grammar is [Hydra's](https://hydra.cc/docs/advanced/override_grammar/basic/).

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
            sections.append(_described(name, inner, default[name], schema))
    of_run = {"properties": {name: schema["properties"][name] for name in top}}
    first = _table(list(_rows("", of_run, default, schema, _comments(REPO / "conf/config.yaml"))))
    return _HEAD + "\n".join([f"## Of the run\n\n{first}", *sections])


def _described(name: str, section: dict[str, Any] | None, default: Any, schema: dict[str, Any]) -> str:
    folder = REPO / "conf" / name
    comments: dict[str, str] = {}
    for file in _files(name):
        comments |= {f"{name}.{key}" if folder.is_dir() else key: said for key, said in _comments(file).items()}
    if section is None:  # free form
        said = "Arguments of `lightning.Trainer`, checked against Lightning's own signature where training starts."
        rows = [(f"{name}.{key}", "", _value(value), comments.get(f"{name}.{key}", "")) for key, value in default.items()]
    else:
        said = section.get("description", "").split("\n")[0]
        rows = list(_rows(f"{name}.", section, default, schema, comments))
    parts = [f"## {name}", said]
    if name in _PREFIXES:
        key = rows[0][0]
        parts.append(f"Each is also a variable of the service: `{key}` is `{_PREFIXES[name]}{key.partition('.')[2].upper()}`.")
    if options := _options(folder):
        parts.append(options)
    return "\n\n".join([*parts, _table(rows)])


def _files(name: str) -> list[Path]:
    """Where a section's comments are, those that go before the others last."""
    folder = REPO / "conf" / name
    if not folder.is_dir():
        return [REPO / "conf/config.yaml"]
    return sorted(folder.glob("*.yaml"), key=lambda file: (file.stem == "base", file.stem == "default", file.stem))


def _options(folder: Path) -> str:
    """The files of a group, and the first sentence of each."""
    found = []
    for file in sorted(folder.glob("*.yaml")):
        lines = file.read_text(encoding="utf-8").splitlines()
        comment = itertools.takewhile(lambda line: line.startswith("#"), (line for line in lines if "@package" not in line))
        said = re.split(r"\. |: |\.$", " ".join(line.lstrip("# ") for line in comment))[0]
        if file.stem != "base":
            found.append(f"- `{folder.name}={file.stem}`" + (f": {said}" if said else ""))
    return "\n".join(found) if len(found) > 1 else ""


def _comments(file: Path) -> dict[str, str]:
    """Key -> the comment that ends its line; keys are joined by points, ``@package _global_`` files leave out their section."""
    found: dict[str, str] = {}
    way: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        parsed = re.fullmatch(r"( *)(\w+):(?: .*?)?(?:\s+#\s*(.+))?", line)
        if parsed:
            way = [*way[: len(parsed[1]) // 2], parsed[2]]
            if parsed[3]:
                found[".".join(way if way[0] != file.parent.name else way[1:])] = parsed[3]
    return found


def _rows(
    prefix: str, section: Mapping[str, Any], default: Any, schema: Mapping[str, Any], comments: Mapping[str, str]
) -> Iterator[tuple[str, str, str, str]]:
    for name, of in section["properties"].items():
        key, inner = f"{prefix}{name}", _section(of, schema)
        value = None if default is None else default[name]
        if inner is None or value is None:
            said = of.get("description") or comments.get(key, "")
            if "enum" in of and all(str(allowed) in said for allowed in of["enum"]):
                said = ""  # the cell beside it says the same
            yield key, _allowed(of, schema), "" if default is None else _value(value), said
        if inner is not None:
            yield from _rows(f"{key}.", inner, value, schema, comments)


def _section(of: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any] | None:
    """The object with keys of its own that a property is, or may be besides null."""
    for kind in of.get("anyOf", [of]):
        found = schema["$defs"][kind["$ref"].rpartition("/")[2]] if "$ref" in kind else None
        if found is not None and found.get("properties"):
            return found
    return None


def _allowed(of: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """What a value may be, in words."""
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
    return f"`{text}`" if len(text) <= _LONG else f"`{text[:_LONG]}`…"


def _table(rows: list[tuple[str, str, str, str]]) -> str:
    lines = ["| key | default | may be | |", "| --- | --- | --- | --- |"]
    for key, allowed, value, said in rows:
        cells = [f"`{key}`", value, allowed, re.sub(r"([\\_*<|\[])", r"\\\1", said)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
