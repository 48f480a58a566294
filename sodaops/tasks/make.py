"""Makes a task from its section of the configuration or of a bundle."""

from collections.abc import Mapping
from typing import Any

from sodaops.config.extensions import construct
from sodaops.tasks.base import Task
from sodaops.tasks.single_label import SingleLabel
from sodaops.text.trust import is_trusted

VARIABLE = "SODAOPS_TASKS"  # import paths that bundles may name, separated by commas
GROUP = "sodaops.tasks"  # entry points of installed packages that bundles may name
SINGLE_LABEL = SingleLabel()


def make_task(section: Mapping[str, Any]) -> Task:
    """The task of a section; of an empty one it is :data:`SINGLE_LABEL`, as in older bundles.

    Raises:
        ConfigError: it cannot be imported, is no task, or takes other arguments.
    """
    if not section:
        return SINGLE_LABEL
    return construct("task", section, Task)


def is_allowed(target: str) -> bool:
    """Whether a bundle may name a class as its task: a built-in one, or one that a configuration of this process, the
    environment variable ``SODAOPS_TASKS`` or an entry point of an installed package names. Nothing is imported."""
    return target.startswith("sodaops.tasks.") or is_trusted(target, GROUP, VARIABLE)
