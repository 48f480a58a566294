"""Text cleaning by named policies or a user's function, the same in training, evaluation and serving.

A policy is a pure function from a raw string to a clean one. A bundle stores the name of its policy, or the import path of the
function. Since a bundle may come from anyone, it can only name a function that :func:`is_allowed`.
"""

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name

from sodaops.errors import ConfigError, nearest, reason_of
from sodaops.text.policies import POLICIES, tidy
from sodaops.text.trust import is_trusted

VARIABLE = "SODAOPS_CLEANING"  # import paths that bundles may name, separated by commas
GROUP = "sodaops.cleaning"  # entry points of installed packages that bundles may name


def clean(text: str, policy: str = "minimal") -> str:
    """Cleans one text.

    Args:
        text: any string, lone surrogates included.
        policy: ``minimal`` (HTML entities, white space, control characters), ``social`` (also links to ``http``
            and handles to ``@user``), ``letters`` (lower case; without links, handles, hashtags and non-letters), or the import
            path of a function that gets what ``minimal`` gives.

    Returns:
        The clean text, without surrounding or doubled white space; possibly empty.

    Raises:
        ConfigError: an unknown policy, or a function that cannot be imported, raises, or does not return a string.

    >>> clean("So  &lt;3 this\\t@ann http://t.co/x #win!")
    'So <3 this @ann http://t.co/x #win!'
    >>> clean("So  &lt;3 this\\t@ann http://t.co/x #win!", "social")
    'So <3 this @user http #win!'
    >>> clean("So  &lt;3 this\\t@ann http://t.co/x #win!", "letters")
    'so this'
    """
    return cleaner(policy)(text)


def cleaner(policy: str) -> Callable[[str], str]:
    """The function of a policy, see :func:`clean`."""
    if policy in POLICIES:
        return POLICIES[policy]
    function = _load(policy)

    def run(text: str) -> str:
        text = POLICIES["minimal"](text)
        try:
            return tidy(function(text)) if text else ""
        except Exception as error:  # a user's function may raise anything
            raise ConfigError(
                f"data.cleaning={policy}: failed on a text ({type(error).__name__}: {reason_of(error)}); expected a function "
                "from any str to a str."
            ) from error

    return run


def _load(path: str) -> Callable[[str], str]:
    try:
        return resolve_name(path)
    except Exception as error:  # a user's module may raise anything while it is imported
        raise ConfigError(
            f"data.cleaning={path!r}: cannot be imported ({reason_of(error)}); expected one of {', '.join(POLICIES)}"
            f"{nearest(path, POLICIES)}, or the import path of a function in an installed package or on PYTHONPATH."
        ) from error


def is_allowed(policy: str) -> bool:
    """Whether a bundle may name a policy: a built-in one, or a function that the configuration, the environment variable
    ``SODAOPS_CLEANING`` or an entry point of an installed package names. Nothing is imported."""
    return policy in POLICIES or is_trusted(policy, GROUP, VARIABLE)


def code_of(policy: str) -> dict[str, str]:
    """A user's function -> SHA-256 of the file with its code; empty for a built-in policy.

    Raises:
        ConfigError: the function cannot be imported.
    """
    if policy in POLICIES:
        return {}
    file = getattr(sys.modules.get(getattr(_load(policy), "__module__", "")), "__file__", None)
    return {policy: hashlib.sha256(Path(file).read_bytes() if file else b"").hexdigest()}
