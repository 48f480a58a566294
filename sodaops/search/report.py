"""The page of a sweep: plots of the trials' values, courses and parameters by Optuna, and a table of all trials."""

import contextlib
import statistics
import warnings
from pathlib import Path
from typing import Any

import optuna
from optuna import visualization
from optuna.trial import FrozenTrial, TrialState

from sodaops import pages
from sodaops.io import storage

SWEEP_PAGE = "sweep.html"


def write_sweep_page(folder: Path, study: optuna.Study, metric: str) -> Path:
    """Writes the page of a study, which loads nothing from outside.

    Args:
        folder: of the sweep.
        study: with any number of trials.
        metric: name of the trials' value.

    Returns:
        The page.
    """
    trials = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished() or t.state == TrialState.RUNNING]
    trials = [t for t in trials if t.state != TrialState.FAIL or "error" in t.user_attrs]  # without the lost ones
    completed = [t for t in trials if t.state == TrialState.COMPLETE]
    choose_best = max if study.direction.name == "MAXIMIZE" else min
    page = pages.render_page(
        "sweep", study=study.study_name, metric=metric, trials=trials, plots=_plots(study, completed, metric),
        keys=list(dict.fromkeys(key for t in trials for key in t.params)),
        best=choose_best(completed, key=lambda t: t.value) if completed else None,
        median=statistics.median([t.value for t in completed]) if completed else None,
        counts={name: sum(t.state.name == name for t in trials) for name in ("COMPLETE", "PRUNED", "FAIL", "RUNNING")},
        seconds=[t.user_attrs["seconds"] for t in trials if "seconds" in t.user_attrs],
    )  # fmt: skip
    storage.write_text(folder / SWEEP_PAGE, page)
    return folder / SWEEP_PAGE


def _plots(study: optuna.Study, completed: list[FrozenTrial], metric: str) -> list[str]:
    """Optuna's plots as HTML elements; the first one brings plotly.js with it."""
    if not completed:
        return []
    figures: list[Any] = [visualization.plot_optimization_history(study, target_name=metric)]
    if any(t.intermediate_values for t in completed):
        figures.append(visualization.plot_intermediate_values(study))
    if len(completed) > 1:
        figures.append(visualization.plot_parallel_coordinate(study, target_name=metric))
        with warnings.catch_warnings(), contextlib.suppress(ValueError, RuntimeError, UserWarning):
            warnings.simplefilter("error", UserWarning)  # all values are equal, or there are too few trials
            figures.append(visualization.plot_param_importances(study, target_name=metric))
    for figure in figures:
        figure.update_layout(template="plotly_white", font={"family": "system-ui, sans-serif"}, height=420)
    config = {"displaylogo": False, "responsive": True}
    return [figure.to_html(full_html=False, include_plotlyjs=i == 0, config=config) for i, figure in enumerate(figures)]
