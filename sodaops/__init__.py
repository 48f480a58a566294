"""SoDaOps trains, serves and monitors models that predict labels or numbers from texts.

The names below are the Python API. They are loaded when they are first used, and only training imports torch.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sodaops import drift

if TYPE_CHECKING:
    from sodaops.api import Model, Registry, Run, evaluate, load, train

__all__ = ["Model", "Registry", "Run", "drift", "evaluate", "load", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("sodaops.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _CallablePackage(ModuleType):
    """The package ``sodaops.drift``, which is also the function :func:`sodaops.api.drift`."""

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return importlib.import_module("sodaops.api").drift(*arguments, **keywords)


drift.__class__ = _CallablePackage
