"""The callback of a trial's training: reports each validation to the study, and stops the training if it is pruned."""

import logging

import lightning as L
from lightning.pytorch.callbacks import Callback

from sodaops.errors import PrunedError
from sodaops.search.context import TrialContext

log = logging.getLogger(__name__)
_WAIT_S = 300.0  # for a database that is away when a trial starts


def trial_callbacks(trial: TrialContext | None, monitor: str) -> list[Callback]:
    """The callbacks that a run of a trial needs; none for a single run, and for the seeds after the first."""
    return [] if trial is None or trial.pruner is None else [Pruning(trial, monitor)]


class Pruning(Callback):
    """Reports the monitored metric after each validation, and ends the training if the pruner says so.

    Args:
        trial: the run's.
        monitor: name of the metric.
    """

    def __init__(self, trial: TrialContext, monitor: str) -> None:
        import optuna

        from sodaops.search import database
        from sodaops.search.study import make_pruner, silence_optuna_loggers

        silence_optuna_loggers()
        self._trial, self._monitor = trial, monitor
        pruner, storage = make_pruner(trial.pruner, trial.pruner_options), database.open_storage(trial.storage, wait_s=_WAIT_S)
        with database.storage_errors(trial.storage):
            self._study = optuna.load_study(study_name=trial.study, storage=storage, pruner=pruner)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Reports the value, and asks the pruner.

        Raises:
            PrunedError: the trial is worse than others were at this epoch.
        """
        from optuna.exceptions import UpdateFinishedTrialError

        from sodaops.search import database

        value = trainer.callback_metrics.get(self._monitor)
        if trainer.sanity_checking or value is None:
            return
        step = trainer.current_epoch + 1
        try:
            pruned = self._report(step, float(value), last=step == trainer.max_epochs)
        except UpdateFinishedTrialError:
            raise PrunedError(
                f"trial {self._trial.number} was marked as lost by another process, which runs it again"
            ) from None
        except database.DATABASE_ERRORS as error:  # the training is worth more than its pruning
            reason = database.driver_message(error)
            log.warning("trial %d: epoch %d was not reported to the study: %s", self._trial.number, step, reason)
            return
        if pruned:
            raise PrunedError(f"trial {self._trial.number} pruned after epoch {step}: {self._monitor} {float(value):.4f}")

    def _report(self, step: int, value: float, last: bool) -> bool:
        """Whether the pruner ends the training. After the last epoch it is not asked: there is nothing left to save."""
        storage = self._study._storage
        storage.set_trial_intermediate_value(self._trial.trial_id, step, value)
        return not last and self._study.pruner.prune(self._study, storage.get_trial(self._trial.trial_id))
