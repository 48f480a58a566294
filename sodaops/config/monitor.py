"""The metrics on validation: built-in names, and whether higher is better."""

from collections.abc import Mapping
from typing import Any, Literal

from sodaops.config.extensions import load
from sodaops.config.schema import Config
from sodaops.errors import ConfigError


def monitor_mode(config: Config) -> Literal["min", "max"]:
    """Whether the lowest or the highest ``checkpoint.monitor`` is the best.

    Raises:
        ConfigError: the monitored metric does not say so, or cannot be imported.
    """
    targets = {name: section["_target_"] for name, section in config.metrics.items()}
    return config.checkpoint.mode or mode_of(config.checkpoint.monitor, targets)


def mode_of(metric: str, targets: Mapping[str, Any]) -> Literal["min", "max"]:
    """Whether the lowest or the highest value of a metric is the best: the lowest of losses and errors.

    Args:
        metric: such as ``val/loss``.
        targets: name in the section ``metrics`` -> its ``_target_``.

    Raises:
        ConfigError: that class does not say so, or cannot be imported.

    >>> mode_of("val/macro_f1", {}), mode_of("val/loss", {})
    ('max', 'min')
    """
    name = metric.rpartition("/")[2]
    if name not in targets:
        return "min" if name.endswith(("loss", "ece", "mae", "rmse")) else "max"
    higher = getattr(load(f"metrics.{name}._target_", targets[name]), "higher_is_better", None)
    if not isinstance(higher, bool):
        raise ConfigError(
            f"checkpoint.mode is missing: {targets[name]} (metrics.{name}) does not say whether a higher value is better; set "
            "checkpoint.mode=max or min, or give `sodaops select` its --direction."
        )
    return "max" if higher else "min"
