"""The part of a sweep that runs inside a training: it reports each validation, and stops a trial that does badly."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from sodaops.errors import PrunedError

_WAIT_S = 300.0  # for a database that is away when a trial begins
VARIABLE = "SODAOPS_TRIAL"  # an environment variable of the job, so that its configuration stays what a lone run's is


@dataclass(frozen=True)
class Trial:
    """Which trial a run belongs to."""

    storage: str
    study: str
    trial_id: int  # the database's
    number: int  # the study's
    n_seeds: int  # how many runs the trial is to have
    pruner: str | None  # None: nothing is reported, as of the seeds after the first
    pruner_options: dict[str, Any] | None

    def variable(self) -> str:
        """The environment variable's value."""
        return json.dumps(asdict(self))

    def as_dict(self) -> dict[str, Any]:
        """What the run's record keeps of it."""
        return {"study": self.study, "number": self.number, "n_seeds": self.n_seeds}

    def callbacks(self, monitor: str) -> list[Callback]:
        """What watches the run."""
        return [] if self.pruner is None else [Pruning(self, monitor)]


def trial_of(environment: Mapping[str, str]) -> Trial | None:
    """The trial that this process runs, or None."""
    return Trial(**json.loads(environment[VARIABLE])) if VARIABLE in environment else None


class Pruning(Callback):
    """Reports the monitored metric after each validation, and ends the training where the pruner says so.

    Args:
        trial: the run's.
        monitor: the metric.
    """

    def __init__(self, trial: Trial, monitor: str) -> None:
        import optuna

        from sodaops.search import database
        from sodaops.search.study import make_pruner, quieten

        quieten()
        self._trial, self._monitor = trial, monitor
        self._finished, self._broken, self._said = optuna.exceptions.UpdateFinishedTrialError, database.BROKEN, database.said
        pruner, kept = make_pruner(trial.pruner, trial.pruner_options), database.open_storage(trial.storage, wait_s=_WAIT_S)
        with database.answering(trial.storage):
            self._study = optuna.load_study(study_name=trial.study, storage=kept, pruner=pruner)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Tells the study, and asks it.

        Raises:
            PrunedError: the trial is worse than others were at this epoch.
        """
        value = trainer.callback_metrics.get(self._monitor)
        if trainer.sanity_checking or value is None:
            return
        step = trainer.current_epoch + 1
        try:
            pruned = self._report(step, float(value), last=step == trainer.max_epochs)
        except self._finished:
            raise PrunedError(
                f"trial {self._trial.number} was taken for lost by another process, which runs it again"
            ) from None
        except self._broken as error:  # the training is worth more than its pruning
            print(f"trial {self._trial.number}: the study was not told of epoch {step}, training goes on: {self._said(error)}")
            return
        if pruned:
            raise PrunedError(f"trial {self._trial.number} pruned after epoch {step}: {self._monitor} {float(value):.4f}")

    def _report(self, step: int, value: float, last: bool) -> bool:
        """Whether the pruner ends the training; after the last epoch nothing is left to be saved."""
        store = self._study._storage
        store.set_trial_intermediate_value(self._trial.trial_id, step, value)
        return not last and self._study.pruner.prune(self._study, store.get_trial(self._trial.trial_id))
