"""Text cleaning by named policies, the same in training, evaluation and serving.

A policy is a pure function from a raw string to a clean one. A bundle stores the name of its policy.
"""

from sodaops.errors import ConfigError, nearest
from sodaops.text.policies import POLICIES


def clean(text: str, policy: str = "minimal") -> str:
    """Cleans one text by a named policy.

    Args:
        text: any string, lone surrogates included.
        policy: ``minimal`` (HTML entities, white space, control characters), ``social`` (also links to ``http``
            and handles to ``@user``), or ``letters`` (lower case; without links, handles, hashtags and non-letters).

    Returns:
        The clean text, without surrounding or doubled white space; possibly empty.

    Raises:
        ConfigError: an unknown policy.

    >>> clean("So  &lt;3 this\\t@ann http://t.co/x #win!")
    'So <3 this @ann http://t.co/x #win!'
    >>> clean("So  &lt;3 this\\t@ann http://t.co/x #win!", "social")
    'So <3 this @user http #win!'
    >>> clean("So  &lt;3 this\\t@ann http://t.co/x #win!", "letters")
    'so this'
    """
    if policy not in POLICIES:
        raise ConfigError(f"data.cleaning={policy!r}; expected one of {', '.join(POLICIES)}{nearest(policy, POLICIES)}.")
    return POLICIES[policy](text)
