"""The shared study: trials of processes that died or were stopped, and what a training reports to it."""

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from sodaops.errors import ConfigError, PrunedError
from sodaops.search.context import TRIAL_VARIABLE, TrialContext, trial_of
from tests.conftest import wait_until


@pytest.fixture(scope="module")
def space():
    from optuna.distributions import FloatDistribution

    return {"lr": FloatDistribution(0.0, 1.0)}


@pytest.fixture
def studies():
    from sodaops.search import study

    study.silence_optuna_loggers()
    return study


@pytest.fixture
def study(workdir, studies):
    return studies.open_study("sqlite:///study.db", "s", 1, "maximize", {})


@pytest.fixture
def lost_trials(study, studies):
    """Of a process that has been connected for longer than the grace period."""
    from sodaops.search import database

    reconnector = database.Reconnector(database.engine_of(study), "sqlite:///study.db", 0)
    reconnector.connected_since_s -= 10
    return studies.LostTrials(study, 1, reconnector)


def states(study):
    return [trial.state.name for trial in study.get_trials()]


def until_stale(study, n=1):
    wait_until(lambda: len(study._storage._get_stale_trial_ids(study._study_id)) >= n, 60)


def fail(study, trial, **attributes):
    from optuna.trial import TrialState

    for key, value in attributes.items():
        trial.set_user_attr(key, value)
    study.tell(trial, state=TrialState.FAIL)


@pytest.mark.slow
def test_a_trial_without_heartbeats_is_requeued(study, studies, space, lost_trials, monkeypatch):
    lost, alive = study.ask(space), study.ask(space)
    for trial in (lost, alive):
        studies.Heartbeats(study).add(trial._trial_id)
    until_stale(study, 2)
    monkeypatch.setattr(type(study._storage), "_get_stale_trial_ids", lambda self, study_id: [lost._trial_id])
    lost_trials.requeue()
    monkeypatch.setattr(type(study._storage), "_get_stale_trial_ids", lambda self, study_id: [])
    lost_trials.requeue()
    assert states(study) == ["FAIL", "RUNNING", "WAITING"]
    assert study.ask(space).params == lost.params
    assert studies.was_marked_lost(study, lost) and not studies.was_marked_lost(study, alive)


@pytest.mark.slow
def test_no_trial_is_lost_just_after_the_database_came_back(study, studies, space, lost_trials):
    studies.Heartbeats(study).add(study.ask(space)._trial_id)
    until_stale(study)
    lost_trials._grace_s, lost_trials._reconnector.connected_since_s = 3600, time.monotonic()
    lost_trials.requeue()
    assert states(study) == ["RUNNING"]


@pytest.mark.slow
def test_a_requeued_trial_that_died_before_its_first_heartbeat(study, studies, space, lost_trials):
    first = study.ask(space)
    studies.Heartbeats(study).add(first._trial_id)
    until_stale(study)
    lost_trials.requeue()
    second = study.ask(space)  # and no heartbeat
    wait_until(lambda: lost_trials.requeue() or states(study) == ["FAIL", "FAIL", "WAITING"], 60)
    assert first.params == second.params == study.ask(space).params


def test_parameters_are_requeued_even_if_they_were_not_drawn(study, studies, space):
    """The connection broke between the creation of a trial and the drawing of its parameters."""
    study.enqueue_trial({"lr": 0.25})
    fail(study, study.ask())
    studies.requeue_lost_trials(study)
    assert study.ask(space).params == {"lr": 0.25}


def test_a_trial_that_failed_by_itself_is_not_requeued(study, studies, space):
    fail(study, study.ask(space), error="no such file")
    studies.requeue_lost_trials(study)
    assert states(study) == ["FAIL"] and studies.count_trials(study)["FAIL"] == 1


def test_a_trial_is_lost_three_times_at_most_but_stopped_any_number_of_times(study, studies, space):
    for stopped in (True, False, True, False, True, False):
        fail(study, study.ask(space), **({"stopped": True} if stopped else {}))
        studies.requeue_lost_trials(study)
        assert states(study)[-1] == "WAITING"
    fail(study, study.ask(space))
    studies.requeue_lost_trials(study)
    assert states(study) == ["FAIL"] * 7 and studies.count_trials(study)["FAIL"] == 0


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_a_study_in_memory(url):
    from sodaops.search import database

    with pytest.raises(ConfigError, match=r"search\.storage=sqlite:"):
        database.open_storage(url)


@pytest.fixture
def pruning(study, space):
    """The callback of a trial that is pruned below 0.3, and the function that reports a value to it."""
    from sodaops.search.pruning import trial_callbacks

    pruner = ("optuna.pruners.ThresholdPruner", {"lower": 0.3})
    trial = study.ask(space)
    context = TrialContext("sqlite:///study.db", "s", trial._trial_id, trial.number, 1, *pruner)
    assert trial_of({TRIAL_VARIABLE: context.to_json()}) == context and trial_of({}) is None
    (callback,) = trial_callbacks(context, "val/f1")
    assert trial_callbacks(None, "val/f1") == [] == trial_callbacks(replace(context, pruner=None), "val/f1")

    def report(epoch, value):
        metrics = {} if value is None else {"val/f1": value}
        trainer = SimpleNamespace(callback_metrics=metrics, sanity_checking=False, current_epoch=epoch, max_epochs=9)
        callback.on_validation_end(trainer, None)

    return callback, report


def test_a_training_reports_and_is_pruned(study, pruning):
    _, report = pruning
    report(0, 0.5)
    report(1, None)
    with pytest.raises(PrunedError, match=r"epoch 3"):
        report(2, 0.1)
    report(8, 0.1)  # after the last epoch nothing is left to prune
    assert study.get_trials()[0].intermediate_values == {1: 0.5, 3: 0.1, 9: 0.1}


def test_a_training_goes_on_without_the_database(study, pruning, monkeypatch):
    from optuna.exceptions import StorageInternalError

    def away(*arguments):
        raise StorageInternalError("away")

    callback, report = pruning
    with monkeypatch.context() as patch:
        patch.setattr(callback._study._storage, "set_trial_intermediate_value", away)
        report(0, 0.1)
    assert study.get_trials()[0].intermediate_values == {}


def test_a_training_that_was_marked_as_lost_ends(study, pruning):
    from optuna.trial import TrialState

    callback, report = pruning
    study._storage.set_trial_state_values(callback._trial.trial_id, TrialState.FAIL)
    with pytest.raises(PrunedError, match="trial 0"):
        report(0, 0.5)


def test_a_study_of_an_earlier_version_goes_on(study, studies, space):
    """The names of attributes in the database, and of keys in study.json."""
    studies.open_study("sqlite:///study.db", "old", 1, "maximize", {"optim.lr": 1})
    old = studies.open_study("sqlite:///study.db", "old", 1, "maximize", {"optim.lr": 1})
    assert old.user_attrs == {"asked": {"optim.lr": 1}}
    trial = old.ask(space)
    studies.Heartbeats(old).add(trial._trial_id)
    fail(old, trial)
    studies.requeue_lost_trials(old)
    assert old.get_trials()[0].user_attrs == {"alive": trial._trial_id}
    assert old.get_trials()[1].user_attrs == {"instead_of": 0, "n_lost": 1}
