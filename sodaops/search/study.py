"""The study that a sweep is kept in: Optuna's, shared by any number of processes and machines, some of which die."""

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

FILE = "study.json"  # in the sweep's folder: which study it is
_SAMPLERS = {
    "tpe": ("optuna.samplers.TPESampler", {"n_startup_trials": 6, "constant_liar": True}),
    "random": ("optuna.samplers.RandomSampler", {}),
}
_PRUNERS = {
    "median": ("optuna.pruners.MedianPruner", {"n_startup_trials": 4}),
    "hyperband": ("optuna.pruners.HyperbandPruner", {}),
    "none": ("optuna.pruners.NopPruner", {}),
}
_MAX_LOST = 3  # so often may a trial be lost and run again; it may be what kills its machine


def quieten() -> None:
    """Optuna's notes about itself go; its warnings stay, but for those that a feature may change."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed")  # ours beat in heartbeats(), below


def check_folder(folder: Path, url: str, name: str) -> None:
    """Refuses a sweep's folder that another study has filled: its runs would be overwritten.

    Raises:
        ConfigError: it is another study's.
    """
    if not (folder / FILE).is_file():
        return
    about = _about(folder)
    if (about["storage"], about["study"]) != (url, name):
        raise ConfigError(
            f"{folder} holds the runs of study {about['study']} in {about['storage']}; name another with "
            "search.study=NAME, or another folder with hydra.sweep.dir=FOLDER."
        )


def _about(folder: Path) -> dict[str, str]:
    try:
        about = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return {key: about[key] for key in ("storage", "study", "metric", "direction")}
    except FileNotFoundError:
        raise ConfigError(f"{folder}: no {FILE} here; expected the folder of a sweep (multirun/STUDY).") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / FILE}: damaged ({error}); delete it, and the sweep's command writes it anew.") from None


def open_study(url: str, name: str, grace_s: int, direction: str, asked: Mapping[str, Any]) -> optuna.Study:
    """The study of this name, made where it is new.

    Args:
        url: of the database.
        name: the study's.
        grace_s: see :func:`database.open_storage`.
        direction: ``maximize`` or ``minimize``.
        asked: what makes trials comparable, key by key.

    Raises:
        ConfigError: the study was begun with something else.
        StorageError: the database cannot be opened.
    """
    kept = database.open_storage(url, grace_s)
    with database.alone(kept.engine):
        study = optuna.create_study(storage=kept, study_name=name, direction=direction, load_if_exists=True)
        begun = study.user_attrs.get("asked")
        plain = json.loads(json.dumps(asked))
        if begun is None:
            study.set_user_attr("asked", plain)
    if begun is not None and begun != plain:
        keys = [key for key in {**begun, **plain} if begun.get(key) != plain.get(key)]
        differing = some([f"{key}: {begun.get(key)}, now {plain.get(key)}" for key in keys])
        raise ConfigError(
            f"search.study={name} was begun with another question, and its trials do not compare ({differing}). "
            "Name a new one with search.study=NAME, or ask the same."
        )
    return study


def make_sampler(name: str, options: Mapping[str, Any] | None, seed: int) -> optuna.samplers.BaseSampler:
    """A sampler of Optuna's, by a short name or its class.

    Raises:
        ConfigError: no such class, or arguments that it does not take.
    """
    return _make("sampler", name, {"seed": seed}, options, _SAMPLERS, optuna.samplers.BaseSampler)


def make_pruner(name: str, options: Mapping[str, Any] | None) -> optuna.pruners.BasePruner:
    """A pruner of Optuna's, by a short name or its class.

    Raises:
        ConfigError: no such class, or arguments that it does not take.
    """
    return _make("pruner", name, {}, options, _PRUNERS, optuna.pruners.BasePruner)


def _make(
    what: str, name: str, given: Mapping[str, Any], options: Mapping[str, Any] | None, known: Mapping[str, Any], kind: type
) -> Any:
    target, defaults = known.get(name, (name, {}))
    if name not in known and "." not in name:
        raise ConfigError(f"search.{what}={name!r}: expected {', '.join(known)} or a class{nearest(name, known)}.")
    try:
        found = get_class(target)
        if not issubclass(found, kind):
            raise TypeError(f"no subclass of {kind.__name__}")
        taken = inspect.signature(found).parameters
        return found(**{key: value for key, value in given.items() if key in taken}, **{**defaults, **(options or {})})
    except Exception as error:  # a user's class may raise anything
        raise ConfigError(f"search.{what}={name}: {str(error).splitlines()[0]}.") from error


def remember(folder: Path, url: str, name: str, metric: str, direction: str) -> None:
    """Writes which study a sweep's folder belongs to."""
    files.write_json(folder / FILE, {"storage": url, "study": name, "metric": metric, "direction": direction})


def recall(folder: Path) -> tuple[optuna.Study, dict[str, str]]:
    """The study of a sweep's folder, and what :func:`remember` wrote.

    Raises:
        ConfigError, StorageError: no sweep, or a database that cannot be opened.
    """
    about = _about(folder)
    name, url = about["study"], about["storage"]
    local = url.removeprefix("sqlite:///")
    if local != url and not Path(local).is_file():
        moved = folder / Path(local).name
        if not moved.is_file():
            raise ConfigError(f"{folder / FILE}: its database {local} is gone.")
        url = f"sqlite:///{moved.resolve()}"
    try:
        with database.answering(url):
            return optuna.load_study(study_name=name, storage=database.open_storage(url)), about
    except KeyError:
        raise ConfigError(f"{folder / FILE}: the database holds no study {name}.") from None


def counted(study: optuna.Study) -> dict[str, int]:
    """How many trials there are of each kind; one that was lost and run again counts once."""
    trials = study.get_trials(deepcopy=False)
    states = {name: sum(t.state == TrialState[name] for t in trials) for name in ("COMPLETE", "PRUNED", "RUNNING")}
    return {**states, "FAIL": sum(t.state == TrialState.FAIL and not _is_lost(t) for t in trials)}


@contextlib.contextmanager
def heartbeats(study: optuna.Study) -> Iterator["Alive"]:
    """Tells the database, as long as the block runs, that the trials which are added are alive."""
    alive, over = Alive(study), threading.Event()

    def beat() -> None:
        while not over.wait(study._storage.get_heartbeat_interval()):
            alive.beat()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield alive
    finally:
        over.set()
        thread.join()


class Alive:
    """Trials whose heart beats."""

    def __init__(self, study: optuna.Study) -> None:
        self._store = study._storage
        self._trial_ids: list[int] = []

    def add(self, trial_id: int) -> None:
        """One more; its first beat is told at once."""
        self._store.record_heartbeat(trial_id)
        self._store.set_trial_user_attr(trial_id, "alive", trial_id)
        self._trial_ids.append(trial_id)

    def beat(self) -> None:
        """A beat of each."""
        with contextlib.suppress(*database.BROKEN):  # busy, or away; the next one will do
            for trial_id in list(self._trial_ids):
                self._store.record_heartbeat(trial_id)


class Watch:
    """Looks after the trials of processes that died.

    Args:
        study: theirs and ours.
        grace_s: seconds that a process may be silent for.
        patience: knows since when the database is at hand.
    """

    def __init__(self, study: optuna.Study, grace_s: int, patience: database.Patience) -> None:
        self._study, self._grace_s, self._patience = study, grace_s, patience
        self._unborn: dict[int, float] = {}  # trial_id -> when we first saw it; machines' clocks may differ

    def look(self) -> None:
        """Fails trials that nobody speaks for, and puts them up to be run again."""
        if time.monotonic() - self._patience.since_s < self._grace_s:
            return  # the database may have been away just now, and nobody could say that his trials live
        with database.alone(database.engine_of(self._study)):
            fail_stale_trials(self._study)
            self._fail_unborn()
            put_up(self._study)

    def _fail_unborn(self) -> None:
        """Those whose process died between the question and the first heartbeat."""
        running, now_s = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)), time.monotonic()
        unborn = [trial._trial_id for trial in running if trial.user_attrs.get("alive") != trial._trial_id]
        self._unborn = {trial_id: self._unborn.get(trial_id, now_s) for trial_id in unborn}
        for trial_id, since_s in self._unborn.items():
            if now_s - since_s > self._grace_s:
                with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
                    self._study._storage.set_trial_state_values(trial_id, TrialState.FAIL)


def put_up(study: optuna.Study) -> None:
    """Enqueues the settings of each trial that was lost or stopped, unless that was done; one process at a time."""
    trials = study.get_trials(deepcopy=False)
    done = {trial.user_attrs.get("instead_of") for trial in trials}
    for trial in trials:
        settings = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        n_lost = trial.user_attrs.get("n_lost", 0) + ("stopped" not in trial.user_attrs)
        if _is_lost(trial) and trial.number not in done and settings and n_lost <= _MAX_LOST:
            study.enqueue_trial(settings, user_attrs={"instead_of": trial.number, "n_lost": n_lost})


def was_lost(study: optuna.Study, trial: optuna.Trial) -> bool:
    """Whether another process took a trial for lost."""
    return _is_lost(study._storage.get_trial(trial._trial_id))


def _is_lost(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.FAIL and "error" not in trial.user_attrs


def default_url(folder: Path) -> str:
    """SQLite in a sweep's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder.resolve() / 'study.db'}"
