"""Trials of processes that died or were stopped: who tells, and what is run again."""

import time

import optuna
import pytest
from optuna.trial import TrialState

from sodaops.errors import ConfigError
from sodaops.search import database, study as studies

SPACE = {"lr": optuna.distributions.FloatDistribution(0.0, 1.0)}


@pytest.fixture
def study(workdir):
    studies.quieten()
    return studies.open_study("sqlite:///study.db", "s", 1, "maximize", {})


@pytest.fixture
def watch(study):
    """Looks as one does who has had the database at hand for long."""
    patience = database.Patience(database.engine_of(study), "sqlite:///study.db", 0)
    patience.since_s -= 10
    return studies.Watch(study, 1, patience)


def states(study):
    return [trial.state.name for trial in study.get_trials()]


def until_stale(study, n=1):
    while len(study._storage._get_stale_trial_ids(study._study_id)) < n:
        time.sleep(0.1)


def fail(study, trial, **attributes):
    for key, value in attributes.items():
        trial.set_user_attr(key, value)
    study.tell(trial, state=TrialState.FAIL)


def test_a_silent_trial_is_run_again_with_its_settings(study, watch):
    silent, alive = study.ask(SPACE), study.ask(SPACE)
    for trial in (silent, alive):
        studies.Alive(study).add(trial._trial_id)
    until_stale(study, 2)
    study._storage.record_heartbeat(alive._trial_id)
    watch.look()
    watch.look()
    assert states(study) == ["FAIL", "RUNNING", "WAITING"]
    assert study.ask(SPACE).params == silent.params
    assert studies.was_lost(study, silent) and not studies.was_lost(study, alive)


def test_nobody_is_given_up_just_after_the_database_came_back(study, watch):
    studies.Alive(study).add(study.ask(SPACE)._trial_id)
    until_stale(study)
    watch._patience.since_s = time.monotonic()
    watch.look()
    assert states(study) == ["RUNNING"]


def test_a_second_run_that_died_before_its_first_heartbeat_is_not_waited_for(study, watch):
    first = study.ask(SPACE)
    studies.Alive(study).add(first._trial_id)
    until_stale(study)
    watch.look()
    second = study.ask(SPACE)  # and no heartbeat
    while states(study) != ["FAIL", "FAIL", "WAITING"]:
        watch.look()
        time.sleep(0.1)
    assert first.params == second.params == study.ask(SPACE).params


def test_settings_are_put_up_even_if_the_connection_broke_before_they_were_drawn(study):
    study.enqueue_trial({"lr": 0.25})
    fail(study, study.ask())  # without a space nothing is drawn
    studies.put_up(study)
    assert study.ask(SPACE).params == {"lr": 0.25}


def test_a_trial_that_failed_by_itself_is_not_run_again(study):
    fail(study, study.ask(SPACE), error="no such file")
    studies.put_up(study)
    assert states(study) == ["FAIL"] and studies.counted(study)["FAIL"] == 1


def test_a_trial_is_lost_four_times_at_most_and_stopped_as_often_as_one_likes(study):
    for stopped in (True, False, True, False, True, False):
        fail(study, study.ask(SPACE), **({"stopped": True} if stopped else {}))
        studies.put_up(study)
        assert states(study)[-1] == "WAITING"
    fail(study, study.ask(SPACE))
    studies.put_up(study)
    assert states(study) == ["FAIL"] * 7 and studies.counted(study)["FAIL"] == 0


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_a_study_in_memory(url):
    with pytest.raises(ConfigError, match="the memory of one process"):
        database.open_storage(url)
