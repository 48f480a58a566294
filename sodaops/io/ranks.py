"""Which of several training processes this one is, by the environment variables that torch's elastic agent sets."""

from collections.abc import Mapping


def is_distributed(environment: Mapping[str, str]) -> bool:
    """Whether an agent (``sodaops train`` or torchrun) started this process as one of several.

    A scheduler may set RANK where it starts no process of a training, so RANK alone does not count.
    """
    return "TORCHELASTIC_RUN_ID" in environment


def is_rank_zero(environment: Mapping[str, str]) -> bool:
    """Whether this process is the one that writes files and logs: rank 0, or the only process."""
    return not is_distributed(environment) or environment.get("RANK") == "0"


def world_size(environment: Mapping[str, str]) -> int:
    """The number of processes that train together."""
    return int(environment["WORLD_SIZE"]) if is_distributed(environment) else 1
