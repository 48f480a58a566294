"""Converts roles and examples in docstrings to Markdown for the API pages; zensical.toml loads it."""

import re
from typing import Any

import griffe


class AsMarkdown(griffe.Extension):
    """Turns ``:func:`~package.name``` into the name, and examples, which Markdown reads as quotations, into code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrites the docstring of each object as it is read."""
        if obj.docstring is not None:
            names = re.sub(r":[a-z]+:`~?([^`]+)`", r"`\1`", obj.docstring.value)
            obj.docstring.value = re.sub(r"(?ms)^>>> .*?(?=\n\n|\Z)", lambda match: f"```pycon\n{match[0]}\n```", names)
