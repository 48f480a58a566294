"""The keys of the configuration with their descriptions, defaults and allowed values, from the schema and conf/."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from sodaops.config.keys import comments_of, defaults_of, groups
from sodaops.config.schema import Config
from sodaops.errors import nearest, some

MOVED = {  # key of version 0.1 -> new key
    "optim.schedule": "optim.scheduler.decay",
    "optim.warmup": "optim.scheduler.warmup",
    "optim.class_weights": "loss.class_weights",
    "optim.label_smoothing": "loss.label_smoothing",
}


class Key(NamedTuple):
    """A key, or a section of keys.

    Attributes:
        text: its description.
        default: its value in the composed configuration; ???: it has none.
        allowed: the allowed values in words, single ones in backticks; empty for a section and for an argument of a class.
    """

    text: str
    default: Any
    allowed: str


def describe_keys(config: Config | None = None) -> dict[str, Key]:
    """Dotted key -> its description, of all sections and keys.

    Args:
        config: with the values to show; None: as far as the files in conf/ have them.

    >>> describe_keys()["model.pooling"]
    Key(text='mean or cls', default='mean', allowed='`mean`, `cls`')
    """
    schema = Config.model_json_schema()
    return dict(_keys("", schema, config.model_dump(mode="json") if config is not None else None, schema["$defs"]))


def unknown_key(key: str) -> str | None:
    """The message about a key that does not exist, with the nearest name and those of its section; None if it exists.

    >>> unknown_key("checkpoint.restart")
    'checkpoint.restart is not a key (did you mean restarts?); checkpoint has: monitor, mode, every_n_train_steps, restarts.'
    """
    if key in MOVED:
        return f"{key} has moved; set {MOVED[key]}."
    section, keys = "", [*describe_keys(), *groups()]
    if (top := key.partition(".")[0]) in keys:
        keys += defaults_of(top)  # of a section without fixed keys
    for name in key.split("."):
        names = list(dict.fromkeys(other[len(section) :].partition(".")[0] for other in keys if other.startswith(section)))
        if name not in names:
            hint = nearest(name, names) or nearest(next((other for other in keys if other.endswith(f".{key}")), ""), keys)
            return f"{key} is not a key{hint}; {section.rstrip('.') or 'the top level'} has: {some(names, 40)}."
        section += f"{name}."
    return None


def _keys(prefix: str, section: Mapping[str, Any], values: Any, types: Mapping[str, Any]) -> Iterator[tuple[str, Key]]:
    for name, of in section["properties"].items():
        key, inner = f"{prefix}{name}", _section_of(of, types)
        top = key.partition(".")[0]
        value = values[name] if isinstance(values, Mapping) else defaults_of(top).get(key, "???")
        text = of.get("description") or comments_of(top).get(key) or (inner or {}).get("description", "").split("\n")[0]
        holds_keys = isinstance(value, Mapping) and bool(inner or (value and (not prefix or "_target_" in value)))
        yield key, Key(text, value, "" if holds_keys else _allowed(of, types))
        if inner is not None:
            yield from _keys(f"{key}.", inner, value, types)
        elif holds_keys:  # the arguments of a class
            for argument in value:
                yield f"{key}.{argument}", Key(comments_of(top).get(f"{key}.{argument}", ""), value[argument], "")


def _section_of(of: Mapping[str, Any], types: Mapping[str, Any]) -> dict[str, Any] | None:
    """The schema of a property that is an object with keys, or may be one besides null."""
    targets = (types[kind["$ref"].rpartition("/")[2]] for kind in of.get("anyOf", [of]) if "$ref" in kind)
    return next((target for target in targets if target.get("properties")), None)


def _allowed(of: Mapping[str, Any], types: Mapping[str, Any]) -> str:
    """The allowed values in words."""
    if "anyOf" in of:
        return " or ".join(dict.fromkeys(_allowed(kind, types) for kind in of["anyOf"]))
    if "$ref" in of:
        return "the keys below" if _section_of(of, types) else "{}"
    if "enum" in of or "const" in of:
        return ", ".join(f"`{value}`" for value in of.get("enum", [of.get("const")]))
    kind = of.get("type", "any")
    if kind == "array":
        return f"list of {_allowed(of['items'], types)}"
    low, high = of.get("minimum", of.get("exclusiveMinimum")), of.get("maximum", of.get("exclusiveMaximum"))
    least = "" if low is None else f" above {low:,}" if "exclusiveMinimum" in of else f" from {low:,}"
    most = "" if high is None else f" below {high:,}" if "exclusiveMaximum" in of else f" to {high:,}"
    names = {"string": "text", "integer": "whole number", "boolean": "`true`, `false`", "object": "mapping"}
    return names.get(kind, kind) + least + most
