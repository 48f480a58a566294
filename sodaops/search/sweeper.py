"""The sweep behind ``-m search=…``, on Optuna's ask and tell: it resumes and prunes; Hydra's launchers run the jobs."""

import contextlib
import functools
import logging
import os
import shutil
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf
from optuna.trial import TrialState
from tqdm import tqdm

from sodaops.config.schema import Config
from sodaops.config.validation import build
from sodaops.errors import ConfigError, PrunedError, SodaOpsError, some
from sodaops.io import storage
from sodaops.io.runs import RECORD, flatten, read_run
from sodaops.search import database, report, study as studies
from sodaops.search.pruning import VARIABLE, Trial
from sodaops.search.space import Dimension, check_keys, read_space, spelled, swept_dimension

_ALL_FAIL = 3  # so many failures before the first success end the sweep: they have a cause in common
_POLL_S = 2.0
_PATIENCE = 5  # grace periods that a database may be away for: an update or a failover is over by then
_NOT_SWEPT = ("seed", "ckpt_path", "checkpoint.monitor")
_ASIDE = ("evaluate", "export", "logger", "registry", "run_dir", "search", "serve")  # shape no training


class Sweep:
    """Runs ``search.n_trials`` trials of ``search.space``, together with whoever else works on the study.

    Each trial is a job, or ``search.n_seeds`` jobs: the first seed's may be pruned, and only then do the others run.

    Args:
        config: the composed tree, Hydra's part included.
        launcher: runs jobs.
    """

    def __init__(self, config: DictConfig, launcher: Launcher) -> None:
        self._hydra, self._launcher = config.hydra, launcher
        self._tree = OmegaConf.to_container(
            OmegaConf.masked_copy(config, [key for key in config if key != "hydra"]), resolve=True
        )
        self._groups = dict(config.hydra.runtime.choices)
        self._said_wait = False
        self._last_error: Exception | None = None

    def run(self, arguments: list[str]) -> None:
        """Runs trials until the study has as many as asked for.

        Args:
            arguments: the command line's overrides, sweeps among them.

        Raises:
            ConfigError: a space or a study that does not fit.
            SodaOpsError: the first trials all failed; theirs.
        """
        studies.quieten()
        for launcher in ("hydra._internal.core_plugins.basic_launcher", "hydra_plugins"):
            logging.getLogger(launcher).setLevel(logging.WARNING)  # each job is told here, in fewer words
        config = build(self._tree)
        if config.search is None:
            raise ConfigError(
                "hydra/sweeper=study needs a search space; give it as -m search=default, which chooses the sweeper."
            )
        fixed, swept = self._parse(arguments)
        dimensions = self._dimensions(config, swept)
        self._config, self._search, self._space = config, config.search, {d.key: d for d in dimensions}
        self._fixed = fixed
        self._folder = Path(str(self._hydra.sweep.dir))
        with storage.writing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        self._url = self._search.storage or studies.default_url(self._folder)
        studies.check_folder(self._folder, self._url, self._search.study)
        metric, direction = config.checkpoint.monitor, "minimize" if config.checkpoint.mode == "min" else "maximize"
        asked = self._question()
        studies.make_pruner(self._search.pruner, self._search.pruner_options)  # a fault is told before the first trial
        studies.make_sampler(self._search.sampler, self._search.sampler_options, 0)
        with database.answering(self._url):
            self._study = studies.open_study(self._url, self._search.study, self._search.grace_s, direction, asked)
            studies.remember(self._folder, self._url, self._search.study, metric, direction)
            engine, grace_s = database.engine_of(self._study), self._search.grace_s
            self._patience = database.Patience(engine, self._url, _PATIENCE * grace_s)
            self._watch = studies.Watch(self._study, grace_s, self._patience)
            with self._alone():
                self._begin_with_the_default()
            self._until_done()
            self._conclude()

    def _alone(self) -> contextlib.AbstractContextManager[None]:
        return database.alone(database.engine_of(self._study))

    def _parse(self, arguments: list[str]) -> tuple[list[str], list[Override]]:
        parsed = OverridesParser.create().parse_overrides(arguments)
        fixed = [text for text, override in zip(arguments, parsed, strict=True) if not override.is_sweep_override()]
        return fixed, [override for override in parsed if override.is_sweep_override()]

    def _dimensions(self, config: Config, swept: Sequence[Override]) -> list[Dimension]:
        """The space of conf/search, with what the command line sweeps in the place of its entries."""
        found = {d.key: d for d in (read_space(config.search.space) if config.search.space or not swept else [])}
        found |= {override.get_key_element(): swept_dimension(override) for override in swept}
        known = [*(key for key, _ in flatten(self._tree)), *self._groups]
        check_keys(found.values(), [key for key in known if not key.startswith("search.")])
        apart = [key for key in found if key in _NOT_SWEPT or key.partition(".")[0] in _ASIDE]
        if apart:
            raise ConfigError(f"a search over {some(apart)}: trials would not compare. For seeds there is search.n_seeds.")
        return list(found.values())

    def _question(self) -> dict[str, Any]:
        """What makes trials comparable: the space, and every other key that shapes a training."""
        dimensions = {
            f"search.space.{d.key}": [d.type, d.low, d.high, d.log, d.step, list(d.values)] for d in self._space.values()
        }
        shaping = {key: value for key, value in self._tree.items() if key not in _ASIDE}
        fixed = {key: value for key, value in flatten(shaping) if key not in self._space}
        ours = {"search.n_seeds": self._search.n_seeds, "search.grace_s": self._search.grace_s}
        return {**dimensions, **fixed, **ours}

    def _begin_with_the_default(self) -> None:
        """The configuration as it stands is the first trial of a new study, where the space holds it."""
        if self._study.get_trials(deepcopy=False):
            return
        standing = {**self._groups, **dict(flatten(self._tree))}
        params, outside = {}, []
        for key, dimension in self._space.items():
            value = standing.get(key)
            if dimension.type == "choice":
                inside = value in dimension.values
            else:
                inside = isinstance(value, int | float) and dimension.low <= value <= dimension.high
            outside += [] if inside else [f"{key}={spelled(value)}"]
            params[key] = dimension.stored(value)
        if outside:
            print(f"the configuration as it stands is not in the space ({some(outside)}), and is not tried")
        else:
            self._study.enqueue_trial(params, skip_if_exists=True)

    def _until_done(self) -> None:
        """Asks for trials while there is room, and waits for those of others, which may be lost."""
        with tqdm(total=self._search.n_trials, desc=self._search.study, unit="trial", disable=None) as bar:
            while True:
                database.again(self._watch.look)
                n_done, n_running = database.again(self._count)
                bar.update(n_done - bar.n)
                room = self._search.n_trials - n_done - n_running
                if room > 0:
                    self._run(min(room, self._n_jobs()))
                    database.again(self._report)
                    self._give_up_if_all_fail()
                elif n_running and n_done < self._search.n_trials:
                    self._wait(n_running)
                else:
                    return

    def _count(self) -> tuple[int, int]:
        """Trials that have ended, and that run."""
        n = studies.counted(self._study)
        return n["COMPLETE"] + n["PRUNED"] + n["FAIL"], n["RUNNING"]

    def _wait(self, n_running: int) -> None:
        if not self._said_wait:
            print(f"waiting for {n_running} trials of other processes; those that are lost are run again", flush=True)
            self._said_wait = True
        time.sleep(_POLL_S)

    def _n_jobs(self) -> int:
        """Trials at once: as asked, or what joblib does at once."""
        n = self._search.n_jobs or self._hydra.launcher.get("n_jobs") or 1
        return int(n) if n > 0 else os.cpu_count()

    def _ask(self) -> optuna.Trial | None:
        """The next trial; None where another process took the last one."""
        with self._alone():
            return self._ask_alone() if sum(self._count()) < self._search.n_trials else None

    def _ask_alone(self) -> optuna.Trial:
        seed = self._config.seed + len(self._study.get_trials(deepcopy=False))  # a resumed sweep does not draw the same again
        self._study.sampler = studies.make_sampler(self._search.sampler, self._search.sampler_options, seed)
        try:
            return self._study.ask({key: dimension.distribution() for key, dimension in self._space.items()})
        except (ValueError, TypeError, NotImplementedError) as error:  # a sampler that cannot draw from such a space
            raise ConfigError(f"search.sampler={self._search.sampler}: {error}") from error

    def _run(self, n_trials: int) -> None:
        """Asks for trials, runs them through the launcher and tells the study how they ended."""
        seed, n_seeds = self._config.seed, self._search.n_seeds
        trials: list[optuna.Trial] = []
        with self._put_back(trials), studies.heartbeats(self._study) as beating:
            for _ in range(n_trials):
                trial = database.again(self._ask)
                if trial is not None:
                    trials.append(trial)
                    database.again(lambda: beating.add(trials[-1]._trial_id))
            if not trials:
                return
            first = self._launch([(trial, seed) for trial in trials])
            going = [trial for trial, done in zip(trials, first, strict=True) if _score(done) is not None]
            more = [(trial, seed + i) for trial in going for i in range(1, n_seeds)]
            rest = self._launch(more) if more else []
            for trial, done in zip(trials, first, strict=True):
                others = [ret for (of, _), ret in zip(more, rest, strict=True) if of is trial]
                try:
                    database.again(functools.partial(self._tell, trial, [done, *others]))
                except (optuna.exceptions.UpdateFinishedTrialError, ValueError) as error:
                    lost = studies.was_lost(self._study, trial)  # and not told already, before the connection broke
                    if isinstance(error, ValueError) and not lost:
                        raise
                    if lost:
                        print(f"trial {trial.number} was taken for lost by another process, which runs it again; not counted")

    @contextlib.contextmanager
    def _put_back(self, trials: list[optuna.Trial]) -> Iterator[None]:
        """A sweep that is stopped puts its unfinished trials up to be run again."""
        try:
            yield
        except BaseException as stop:
            self._patience.end()
            try:
                self._stop(trials)
            except database.BROKEN:
                numbers = some([trial.number for trial in trials])
                print(f"the study could not be told of trials {numbers}: they are run again, their runs stay in {self._folder}")
            if isinstance(stop, KeyboardInterrupt):
                raise type(stop)(f"the same command goes on with search.study={self._search.study}") from None
            raise

    def _stop(self, trials: Sequence[optuna.Trial]) -> None:
        for trial in trials:
            if not self._study._storage.get_trial(trial._trial_id).state.is_finished():
                with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError, ValueError):  # since then it was
                    trial.set_user_attr("stopped", True)
                    self._study.tell(trial, state=TrialState.FAIL)
        with self._alone():
            studies.put_up(self._study)

    def _launch(self, jobs: Sequence[tuple[optuna.Trial, int]]) -> Sequence[JobReturn]:
        lines = []
        for trial, seed in jobs:
            pruner = self._search.pruner if seed == self._config.seed else None
            own = Trial(
                self._url, self._search.study, trial._trial_id, trial.number, self._search.n_seeds, pruner,
                self._search.pruner_options,
            )  # fmt: skip
            group = [f"logger.wandb.group={self._search.study}"] if self._wants_group() else []
            chosen = [self._space[key].override(value) for key, value in trial.params.items()]
            print(f"\ntrial {trial.number}, seed {seed}: {' '.join(chosen)}", flush=True)
            lines.append([
                *self._fixed, *chosen, *group,
                f"seed={seed}", f"hydra.sweep.subdir={self._name(trial.number, seed)}",
                f"+hydra.job.env_set.{VARIABLE}={spelled(own.variable())}",
            ])  # fmt: skip
        return self._launcher.launch(lines, initial_job_idx=jobs[0][0].number)

    def _wants_group(self) -> bool:
        return self._config.logger.wandb is not None and self._config.logger.wandb.group is None

    def _name(self, number: int, seed: int) -> str:
        return f"{number:04d}" if seed == self._config.seed else f"{number:04d}-seed{seed}"

    def _tell(self, trial: optuna.Trial, done: Sequence[JobReturn]) -> None:
        seeds = [self._config.seed + i for i in range(len(done))]
        folders = [self._folder / self._name(trial.number, seed) for seed in seeds]
        trial.set_user_attr("folders", [str(folder) for folder in folders])
        trial.set_user_attr("where", f"{socket.gethostname()}:{self._folder.resolve()}")
        told = [read_run(folder).seconds for folder in folders if (folder / RECORD).is_file()]
        trial.set_user_attr("seconds", sum(seconds or 0 for seconds in told))
        if not self._search.keep_checkpoints:
            for folder in folders:
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        errors = [_error(ret) for ret in done if _score(ret) is None]
        if isinstance(done[0]._return_value, PrunedError):
            self._study.tell(trial, state=TrialState.PRUNED)
        elif errors:
            trial.set_user_attr("error", str(errors[0]) or type(errors[0]).__name__)
            self._study.tell(trial, state=TrialState.FAIL)
            print(f"trial {trial.number} failed: {type(errors[0]).__name__}: {errors[0]}", flush=True)
            self._last_error = errors[0]
        else:
            scores = [_score(ret) for ret in done]
            trial.set_user_attr("scores", scores)
            trial.set_user_attr("spread", statistics.stdev(scores) if len(scores) > 1 else None)
            self._study.tell(trial, statistics.fmean(scores))

    def _give_up_if_all_fail(self) -> None:
        n = studies.counted(self._study)
        if self._last_error is not None and n["FAIL"] >= _ALL_FAIL and not n["COMPLETE"] + n["PRUNED"]:
            if isinstance(self._last_error, SodaOpsError):
                raise type(self._last_error)(f"the first {n['FAIL']} trials all failed: {self._last_error}") from None
            raise self._last_error

    def _report(self) -> None:
        report.write(self._folder, self._study, self._config.checkpoint.monitor)

    def _conclude(self) -> None:
        """Says what came of it, and what to do next."""
        self._report()
        n = studies.counted(self._study)
        print(f"\n{self._search.study}: {n['COMPLETE']} trials finished, {n['PRUNED']} pruned, {n['FAIL']} failed")
        if not n["COMPLETE"]:
            raise ConfigError("no trial finished, so there is none to choose; see the errors above.")
        best = self._study.best_trial
        params = ", ".join(f"{key} {report.shown(value)}" for key, value in best.params.items())
        print(f"best: trial {best.number}, {self._config.checkpoint.monitor} {best.value:.4f} ({params})")
        ended = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        elsewhere = [trial for trial in ended if not (self._folder / self._name(trial.number, self._config.seed)).is_dir()]
        if elsewhere:
            places = some(sorted({trial.user_attrs.get("where", "an unknown place") for trial in elsewhere}))
            print(
                f"{len(elsewhere)} of {len(ended)} finished trials are not in {self._folder} but in {places}; copy them here "
                f"before you choose: rsync -a --exclude study.json FROM/ {self._folder}/"
            )
        print(f"report: {self._folder / report.FILE}\nchoose: sodaops select {self._folder}")


def _score(done: JobReturn) -> float | None:
    """A job's score; None where it has none: it failed, kept nothing, or is not a number."""
    value = done._return_value
    usable = done.status == JobStatus.COMPLETED and isinstance(value, int | float) and value == value
    return float(value) if usable else None


def _error(done: JobReturn) -> Exception:
    value = done._return_value
    return value if isinstance(value, Exception) else ConfigError(f"the run's score is {value}, no number to choose by.")
