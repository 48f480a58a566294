"""Classes and functions of users' own: a section of the configuration names one by ``_target_``, beside its arguments."""

import functools
import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from sodaops.errors import ConfigError, nearest, reason_of

IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def _has_target(section: dict[str, Any]) -> dict[str, Any]:
    if not IMPORT_PATH.fullmatch(str(section.get("_target_"))):
        raise PydanticCustomError("target", "expected a class or function in _target_, such as _target_=PACKAGE.MODULE.NAME")
    return section


Extension = Annotated[dict[str, Any], AfterValidator(_has_target)]  # {"_target_": "package.module.Name", argument: value}


def load(key: str, path: str) -> Any:
    """The class or function at an import path.

    Args:
        key: the configuration key that names it, for messages.
        path: ``package.module.name``.

    Raises:
        ConfigError: it cannot be imported.

    >>> load("loss._target_", "collections.abc.Mapping")
    <class 'collections.abc.Mapping'>
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # a user's module may raise anything while it is imported
        hint = nearest(name, vars(sys.modules[module])) if module in sys.modules else ""
        raise ConfigError(
            f"{key}={path}: cannot be imported ({type(error).__name__}: {reason_of(error)}){hint}. Check the path; install its "
            "package, or add its folder to PYTHONPATH."
        ) from error


def build(key: str, section: Mapping[str, Any], *arguments: Any, kind: type | None = None, **more: Any) -> Any:
    """Calls the class or function of a section with the section's arguments. Nested sections with ``_target_`` are built first.

    With ``_partial_: true`` nothing is called: the result is a function that has these arguments already.

    Args:
        key: of the section, for messages.
        section: with ``_target_``.
        arguments: positional ones, before the section's.
        kind: the class that the result must have; None: any.
        more: named arguments, which the section cannot replace.

    Raises:
        ConfigError: it cannot be imported, takes other arguments, raises an error, or gives something else.

    >>> build("head", {"_target_": "fractions.Fraction", "denominator": 2}, 3)
    Fraction(3, 2)
    >>> build("head", {"_target_": "fractions.Fraction", "denominater": 2}, 3)
    Traceback (most recent call last):
    sodaops.errors.ConfigError: head.denominater is not an argument of fractions.Fraction (did you mean denominator?).
    """
    from hydra.utils import instantiate  # the services, which build nothing, have no Hydra

    target, own = section["_target_"], {name: value for name, value in section.items() if not re.fullmatch("_[a-z]+_", name)}
    _check_arguments(key, target, load(f"{key}._target_", target), own, more)
    try:
        make = functools.partial(instantiate({**section, "_partial_": True, "_convert_": "all"}), *arguments, **more)
        result = make if section.get("_partial_") else make()
    except Exception as error:  # a user's class may raise anything
        raise ConfigError(f"{key}: {target} raised {type(error).__name__}: {reason_of(error)}") from error
    if kind is not None and not isinstance(result, kind):
        raise ConfigError(
            f"{key}._target_={target}: expected a {kind.__module__}.{kind.__qualname__}, got {type(result).__name__}."
        )
    return result


def construct(key: str, section: Mapping[str, Any], base: type = object) -> Any:
    """Calls the class of a section with the section's arguments, as :func:`build`, but without Hydra, which services lack.

    Raises:
        ConfigError: it cannot be imported, is not derived from ``base``, takes other arguments, or raises an error.
    """
    own = {name: value for name, value in section.items() if name != "_target_"}
    target = section["_target_"]
    function = load(f"{key}._target_", target)
    if not (isinstance(function, type) and issubclass(function, base)):  # before it is called: the section may be anyone's
        raise ConfigError(f"{key}._target_={target}: expected a class derived from {base.__module__}.{base.__qualname__}.")
    _check_arguments(key, target, function, own, {})
    if own and not _parameters(function):
        raise ConfigError(f"{key}.{next(iter(own))} is not an argument of {target}, which has none.")
    try:
        return function(**own)
    except ConfigError:
        raise
    except Exception as error:  # a user's class may raise anything
        raise ConfigError(f"{key}: {target} raised {type(error).__name__}: {reason_of(error)}") from error


def build_subclass(key: str, section: Mapping[str, Any], base: str, **more: Any) -> Any:
    """Builds a section that may come from anyone's bundle: it, and the sections in it, name subclasses of ``base`` only.

    Args:
        key: of the section, for messages.
        section: with ``_target_``.
        base: the import path of a class.
        more: named arguments, which the section cannot replace.

    Raises:
        ConfigError: as :func:`build`, or another class or function, which is not called.
    """
    if "${" in json.dumps(section):  # Hydra would resolve it, to another section for example
        raise ConfigError(f"{key}: it contains ${{; write the value itself.")
    kind = load(key, base)
    for place, target in _targets(key, section):
        found = load(f"{place}._target_", target)
        if not (isinstance(found, type) and issubclass(found, kind)):
            raise ConfigError(f"{place}._target_={target}: expected a subclass of {base}.")
    return build(key, section, kind=kind, **more)


def _targets(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """The key and the import path of every section with ``_target_``, nested ones included."""
    if isinstance(value, Mapping):
        if "_target_" in value:
            yield key, str(value["_target_"])
        value = value.items()
    elif isinstance(value, list):
        value = enumerate(value)
    else:
        return
    for name, inner in value:
        yield from _targets(f"{key}.{name}", inner)


def accepts(function: Callable[..., Any], name: str) -> bool:
    """Whether a class or function has an argument of this name.

    >>> accepts(round, "ndigits"), accepts(round, "digits")
    (True, False)
    """
    return name in _parameters(function)


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # some classes written in C have none
        return {}


def _check_arguments(key: str, target: str, function: Any, own: Mapping[str, Any], more: Mapping[str, Any]) -> None:
    if not callable(function):
        raise ConfigError(f"{key}._target_={target}: expected a class or function, got {type(function).__name__}.")
    for name in own.keys() & more.keys():
        raise ConfigError(f"{key}.{name}: training sets this argument of {target}; remove the key.")
    parameters = _parameters(function)
    if not parameters or any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        return
    for name in own:
        if name not in parameters:
            raise ConfigError(f"{key}.{name} is not an argument of {target}{nearest(name, parameters)}.")
