"""The Optuna study of a sweep, shared by any number of processes and machines, some of which may die."""

import contextlib
import inspect
import json
import logging
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
from hydra.utils import get_class
from optuna.storages import fail_stale_trials
from optuna.trial import FrozenTrial, TrialState

from sodaops.errors import ConfigError, nearest, some
from sodaops.io import storage as files
from sodaops.search import database

STUDY_FILE = "study.json"  # in the sweep's folder: the study that its runs belong to
_SAMPLERS = {
    "tpe": ("optuna.samplers.TPESampler", {"n_startup_trials": 6, "constant_liar": True}),
    "random": ("optuna.samplers.RandomSampler", {}),
}
_PRUNERS = {
    "median": ("optuna.pruners.MedianPruner", {"n_startup_trials": 4}),
    "hyperband": ("optuna.pruners.HyperbandPruner", {}),
    "none": ("optuna.pruners.NopPruner", {}),
}
_MAX_LOST = 3  # a trial that was lost so often is not run again: it may be what kills its machine
# Names of user attributes in the database. Processes of other versions read them too, so they stay as they are.
_SETTINGS, _HEARTBEAT, _REQUEUED_FROM, _N_LOST = "asked", "alive", "instead_of", "n_lost"


def silence_optuna_loggers() -> None:
    """Hides Optuna's progress messages, and warnings about features of it that are used on purpose."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed")  # heartbeats() below writes them


def check_sweep_folder(folder: Path, url: str, name: str) -> None:
    """Checks that a sweep's folder does not hold the runs of another study, which would be overwritten.

    Raises:
        ConfigError: it belongs to another study.
    """
    if not (folder / STUDY_FILE).is_file():
        return
    info = _read_study_file(folder)
    if (info["storage"], info["study"]) != (url, name):
        raise ConfigError(
            f"{folder} holds the runs of study {info['study']} in {info['storage']}; choose another study with "
            "search.study=NAME, or another folder with hydra.sweep.dir=FOLDER."
        )


def _read_study_file(folder: Path) -> dict[str, str]:
    try:
        info = json.loads((folder / STUDY_FILE).read_text(encoding="utf-8"))
        return {key: info[key] for key in ("storage", "study", "metric", "direction")}
    except FileNotFoundError:
        raise ConfigError(f"{folder}: no {STUDY_FILE}; expected the folder of a sweep (multirun/STUDY).") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / STUDY_FILE}: damaged ({error}); delete it and run the sweep's command again.") from None


def open_study(url: str, name: str, grace_s: int, direction: str, settings: Mapping[str, Any]) -> optuna.Study:
    """Opens a study, or creates it.

    Args:
        url: of the database.
        name: of the study.
        grace_s: see :func:`database.open_storage`.
        direction: ``maximize`` or ``minimize``.
        settings: everything that must be the same for its trials to be comparable, by key.

    Raises:
        ConfigError: the study was created with other settings.
        StorageError: the database cannot be opened.
    """
    storage = database.open_storage(url, grace_s)
    new = json.loads(json.dumps(settings))
    with database.database_lock(storage.engine):
        study = optuna.create_study(storage=storage, study_name=name, direction=direction, load_if_exists=True)
        stored = study.user_attrs.get(_SETTINGS)
        if stored is None:
            study.set_user_attr(_SETTINGS, new)
    if stored is not None and stored != new:
        keys = [key for key in {**stored, **new} if stored.get(key) != new.get(key)]
        changes = some([f"{key}: {stored.get(key)}, now {new.get(key)}" for key in keys])
        raise ConfigError(
            f"search.study={name} was created with other settings ({changes}), so its trials cannot be compared with new "
            "ones. Choose another study with search.study=NAME, or restore the settings."
        )
    return study


def make_sampler(name: str, options: Mapping[str, Any] | None, seed: int) -> optuna.samplers.BaseSampler:
    """Creates an Optuna sampler from a short name or its class path.

    Raises:
        ConfigError: no such class, or arguments that it does not accept.
    """
    return _make("sampler", name, {"seed": seed}, options, _SAMPLERS, optuna.samplers.BaseSampler)


def make_pruner(name: str, options: Mapping[str, Any] | None) -> optuna.pruners.BasePruner:
    """Creates an Optuna pruner from a short name or its class path.

    Raises:
        ConfigError: no such class, or arguments that it does not accept.
    """
    return _make("pruner", name, {}, options, _PRUNERS, optuna.pruners.BasePruner)


def _make(
    key: str, name: str, arguments: Mapping[str, Any], options: Mapping[str, Any] | None, known: Mapping[str, Any], base: type
) -> Any:
    target, defaults = known.get(name, (name, {}))
    if name not in known and "." not in name:
        raise ConfigError(f"search.{key}={name!r}: expected {', '.join(known)} or the path of a class{nearest(name, known)}.")
    try:
        cls = get_class(target)
        if not issubclass(cls, base):
            raise TypeError(f"no subclass of {base.__name__}")
        accepted = inspect.signature(cls).parameters
        return cls(**{key: value for key, value in arguments.items() if key in accepted}, **{**defaults, **(options or {})})
    except Exception as error:  # a user's class may raise anything
        raise ConfigError(f"search.{key}={name}: {str(error).splitlines()[0]}.") from error


def write_study_file(folder: Path, url: str, name: str, metric: str, direction: str) -> None:
    """Writes to a sweep's folder which study it belongs to."""
    files.write_json(folder / STUDY_FILE, {"storage": url, "study": name, "metric": metric, "direction": direction})


def load_study_of(folder: Path) -> tuple[optuna.Study, dict[str, str]]:
    """The study of a sweep's folder, and the content of its study.json.

    Raises:
        ConfigError, StorageError: not a sweep's folder, or a database that cannot be opened.
    """
    info = _read_study_file(folder)
    name, url = info["study"], info["storage"]
    path = url.removeprefix("sqlite:///")
    if path != url and not Path(path).is_file():  # the folder may have been moved, with the database in it
        moved = folder / Path(path).name
        if not moved.is_file():
            raise ConfigError(f"{folder / STUDY_FILE}: its database {path} does not exist.")
        url = f"sqlite:///{moved.resolve()}"
    try:
        with database.storage_errors(url):
            return optuna.load_study(study_name=name, storage=database.open_storage(url)), info
    except KeyError:
        raise ConfigError(f"{folder / STUDY_FILE}: the database has no study {name}.") from None


def count_trials(study: optuna.Study) -> dict[str, int]:
    """How many trials are COMPLETE, PRUNED, RUNNING and FAIL; lost trials are not counted, since they run again."""
    trials = study.get_trials(deepcopy=False)
    states = {name: sum(t.state == TrialState[name] for t in trials) for name in ("COMPLETE", "PRUNED", "RUNNING")}
    return {**states, "FAIL": sum(t.state == TrialState.FAIL and not _is_lost(t) for t in trials)}


@contextlib.contextmanager
def heartbeats(study: optuna.Study) -> Iterator["Heartbeats"]:
    """Sends heartbeats of the trials that are added to it, from a thread, while the block runs."""
    trials, stop = Heartbeats(study), threading.Event()

    def send() -> None:
        while not stop.wait(study._storage.get_heartbeat_interval()):
            trials.send()

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    try:
        yield trials
    finally:
        stop.set()
        thread.join()


class Heartbeats:
    """The heartbeats of this process's trials."""

    def __init__(self, study: optuna.Study) -> None:
        self._storage = study._storage
        self._trial_ids: list[int] = []

    def add(self, trial_id: int) -> None:
        """Adds a trial, and sends its first heartbeat at once."""
        self._storage.record_heartbeat(trial_id)
        self._storage.set_trial_user_attr(trial_id, _HEARTBEAT, trial_id)
        self._trial_ids.append(trial_id)

    def send(self) -> None:
        """Sends one heartbeat of each trial."""
        with contextlib.suppress(*database.DATABASE_ERRORS):  # the next heartbeat is soon enough
            for trial_id in list(self._trial_ids):
                self._storage.record_heartbeat(trial_id)


class LostTrials:
    """Finds trials whose process died, and requeues them.

    Args:
        study: shared with other processes.
        grace_s: how long a trial may be without a heartbeat.
        reconnector: knows since when the database can be reached.
    """

    def __init__(self, study: optuna.Study, grace_s: int, reconnector: database.Reconnector) -> None:
        self._study, self._grace_s, self._reconnector = study, grace_s, reconnector
        self._unstarted: dict[int, float] = {}  # trial_id -> when we first saw it; clocks of other machines may differ

    def requeue(self) -> None:
        """Marks trials without a heartbeat as failed, and requeues them."""
        if time.monotonic() - self._reconnector.connected_since_s < self._grace_s:
            return  # the database may just have been away, so that nobody could send a heartbeat
        with database.database_lock(database.engine_of(self._study)):
            fail_stale_trials(self._study)
            self._fail_unstarted()
            requeue_lost_trials(self._study)

    def _fail_unstarted(self) -> None:
        """Fails trials whose process died before their first heartbeat. Optuna does not find these."""
        running, now_s = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)), time.monotonic()
        unstarted = [trial._trial_id for trial in running if trial.user_attrs.get(_HEARTBEAT) != trial._trial_id]
        self._unstarted = {trial_id: self._unstarted.get(trial_id, now_s) for trial_id in unstarted}
        for trial_id, since_s in self._unstarted.items():
            if now_s - since_s > self._grace_s:
                with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
                    self._study._storage.set_trial_state_values(trial_id, TrialState.FAIL)


def requeue_lost_trials(study: optuna.Study) -> None:
    """Enqueues the parameters of each lost or stopped trial once more; call it under the database lock."""
    trials = study.get_trials(deepcopy=False)
    requeued = {trial.user_attrs.get(_REQUEUED_FROM) for trial in trials}
    for trial in trials:
        params = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        n_lost = trial.user_attrs.get(_N_LOST, 0) + ("stopped" not in trial.user_attrs)
        if _is_lost(trial) and trial.number not in requeued and params and n_lost <= _MAX_LOST:
            study.enqueue_trial(params, user_attrs={_REQUEUED_FROM: trial.number, _N_LOST: n_lost})


def was_marked_lost(study: optuna.Study, trial: optuna.Trial) -> bool:
    """Whether another process marked a trial of this one as lost."""
    return _is_lost(study._storage.get_trial(trial._trial_id))


def _is_lost(trial: FrozenTrial) -> bool:
    """A trial that failed by itself has the attribute ``error``; one whose process died or was stopped has not."""
    return trial.state == TrialState.FAIL and "error" not in trial.user_attrs


def default_url(folder: Path) -> str:
    """The URL of the SQLite database in a sweep's folder, which is created."""
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder.resolve() / 'study.db'}"
