"""Keeps labels and names of columns as the user spelled them: ``no``, ``01``, ``1.0``, ``true`` and ``NA`` stay text.

YAML and Hydra would read them as truth values and numbers. Where this module is imported, OmegaConf reads YAML files with a
loader that does not; :func:`keep_spelling` does the same for the overrides of the command line.
"""

import json
import re
from typing import Any

import omegaconf._utils as omegaconf_utils
import yaml

_COLLECTIONS = ("labels", "label_map", "vote_columns", "slice_columns")
_NAMES = ("text_column", "label_column")
_OVERRIDE = re.compile(rf"(\+{{0,2}}data\.(?:{'|'.join((*_COLLECTIONS, *_NAMES, 'delimiter'))})(?:\.[^=]+)?)=(.*)", re.DOTALL)
_ITEM = r"""\s*(?:"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|(?:\\.|[^\\,{}\[\]'":])+)\s*"""
_LIST_ITEM = _ITEM.replace(":]", "]")
_LIST = re.compile(rf"\[{_LIST_ITEM}(?:,{_LIST_ITEM})*\]")
_HYDRA_TEXT = re.compile(r"(?:\\.|[\w/+.$%*@?| -])+", re.ASCII)  # what may stand without quotes
_MAPPING = re.compile(rf"\{{{_ITEM}:{_ITEM}(?:,{_ITEM}:{_ITEM})*\}}")
_RETYPED = re.compile(
    r"(?i:true|false|null|nan|\.nan|[-+]?\.?inf|yes|no|on|off|y|n|~)|[-+]?(0[xXoO]?[0-9a-fA-F_]+|[0-9][0-9_]*|[0-9._]+(e[-+]?[0-9]+)?)"
    r"|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?",
    re.IGNORECASE,
)
_STRING = "tag:yaml.org,2002:str"
_yaml_loader = omegaconf_utils.get_yaml_loader
_LIBYAML = (yaml.CSafeLoader,) if yaml.__with_libyaml__ else ()  # parses in a tenth of the time


def is_retyped(text: str) -> bool:
    """Whether YAML or Hydra may make something else of a text than itself; ``10`` and ``-3`` come back as they are.

    >>> [text for text in ("no", "01", "1.0", "10", "good", "NA", "None") if is_retyped(text)]
    ['no', '01', '1.0']
    """
    return bool(_RETYPED.fullmatch(text)) and not re.fullmatch("0|-?[1-9][0-9]*", text)


def keep_spelling(override: str) -> str:
    """An override in which Hydra keeps labels and names of columns as they are.

    Lists and mappings that Hydra would change, or cannot read, become a text with JSON, which the schema reads.

    >>> keep_spelling("data.labels=[true,false]")
    'data.labels=\\'["true", "false"]\\''
    >>> keep_spelling("data.labels=[good,bad]"), keep_spelling("data.label_column=1.0")
    ('data.labels=[good,bad]', "data.label_column='1.0'")
    """
    parsed = _OVERRIDE.fullmatch(override)
    if parsed is None:
        return override
    key, text = parsed[1], parsed[2].strip()
    pattern = _LIST_ITEM if _LIST.fullmatch(text) else _ITEM
    items = [item.strip(" \t") for item in re.findall(pattern, text)]
    is_mapping = bool(_MAPPING.fullmatch(text))
    if not any(_changes(item) for item in items) and not (is_mapping and any(key[0] in "'\"" for key in items[::2])):
        return override
    values = [_value(item) for item in items]
    if is_mapping:
        return f"{key}={_quoted(json.dumps(dict(zip(values[::2], values[1::2], strict=True))))}"
    if pattern == _LIST_ITEM:
        return f"{key}={_quoted(json.dumps(values))}"
    if len(items) == 1 and re.fullmatch(_ITEM, text) and (text != "null" or key.count(".") > 1):
        return f"{key}={_quoted(values[0])}"
    return override  # Hydra explains what is wrong with it


def _changes(item: str) -> bool:
    """Whether Hydra makes something else of an item, or cannot read it."""
    return item[0] not in "'\"" and (is_retyped(item) or not _HYDRA_TEXT.fullmatch(item))


def _value(item: str) -> str:
    try:
        return str(json.loads(item)) if item.startswith('"') else re.sub(r"\\(.)", r"\1", item.strip("'"))
    except ValueError:
        return item.strip('"')


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "\\u0027" if text[:1] in ("[", "{") else "\\'") + "'"


def _keep_in_tree(node: yaml.Node | None) -> None:
    """Makes plain scalars that are labels or names of columns strings, at the top level and in ``data``."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        if key.value in _NAMES:
            _keep(value)
        if key.value in (*_COLLECTIONS, *_NAMES):
            kind = yaml.SequenceNode if key.value == "labels" else yaml.CollectionNode  # not the section labels
            members = value.value if isinstance(value, kind) else ()
            for member in members:
                for scalar in member if isinstance(member, tuple) else (member,):
                    _keep(scalar)
        elif key.value == "data":
            _keep_in_tree(value)


def _keep(node: yaml.Node) -> None:
    if isinstance(node, yaml.ScalarNode) and not node.style and is_retyped(node.value):
        node.tag = _STRING


def _spelling_loader() -> Any:
    class Loader(*_LIBYAML, _yaml_loader()):  # type: ignore[misc]  # made anew at each call
        def get_single_node(self) -> yaml.Node | None:
            node = super().get_single_node()
            _keep_in_tree(node)
            return node

    return Loader


omegaconf_utils.get_yaml_loader = _spelling_loader
