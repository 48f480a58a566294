"""Sweeps whose trials cost nothing: Hydra, the sweeper and the launchers are real, the training is a formula."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

HOLD = "TEST_HOLD"  # NUMBER:FILE: the trial of this number waits until the file exists
ARGUMENTS = ("--multirun", "search=smoke", "search.study=s", "logger=none", "search.pruner=none", "search.grace_s=4")


def train_instantly(config: Any) -> float:
    """Writes a run's record, and returns a score that depends on the learning rate."""
    from sodaops.io.run_record import RunRecord
    from sodaops.search.context import trial_of

    trial = trial_of(os.environ)
    record = RunRecord(Path(config.run_dir), {"seed": config.seed, "optim": {"lr": config.optim.lr}}, trial=trial.as_dict())
    number, _, file = os.environ.get(HOLD, ":").partition(":")
    if number == str(trial.number):
        from tests.conftest import wait_until

        wait_until(Path(file).exists)
    record.add_metrics("val", {"macro_f1": config.optim.lr})
    record.finish("finished")
    return config.optim.lr


def run_sweep(*arguments: str, job: Callable[[Any], float] = train_instantly) -> None:
    """Runs a sweep in this process, as `train.py` does."""
    from sodaops.config.compose import run_hydra

    run_hydra(job, [*ARGUMENTS, *arguments])


def trials(url: str | None = None) -> list[Any]:
    """The trials of the study of multirun/s, or of study ``s`` in a database."""
    import optuna

    from sodaops.search import database, study as studies

    if url is None:
        study, _ = studies.load_study_of(Path("multirun/s"))
    else:
        study = optuna.load_study(study_name="s", storage=database.open_storage(url))
    return study.get_trials(deepcopy=False)


def states(url: str | None = None) -> list[str]:
    """The states of those trials."""
    return [trial.state.name for trial in trials(url)]


if __name__ == "__main__":  # a process of its own
    import sys

    run_sweep(*sys.argv[1:])
