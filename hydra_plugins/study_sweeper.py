"""Registers the sweeper, the resolver of ``data.name`` and the loader that keeps labels as they are spelled.

Hydra imports this module at each start, so it imports little itself. DVC composes conf/ in its own process, where only this
module is of the project.
"""

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

import sodaops.config.naming
import sodaops.config.spelling  # noqa: F401


class StudySweeper(Sweeper):
    """``hydra/sweeper=study``, implemented in sodaops/search/sweeper.py."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keeps what Hydra passes."""
        self._setup = hydra_context, task_function, config

    def sweep(self, arguments: list[str]) -> None:
        """Runs the sweep.

        Args:
            arguments: the overrides of the command line.
        """
        from hydra.core.plugins import Plugins

        from sodaops.search.sweeper import Sweep

        context, function, config = self._setup
        launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=function, config=config)
        Sweep(config, launcher).run(arguments)
