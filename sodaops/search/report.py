"""A sweep on one page: which settings went where, which of them mattered, the best so far, and every trial."""

import math
import statistics
from pathlib import Path

import optuna
import plotly.graph_objects as go
import plotly.offline
from optuna.trial import FrozenTrial, TrialState

from sodaops import pages
from sodaops.io import storage
from sodaops.pages import shown

FILE = "sweep.html"
_COLOURS = {"COMPLETE": "#0072B2", "PRUNED": "#E69F00", "FAIL": "#D55E00"}
_FONT = "system-ui, sans-serif"


def write(folder: Path, study: optuna.Study, metric: str) -> Path:
    """Writes the page of a study into a folder; it loads nothing from outside.

    Args:
        folder: the sweep's.
        study: with any number of trials.
        metric: the value's name.
    """
    storage.write_text(folder / FILE, render(study, metric))
    return folder / FILE


def render(study: optuna.Study, metric: str) -> str:
    """The page as HTML."""
    trials = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished() or t.state == TrialState.RUNNING]
    trials = [t for t in trials if t.state != TrialState.FAIL or "error" in t.user_attrs]  # the others were run again
    done = [t for t in trials if t.state == TrialState.COMPLETE]
    keys = list(dict.fromkeys(key for t in trials for key in t.params))
    larger = study.direction.name == "MAXIMIZE"
    figures = {}
    if done:
        figures["Best so far"] = _history(done, trials, larger, metric)
        figures["As they trained"] = _courses(trials, metric)
        if len(done) > 1:
            figures["Where each trial was"] = _parallel(done, keys, metric)
            figures["What mattered"] = _importance(study, metric)
    best = (max if larger else min)(done, key=lambda t: t.value) if done else None  # of this very look: others go on
    drawn = {title: _div(figure) for title, figure in figures.items() if figure is not None}
    return pages.render(
        "sweep", study=study.study_name, metric=metric, keys=keys, trials=trials, best=best, figures=drawn,
        counts={name: sum(t.state.name == name for t in trials) for name in ("COMPLETE", "PRUNED", "FAIL", "RUNNING")},
        script=plotly.offline.get_plotlyjs() if drawn else "",
        seconds=[t.user_attrs["seconds"] for t in trials if "seconds" in t.user_attrs],
        median=statistics.median([t.value for t in done]) if done else None,
    )  # fmt: skip


def _history(done: list[FrozenTrial], trials: list[FrozenTrial], larger: bool, metric: str) -> go.Figure:
    best, course = None, []
    for trial in done:
        best = trial.value if best is None else (max if larger else min)(best, trial.value)
        course.append(best)
    figure = go.Figure()
    spread = [t.user_attrs.get("spread") or 0 for t in done]
    figure.add_scatter(
        x=[t.number for t in done], y=[t.value for t in done], mode="markers", name="finished",
        marker={"color": _COLOURS["COMPLETE"]}, error_y={"array": spread, "visible": any(spread)},
    )  # fmt: skip
    pruned = [t for t in trials if t.state == TrialState.PRUNED and t.value is not None]
    figure.add_scatter(
        x=[t.number for t in pruned], y=[t.value for t in pruned], mode="markers", name="pruned (last seen)",
        marker={"color": _COLOURS["PRUNED"], "symbol": "x"},
    )  # fmt: skip
    figure.add_scatter(
        x=[t.number for t in done], y=course, mode="lines", name="best", line={"shape": "hv", "color": _COLOURS["COMPLETE"]}
    )
    figure.update_layout(xaxis_title="trial", yaxis_title=metric)
    return figure


def _courses(trials: list[FrozenTrial], metric: str) -> go.Figure | None:
    figure = go.Figure()
    for trial in trials:
        steps = sorted(trial.intermediate_values.items())
        if steps:
            figure.add_scatter(
                x=[s for s, _ in steps], y=[v for _, v in steps], mode="lines+markers", name=f"trial {trial.number}",
                line={"color": _COLOURS.get(trial.state.name, "#8a94a6"), "width": 1.5}, showlegend=False,
                hovertemplate=f"trial {trial.number}, epoch %{{x}}: %{{y:.4f}}<extra></extra>",
            )  # fmt: skip
    figure.update_layout(xaxis_title="epoch", yaxis_title=metric, xaxis={"dtick": 1})
    return figure if figure.data else None


def _parallel(done: list[FrozenTrial], keys: list[str], metric: str) -> go.Figure:
    scales = []
    for key in keys:
        values, distribution = [t.params.get(key) for t in done], next(t.distributions[key] for t in done if key in t.params)
        label = key.rpartition(".")[2] if [k.rpartition(".")[2] for k in keys].count(key.rpartition(".")[2]) == 1 else key
        if isinstance(distribution, optuna.distributions.CategoricalDistribution):
            names = [shown(choice) for choice in distribution.choices]
            places = [names.index(shown(value)) for value in values]
            scale = {"values": places, "tickvals": list(range(len(names))), "ticktext": names, "range": [0, len(names) - 1]}
        elif getattr(distribution, "log", False):
            low, high = math.log10(distribution.low), math.log10(distribution.high)
            ticks = [low + i * (high - low) / 4 for i in range(5)]
            logs = [math.log10(value) for value in values]
            scale = {"values": logs, "tickvals": ticks, "ticktext": [shown(10**t) for t in ticks], "range": [low, high]}
        else:
            scale = {"values": values, "range": [distribution.low, distribution.high]}
        scales.append({"label": label, **scale})
    values = [t.value for t in done]
    scales.append({"label": metric, "values": values})
    line = {"color": values, "colorscale": [[0, "#d3dae4"], [0.7, "#56B4E9"], [1, "#00426b"]], "showscale": False}
    return go.Figure(go.Parcoords(dimensions=scales, line=line, labelangle=0))


def _importance(study: optuna.Study, metric: str) -> go.Figure | None:
    try:
        found = optuna.importance.get_param_importances(study)
    except (ValueError, RuntimeError):  # every value the same, or too few trials to tell
        return None
    names = list(reversed(found))
    figure = go.Figure(go.Bar(x=[found[name] for name in names], y=names, orientation="h", marker_color=_COLOURS["COMPLETE"]))
    figure.update_layout(xaxis_title=f"share of the variance of {metric}", yaxis={"automargin": True})
    return figure


def _div(figure: go.Figure) -> str:
    figure.update_layout(
        template="plotly_white", font={"family": _FONT, "size": 13}, margin={"l": 60, "r": 40, "t": 50, "b": 50}, height=380,
        legend={"orientation": "h", "y": 1.12},
    )  # fmt: skip
    return figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False, "responsive": True})
