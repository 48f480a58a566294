"""The sweep that ``-m search=NAME`` runs: Optuna proposes trials, and Hydra's launcher runs them."""

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf
from optuna.trial import TrialState

from sodaops.config.monitor import monitor_mode
from sodaops.config.validation import build_config
from sodaops.errors import ConfigError, SodaOpsError, some
from sodaops.io import storage
from sodaops.io.progress import progress
from sodaops.io.runs import flatten
from sodaops.pages import shown
from sodaops.search import database, report, study as studies
from sodaops.search.space import Dimension, check_keys, read_space, swept_dimension, to_override
from sodaops.search.trials import TrialRunner

log = logging.getLogger(__name__)
_MAX_FIRST_FAILURES = 3  # if so many trials fail and none succeeds, the sweep ends: they must have a common cause
_POLL_S = 2.0
_MAX_OUTAGE = 5  # grace periods for which the database may be unreachable, as during an update or a failover
_NOT_SEARCHABLE = ("seed", "ckpt_path", "checkpoint.monitor")
_NOT_TRAINING = ("evaluate", "export", "logger", "registry", "run_dir", "search", "serve")  # sections


class Sweep:
    """Runs ``search.n_trials`` trials of ``search.space``, together with all other processes that work on the study.

    A trial is one job for each of ``search.n_seeds`` seeds. The first one may be pruned; the others run only if it was not.

    Args:
        config: the composed configuration, with the ``hydra`` section.
        launcher: Hydra's, which runs the jobs.
    """

    def __init__(self, config: DictConfig, launcher: Launcher) -> None:
        self._hydra, self._launcher = config.hydra, launcher
        sections = [key for key in config if key != "hydra"]
        self._tree = OmegaConf.to_container(OmegaConf.masked_copy(config, sections), resolve=True)
        self._groups = dict(config.hydra.runtime.choices)  # config group -> chosen file, as model -> minilm

    def run(self, arguments: list[str]) -> None:
        """Runs trials until the study has as many as asked for.

        Args:
            arguments: overrides from the command line, with one value or several.

        Raises:
            ConfigError: the space is invalid, or the study was made with other settings.
            SodaOpsError: the first trials all failed; of the class of the last error.
        """
        studies.silence_optuna_loggers()
        for launcher in ("hydra._internal.core_plugins.basic_launcher", "hydra_plugins"):
            logging.getLogger(launcher).setLevel(logging.WARNING)  # TrialRunner logs each job in one line
        self._config = config = build_config(self._tree)
        if config.search is None:
            raise ConfigError(
                "hydra/sweeper=study: no search space; choose one with -m search=default, which sets the sweeper."
            )
        self._search = search = config.search
        fixed, swept = _split_overrides(arguments)
        self._space = {dimension.key: dimension for dimension in self._dimensions(swept)}
        self._folder = Path(str(self._hydra.sweep.dir))
        with storage.writing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        url = search.storage or studies.default_url(self._folder)
        studies.check_sweep_folder(self._folder, url, search.study)
        metric, direction = config.checkpoint.monitor, f"{monitor_mode(config)}imize"
        studies.make_pruner(search.pruner, search.pruner_options)  # invalid options fail here, before the first trial
        studies.make_sampler(search.sampler, search.sampler_options, 0)
        with database.storage_errors(url):
            self._study = studies.open_study(url, search.study, search.grace_s, direction, self._comparable_settings())
            studies.write_study_file(self._folder, url, search.study, metric, direction)
            engine = database.engine_of(self._study)
            reconnector = database.Reconnector(engine, url, _MAX_OUTAGE * search.grace_s)
            self._lost_trials = studies.LostTrials(self._study, search.grace_s, reconnector)
            self._runner = TrialRunner(
                config, self._study, self._space, fixed, self._folder, url, reconnector, self._launcher.launch
            )
            with database.database_lock(engine):
                self._enqueue_current_values()
            self._run_until_done()
            self._log_result()

    def _dimensions(self, swept: Sequence[Override]) -> list[Dimension]:
        """The search space: that of conf/search, updated with the keys that the command line sweeps over."""
        configured = read_space(self._search.space) if self._search.space or not swept else []
        dimensions = {dimension.key: dimension for dimension in configured}
        dimensions |= {override.get_key_element(): swept_dimension(override) for override in swept}
        known = [*(key for key, _ in flatten(self._tree)), *self._groups]
        check_keys(dimensions.values(), [key for key in known if not key.startswith("search.")])
        refused = [key for key in dimensions if key in _NOT_SEARCHABLE or key.partition(".")[0] in _NOT_TRAINING]
        if refused:
            raise ConfigError(
                f"a search over {some(refused)}: its trials would not be comparable. To try several seeds, set search.n_seeds."
            )
        return list(dimensions.values())

    def _comparable_settings(self) -> dict[str, Any]:
        """The settings that all trials of a study must share: the space, and all keys of training that are not searched."""
        dimensions = {
            f"search.space.{d.key}": [d.type, d.low, d.high, d.log, d.step, list(d.values)] for d in self._space.values()
        }
        sections = {key: value for key, value in self._tree.items() if key not in _NOT_TRAINING}
        fixed = {key: value for key, value in flatten(sections) if key not in self._space}
        search = {"search.n_seeds": self._search.n_seeds, "search.grace_s": self._search.grace_s}
        return {**dimensions, **fixed, **search}

    def _enqueue_current_values(self) -> None:
        """Makes the current configuration the first trial of a new study, if it lies in the space."""
        if self._study.get_trials(deepcopy=False):
            return
        current = {**self._groups, **dict(flatten(self._tree))}
        outside = [
            f"{key}={to_override(current.get(key))}" for key, d in self._space.items() if not d.contains(current.get(key))
        ]
        if outside:
            log.info("the current configuration is outside the search space (%s), so no trial runs it", some(outside))
            return
        params = {key: dimension.stored(current[key]) for key, dimension in self._space.items()}
        self._study.enqueue_trial(params, skip_if_exists=True)

    def _run_until_done(self) -> None:
        """Runs trials while fewer than ``search.n_trials`` are running or ended; then waits for those of other processes."""
        waiting = False
        with progress(total=self._search.n_trials, desc=self._search.study, unit="trial") as bar:
            while True:
                database.retry_once(self._lost_trials.requeue)
                n_ended, n_running = database.retry_once(self._runner.count)
                bar.update(n_ended - bar.n)
                n_left = self._search.n_trials - n_ended - n_running
                if n_left > 0:
                    self._runner.run(min(n_left, self._n_jobs()))
                    database.retry_once(self._write_page)
                    self._check_first_failures()
                elif n_running and n_ended < self._search.n_trials:  # in other processes; if one dies, its trial runs again
                    if not waiting:
                        log.info("waiting for %d trials of other processes; lost trials run again", n_running)
                        waiting = True
                    time.sleep(_POLL_S)
                else:
                    return

    def _n_jobs(self) -> int:
        """The number of trials to run at once; by default, the number of jobs that the launcher runs at once."""
        n = self._search.n_jobs or self._hydra.launcher.get("n_jobs") or 1
        return int(n) if n > 0 else os.cpu_count()

    def _check_first_failures(self) -> None:
        """Ends the sweep if its first trials all failed."""
        n, error = studies.count_trials(self._study), self._runner.last_error
        if error is not None and n["FAIL"] >= _MAX_FIRST_FAILURES and not n["COMPLETE"] + n["PRUNED"]:
            if isinstance(error, SodaOpsError):
                raise type(error)(f"the first {n['FAIL']} trials all failed: {error}") from None
            raise error

    def _write_page(self) -> None:
        report.write_sweep_page(self._folder, self._study, self._config.checkpoint.monitor)

    def _log_result(self) -> None:
        """Writes the page, and logs the best trial and the commands to run next."""
        self._write_page()
        n = studies.count_trials(self._study)
        log.info("%s: %d trials finished, %d pruned, %d failed", self._search.study, n["COMPLETE"], n["PRUNED"], n["FAIL"])
        if not n["COMPLETE"]:
            raise ConfigError(f"search.study={self._search.study}: no trial finished; see the errors above.")
        best = self._study.best_trial
        params = ", ".join(f"{key} {shown(value)}" for key, value in best.params.items())
        log.info("best: trial %d, %s %.4f (%s)", best.number, self._config.checkpoint.monitor, best.value, params)
        ended = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        elsewhere = [trial for trial in ended if not (self._folder / self._runner.run_name(trial.number)).is_dir()]
        if elsewhere:
            places = some(sorted({trial.user_attrs.get("where", "an unknown place") for trial in elsewhere}))
            log.warning(
                "%d of %d finished trials are not in %s but in %s; copy them here before you choose: "
                "rsync -a --exclude study.json FROM/ %s/", len(elsewhere), len(ended), self._folder, places, self._folder,
            )  # fmt: skip
        log.info("report: %s", self._folder / report.SWEEP_PAGE)
        log.info("choose: sodaops select %s", self._folder)


def _split_overrides(arguments: list[str]) -> tuple[list[str], list[Override]]:
    """The overrides with one value, unparsed, and those that sweep over several values, parsed."""
    parsed = OverridesParser.create().parse_overrides(arguments)
    fixed = [text for text, override in zip(arguments, parsed, strict=True) if not override.is_sweep_override()]
    return fixed, [override for override in parsed if override.is_sweep_override()]
