"""What Hydra sees of our sweeper. It imports every module of this namespace at each start, so this one stays light."""

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class StudySweeper(Sweeper):
    """``hydra/sweeper=study``: see sodaops/search/sweeper.py."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """As Hydra asks."""
        self._setup = hydra_context, task_function, config

    def sweep(self, arguments: list[str]) -> None:
        """Runs the sweep; ``arguments`` are the command line's overrides."""
        from hydra.core.plugins import Plugins

        from sodaops.search.sweeper import Sweep

        context, function, config = self._setup
        launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=function, config=config)
        Sweep(config, launcher).run(arguments)
