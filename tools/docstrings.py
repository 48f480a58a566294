"""What the API pages make of docstrings where Markdown has other signs: roles and examples. Named in zensical.toml."""

import re
from typing import Any

import griffe


class AsMarkdown(griffe.Extension):
    """Turns ``:func:`~package.name``` into the name alone, and examples, which would be quotations, into code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrites the docstring of each object as it is read."""
        if obj.docstring is not None:
            names = re.sub(r":[a-z]+:`~?([^`]+)`", r"`\1`", obj.docstring.value)
            obj.docstring.value = re.sub(r"(?ms)^>>> .*?(?=\n\n|\Z)", lambda found: f"```pycon\n{found[0]}\n```", names)
