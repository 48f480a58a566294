"""Which code a bundle may name. Bundles may come from anyone, so that naming a function or class is not enough to run it."""

import os
from importlib.metadata import entry_points

configured: set[str] = set()  # what configurations of this process name


def is_trusted(path: str, group: str, variable: str) -> bool:
    """Whether a configuration, an environment variable or an entry point of an installed package names an import path.

    Nothing is imported.

    Args:
        path: ``package.module.name``.
        group: of entry points, such as ``sodaops.cleaning``.
        variable: its import paths are separated by commas.
    """
    if path in configured or path in filter(None, os.environ.get(variable, "").split(",")):
        return True
    return any(entry.value.replace(":", ".") == path for entry in entry_points(group=group))
