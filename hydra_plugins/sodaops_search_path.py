"""Lets any Hydra application compose this configuration: its groups, or the whole as ``sodaops`` in a defaults list."""

import functools
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from sodaops.config.keys import conf_dir


class SodaOpsSearchPath(SearchPathPlugin):
    """Appends conf/ to the search path, after the application's own folders."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Adds the folder.

        Args:
            search_path: of the application.
        """
        search_path.append("sodaops", f"file://{conf_dir()}")
        ConfigStore.instance().store("sodaops", _whole(), provider="sodaops")


@functools.cache
def _whole() -> Any:
    return OmegaConf.load(conf_dir() / "config.yaml")
