"""Checks that W&B's server can be reached, before its client waits for minutes."""

import os
import urllib.error
import urllib.request

from sodaops.errors import ConfigError

_TIMEOUT_S = 5.0


def check_key(setting: str, alternative: str) -> None:
    """Raises a ConfigError unless WANDB_API_KEY is set.

    Args:
        setting: the setting that needs the key.
        alternative: what to do without one.
    """
    if not os.environ.get("WANDB_API_KEY"):
        raise ConfigError(f"{setting}: WANDB_API_KEY is not set. Export your key, or {alternative}.")


def check_reachable(alternative: str = "check the network") -> None:
    """Raises a ConfigError unless W&B's server answers within seconds.

    Args:
        alternative: what to do if it does not.
    """
    address = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    try:
        urllib.request.urlopen(address, timeout=_TIMEOUT_S).close()
    except urllib.error.HTTPError as response:  # an answer, if an unfriendly one
        response.close()
    except (OSError, ValueError) as error:
        raise ConfigError(f"W&B at {address} does not answer ({getattr(error, 'reason', error)}); {alternative}.") from None
