"""Runs trials of a study: asks Optuna for parameters, starts jobs through Hydra's launcher, and reports their results."""

import contextlib
import functools
import logging
import math
import shutil
import socket
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import optuna
from hydra.core.utils import JobReturn, JobStatus
from optuna.trial import TrialState

from sodaops.config.schema import Config
from sodaops.errors import ConfigError, PrunedError, some
from sodaops.io.runs import RECORD, read_run
from sodaops.search import database, study as studies
from sodaops.search.context import TRIAL_VARIABLE, TrialContext
from sodaops.search.space import Dimension, to_override

log = logging.getLogger(__name__)
Launch = Callable[[Sequence[Sequence[str]], int], Sequence[JobReturn]]  # override lists, number of the first job


class TrialRunner:
    """Runs trials of one study; their runs are written to a folder of this process.

    Args:
        config: the configuration that the trials vary.
        study: shared with other processes.
        space: the searched keys.
        fixed: overrides that every trial gets.
        folder: the sweep's folder.
        url: the address of the study's database.
        reconnector: waits for the database while it is unreachable.
        launch: Hydra's launcher.

    Attributes:
        last_error: the error of the trial that failed last.
    """

    def __init__(
        self, config: Config, study: optuna.Study, space: Mapping[str, Dimension], fixed: Sequence[str], folder: Path, url: str,
        reconnector: database.Reconnector, launch: Launch,
    ) -> None:  # fmt: skip
        self._config, self._search, self._study, self._space, self._fixed = config, config.search, study, space, fixed
        self._folder, self._url, self._reconnector, self._launch = folder, url, reconnector, launch
        self.last_error: Exception | None = None

    def count(self) -> tuple[int, int]:
        """How many trials have ended, and how many are running."""
        n = studies.count_trials(self._study)
        return n["COMPLETE"] + n["PRUNED"] + n["FAIL"], n["RUNNING"]

    def run(self, n_trials: int) -> None:
        """Runs up to ``n_trials`` trials at once, and reports their results to the study."""
        trials: list[optuna.Trial] = []
        with self._requeue_if_stopped(trials), studies.heartbeats(self._study) as heartbeats:
            for _ in range(n_trials):
                trial = database.retry_once(self._ask)
                if trial is not None:
                    trials.append(trial)
                    database.retry_once(functools.partial(heartbeats.add, trial._trial_id))
            if not trials:
                return
            # Run every trial with the first seed, then those that ended with a score with the other seeds.
            seed = self._config.seed
            first = self._launch_jobs([(trial, seed) for trial in trials])
            scored = [trial for trial, result in zip(trials, first, strict=True) if _score(result) is not None]
            jobs = [(trial, seed + i) for trial in scored for i in range(1, self._search.n_seeds)]
            others = self._launch_jobs(jobs) if jobs else []
            for trial, result in zip(trials, first, strict=True):
                more = [other for (owner, _), other in zip(jobs, others, strict=True) if owner is trial]
                self._report(trial, [result, *more])

    def _ask(self) -> optuna.Trial | None:
        """The next trial; None if all trials have been started, perhaps by other processes."""
        with database.database_lock(database.engine_of(self._study)):
            if sum(self.count()) >= self._search.n_trials:
                return None
            # Depends on the number of trials, so that a resumed sweep does not draw the same values again.
            seed = self._config.seed + len(self._study.get_trials(deepcopy=False))
            self._study.sampler = studies.make_sampler(self._search.sampler, self._search.sampler_options, seed)
            try:
                return self._study.ask({key: dimension.distribution() for key, dimension in self._space.items()})
            except (ValueError, TypeError, NotImplementedError) as error:  # the sampler does not support this space
                raise ConfigError(f"search.sampler={self._search.sampler}: {error}") from error

    def _launch_jobs(self, jobs: Sequence[tuple[optuna.Trial, int]]) -> Sequence[JobReturn]:
        """Runs jobs (trial, seed) through Hydra's launcher."""
        overrides = []
        for trial, seed in jobs:
            chosen = [self._space[key].override(value) for key, value in trial.params.items()]
            log.info("trial %d, seed %d: %s", trial.number, seed, " ".join(chosen))
            context = TrialContext(
                self._url, self._search.study, trial._trial_id, trial.number, self._search.n_seeds,
                self._search.pruner if seed == self._config.seed else None, self._search.pruner_options,
            )  # fmt: skip
            wandb = self._config.logger.wandb
            group = [f"logger.wandb.group={self._search.study}"] if wandb is not None and wandb.group is None else []
            overrides.append([
                *self._fixed, *chosen, *group,
                f"seed={seed}", f"hydra.sweep.subdir={self.run_name(trial.number, seed)}",
                f"+hydra.job.env_set.{TRIAL_VARIABLE}={to_override(context.to_json())}",
            ])  # fmt: skip
        return self._launch(overrides, jobs[0][0].number)

    def run_name(self, number: int, seed: int | None = None) -> str:
        """The name of a run's folder in the sweep's folder; ``seed=None`` means the first seed."""
        return f"{number:04d}" if seed in (None, self._config.seed) else f"{number:04d}-seed{seed}"

    def _report(self, trial: optuna.Trial, results: Sequence[JobReturn]) -> None:
        """Reports a trial's results, unless another process has marked the trial as lost."""
        try:
            database.retry_once(functools.partial(self._tell, trial, results))
        except (optuna.exceptions.UpdateFinishedTrialError, ValueError) as error:
            # The trial has ended: it was marked as lost, or an earlier attempt reported it before its connection broke.
            lost = studies.was_marked_lost(self._study, trial)
            if isinstance(error, ValueError) and not lost:
                raise
            if lost:
                log.warning("trial %d was marked as lost by another process, which runs it again; not counted", trial.number)

    def _tell(self, trial: optuna.Trial, results: Sequence[JobReturn]) -> None:
        """Writes a trial's attributes, and its state or mean score."""
        folders = [self._folder / self.run_name(trial.number, self._config.seed + i) for i in range(len(results))]
        seconds = [read_run(folder).seconds for folder in folders if (folder / RECORD).is_file()]
        trial.set_user_attr("folders", [str(folder) for folder in folders])
        trial.set_user_attr("where", f"{socket.gethostname()}:{self._folder.resolve()}")
        trial.set_user_attr("seconds", sum(value or 0 for value in seconds))
        if not self._search.keep_checkpoints:
            for folder in folders:
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        errors = [_error(result) for result in results if _score(result) is None]
        if isinstance(results[0]._return_value, PrunedError):
            self._study.tell(trial, state=TrialState.PRUNED)
        elif errors:
            trial.set_user_attr("error", str(errors[0]) or type(errors[0]).__name__)
            self._study.tell(trial, state=TrialState.FAIL)
            log.warning("trial %d failed: %s: %s", trial.number, type(errors[0]).__name__, errors[0])
            self.last_error = errors[0]
        else:
            scores = [_score(result) for result in results]
            trial.set_user_attr("scores", scores)
            trial.set_user_attr("spread", statistics.stdev(scores) if len(scores) > 1 else None)
            self._study.tell(trial, statistics.fmean(scores))

    @contextlib.contextmanager
    def _requeue_if_stopped(self, trials: list[optuna.Trial]) -> Iterator[None]:
        """Requeues the trials that have not ended if an exception, such as Ctrl-C, ends the block."""
        try:
            yield
        except BaseException as error:
            self._reconnector.stop_waiting()
            try:
                self._mark_stopped(trials)
            except database.DATABASE_ERRORS:
                log.warning(
                    "trials %s could not be marked as stopped; they will run again, and their runs stay in %s",
                    some([trial.number for trial in trials]), self._folder,
                )  # fmt: skip
            if isinstance(error, KeyboardInterrupt):
                raise type(error)(f"the same command resumes search.study={self._search.study}") from None
            raise

    def _mark_stopped(self, trials: Sequence[optuna.Trial]) -> None:
        for trial in trials:
            if not self._study._storage.get_trial(trial._trial_id).state.is_finished():
                with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError, ValueError):  # it has ended since
                    trial.set_user_attr("stopped", True)
                    self._study.tell(trial, state=TrialState.FAIL)
        with database.database_lock(database.engine_of(self._study)):
            studies.requeue_lost_trials(self._study)


def _score(result: JobReturn) -> float | None:
    """A job's score; None if it failed, kept no checkpoint, or its score is not a number."""
    value = result._return_value
    usable = result.status == JobStatus.COMPLETED and isinstance(value, int | float) and not math.isnan(value)
    return float(value) if usable else None


def _error(result: JobReturn) -> Exception:
    value = result._return_value
    return value if isinstance(value, Exception) else ConfigError(f"the run's score is {value}, which is not a number.")
