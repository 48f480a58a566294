"""Registers the sweeper with Hydra, which imports this module at each start; so it imports little itself."""

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


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
