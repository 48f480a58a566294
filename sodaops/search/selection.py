"""Selection of a sweep's best run: by a validation metric; of equally good runs, the one that took the least time."""

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sodaops.config.monitor import mode_of
from sodaops.errors import ConfigError, nearest, some
from sodaops.io import runs

WANDB = "wandb:"


@dataclass(frozen=True)
class Candidate:
    """A run, or the runs of one trial with several seeds."""

    name: str
    status: str
    value: float | None  # mean over the seeds
    spread: float | None  # standard deviation over the seeds
    seconds: float | None  # of all its runs
    params: dict[str, Any]
    folders: list[str]  # the first seed's first; of W&B, the run's address


@dataclass(frozen=True)
class Choice:
    """The chosen run, and how many others there were."""

    metric: str
    direction: str
    best: Candidate
    n_eligible: int
    left_out: dict[str, int]  # reason -> number of runs

    def as_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)


def choose_run(candidates: Sequence[Candidate], metric: str, direction: str, tolerance: float = 0.0) -> Choice:
    """Chooses the fastest of the finished candidates that are at most ``tolerance`` worse than the best.

    Args:
        candidates: of one sweep.
        metric: name of their value.
        direction: ``maximize`` or ``minimize``.
        tolerance: how much worse than the best still counts as equally good.

    Raises:
        ConfigError: not a validation metric, or no candidate that finished with a number.
    """
    check_metric(metric)
    if not 0 <= tolerance < math.inf:
        raise ConfigError(f"--tolerance {tolerance}: expected 0 or more.")
    eligible: list[Candidate] = []
    left_out: dict[str, int] = {}
    for candidate in candidates:
        reason = _reason(candidate)
        if reason is None:
            eligible.append(candidate)
        else:
            left_out[reason] = left_out.get(reason, 0) + 1
    if not eligible:
        reasons = ", ".join(f"{n} {reason}" for reason, n in left_out.items()) or "there are no runs"
        raise ConfigError(f"no run to choose: {reasons}. A run must have finished, and have a number for {metric}.")
    sign = 1 if direction == "maximize" else -1
    top = max(sign * candidate.value for candidate in eligible)
    equals = [candidate for candidate in eligible if sign * candidate.value >= top - tolerance]
    best = min(equals, key=lambda c: (c.seconds if c.seconds is not None else math.inf, -sign * c.value, c.name))
    return Choice(metric, direction, best, len(eligible), left_out)


def check_metric(metric: str) -> None:
    """Checks that a metric was measured on the validation split.

    Raises:
        ConfigError: it was measured on another one.
    """
    if not metric.startswith("val/"):
        raise ConfigError(f"--metric {metric}: a model is chosen by a validation metric; expected val/macro_f1, val/loss, ….")


def read_candidates(source: str, metric: str) -> list[Candidate]:
    """Reads the runs of a sweep.

    Args:
        source: a folder with runs in it, or ``wandb:ENTITY/PROJECT/SWEEP``.
        metric: on validation.

    Raises:
        ConfigError: no such sweep, or a metric that no run has.
    """
    check_metric(metric)
    return _of_wandb(source.removeprefix(WANDB), metric) if source.startswith(WANDB) else _of_folder(source, metric)


def monitored(source: str) -> str:
    """The metric that the runs of a sweep chose their epochs by; of a sweep of W&B ``val/macro_f1``."""
    found = [] if source.startswith(WANDB) else runs.find_runs([source])
    return next((name for run in found if (name := run.params.get("checkpoint.monitor"))), "val/macro_f1")


def direction_of(metric: str, candidates: Sequence[Candidate]) -> str:
    """``minimize`` or ``maximize``, as the configuration of these runs says, or the metric's class.

    Raises:
        ConfigError: neither says so.
    """
    params = candidates[0].params if candidates else {}
    names = [key.split(".")[1] for key in params if re.fullmatch(r"metrics\.\w+\._target_", key)]
    mode = params.get("checkpoint.mode") if params.get("checkpoint.monitor") == metric else None
    return f"{mode or mode_of(metric, {name: params[f'metrics.{name}._target_'] for name in names})}imize"


def _of_folder(source: str, metric: str) -> list[Candidate]:
    """Runs that are seeds of one trial become one candidate."""
    groups: dict[Any, list[runs.Run]] = {}  # folder and number of a trial, or the folder of a single run -> its runs
    for run in runs.find_runs([source]):
        trial = run.fields.get("trial") or {}
        groups.setdefault((run.folder.parent, trial["number"]) if trial else run.folder, []).append(run)
    known = {name for group in groups.values() for run in group for name in run.metrics if name.startswith("val/")}
    if groups and metric not in known:
        raise ConfigError(f"{source}: no run has {metric}{nearest(metric, known)}; they have {some(sorted(known)) or 'none'}.")
    return [_candidate(group, metric) for group in groups.values()]


def _candidate(group: list[runs.Run], metric: str) -> Candidate:
    group = sorted(group, key=lambda run: run.params.get("seed") or 0)
    values = [run.metrics.get(metric) for run in group]
    measured = all(isinstance(value, int | float) for value in values)
    statuses = {run.status for run in group}
    n_seeds = max((run.fields.get("trial") or {}).get("n_seeds", 1) for run in group)
    status = statuses.pop() if len(statuses) == 1 else "unfinished"
    if status == "finished" and len(group) < n_seeds:
        status = "unfinished"
    seconds = [run.seconds for run in group]
    return Candidate(
        name=str(group[0].folder), status=status, value=statistics.fmean(values) if measured else None,
        spread=statistics.stdev(values) if measured and len(values) > 1 else None,
        seconds=sum(seconds) if all(s is not None for s in seconds) else None,
        params=group[0].params, folders=[str(run.folder) for run in group],
    )  # fmt: skip


def _of_wandb(path: str, metric: str) -> list[Candidate]:
    import wandb

    from sodaops.training.wandb_server import check_reachable

    if path.count("/") != 2:
        raise ConfigError(f"{WANDB}{path}: expected wandb:ENTITY/PROJECT/SWEEP.")
    check_reachable()
    try:
        sweep = wandb.Api().sweep(path)
        wandb_runs = list(sweep.runs)
    except (wandb.errors.CommError, wandb.errors.UsageError, ValueError) as error:
        raise ConfigError(f"{WANDB}{path}: {str(error).splitlines()[0]}. Check the name and WANDB_API_KEY.") from None
    return [
        Candidate(
            name=run.name, status=run.state, value=run.summary.get(metric), spread=None, seconds=run.summary.get("_runtime"),
            params=dict(runs.flatten(run.config)), folders=[run.url],
        )
        for run in wandb_runs
    ]  # fmt: skip


def _reason(candidate: Candidate) -> str | None:
    """Why a candidate cannot be chosen; None if it can."""
    if candidate.status != "finished":
        return candidate.status
    if not isinstance(candidate.value, int | float):
        return "without the metric"
    return None if math.isfinite(candidate.value) else "not a number"
