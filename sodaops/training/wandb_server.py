"""Whether W&B's server can be reached, asked before its client waits for minutes."""

import os
import urllib.error
import urllib.request

from sodaops.errors import ConfigError

_REACH_S = 5.0


def check_key(what: str, mend: str) -> None:
    """Refuses to go online without a key.

    Raises:
        ConfigError: WANDB_API_KEY is not set.
    """
    if not os.environ.get("WANDB_API_KEY"):
        raise ConfigError(f"{what}: WANDB_API_KEY is not set. Export your key, or {mend}.")


def check_reachable(mend: str = "check the network") -> None:
    """Asks the server for anything.

    Raises:
        ConfigError: it does not answer within seconds.
    """
    address = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    try:
        urllib.request.urlopen(address, timeout=_REACH_S).close()
    except urllib.error.HTTPError as answered:
        answered.close()
    except (OSError, ValueError) as error:
        raise ConfigError(f"W&B at {address} does not answer ({getattr(error, 'reason', error)}); {mend}.") from None
