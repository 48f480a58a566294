"""What the API pages make of the roles in docstrings: code, since Markdown has no roles. Named in zensical.toml."""

import re
from typing import Any

import griffe


class Roles(griffe.Extension):
    """Turns ``:func:`~package.name``` into the name alone."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrites the docstring of each object as it is read."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r":[a-z]+:`~?([^`]+)`", r"`\1`", obj.docstring.value)
