"""Reads, filters, sorts and compares the run.json files of finished and running trainings."""

import json
import operator
import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sodaops.errors import ConfigError, nearest, some
from sodaops.io.run_record import RECORD

ROOTS = ("outputs", "multirun", "artifacts")
_OPERATORS = {"<=": operator.le, ">=": operator.ge, "!=": operator.ne, "=": operator.eq, "<": operator.lt, ">": operator.gt}


@dataclass(frozen=True)
class Run:
    """A run, as its run.json describes it.

    The status is running, finished, failed, pruned or interrupted; lost, if run.json says running and the process no longer
    exists; or damaged, if run.json cannot be read.
    """

    folder: Path
    status: str
    started: str
    seconds: float | None
    metrics: dict[str, float]  # val/macro_f1 -> value
    params: dict[str, Any]  # optim.lr -> value
    fields: dict[str, Any]  # everything in run.json

    @property
    def values(self) -> dict[str, Any]:
        """Every key by which a run can be filtered and sorted, and its value."""
        own = {"run": str(self.folder), "status": self.status, "started": self.started, "seconds": self.seconds}
        return {**self.params, **self.metrics, **own}


def read_run(folder: str | Path) -> Run:
    """Reads the run.json of a run folder; an unreadable one gives a run with the status damaged.

    Raises:
        ConfigError: the folder has no run.json.
    """
    folder = Path(folder)
    try:
        fields = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        status = fields["status"]
        if status == "running" and not _process_exists(fields["host"], fields["pid"]):
            status = "lost"
        metrics = {f"{split}/{name}": value for split, of in fields["metrics"].items() for name, value in of.items()}
        params = dict(flatten(fields["params"]))
        return Run(folder, status, fields["started"], fields["seconds"], metrics, params, fields)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{folder}: no {RECORD} here; expected a folder that training wrote.") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return Run(folder, "damaged", "", None, {}, {}, {"error": f"{RECORD} cannot be read ({type(error).__name__}: {error})"})


def find_runs(roots: Sequence[str | Path] = ()) -> list[Run]:
    """All runs below these folders, oldest first. Without ``roots``: below those of :data:`ROOTS` that exist.

    Raises:
        ConfigError: one of ``roots`` does not exist.
    """
    for root in roots:
        if not Path(root).is_dir():
            raise ConfigError(f"{root}: no such folder.")
    existing = [Path(root) for root in (roots or ROOTS) if Path(root).is_dir()]
    run_folders = {path.parent for root in existing for path in root.rglob(RECORD)}
    return sorted(map(read_run, run_folders), key=lambda run: (run.started, str(run.folder)))


def filter_runs(runs: Iterable[Run], where: Sequence[str], sort: str | None) -> list[Run]:
    """Filters and sorts runs.

    Args:
        runs: the runs.
        where: conditions such as ``val/macro_f1>0.7`` and ``status=finished``; operators = != < > <= >=.
        sort: a key; with ``-`` before it, the largest value comes first. Runs without the key come last.

    Raises:
        ConfigError: a condition that cannot be parsed, or a key that no run has.
    """
    runs = list(runs)
    keys = {key for run in runs for key in run.values}
    for condition in where:
        parts = re.fullmatch(r"([^<>=!]+)(<=|>=|!=|=|<|>)(.*)", condition)
        if parts is None:
            raise ConfigError(f"--where {condition}: expected KEY=VALUE, or !=, <, >, <=, >= in place of =.")
        key, symbol, text = parts.groups()
        _check_key("--where", key, keys)
        runs = [run for run in runs if _holds(_OPERATORS[symbol], run.values.get(key), text)]
    if sort is not None:
        key = sort.removeprefix("-")
        _check_key("--sort", key, keys)
        with_key = [run for run in runs if run.values.get(key) is not None]
        with_key.sort(key=lambda run: _sort_key(run.values[key]), reverse=sort.startswith("-"))
        runs = [*with_key, *(run for run in runs if run.values.get(key) is None)]
    return runs


def format_runs(runs: Sequence[Run], n_params: int = 4) -> str:
    """A table of runs: metrics, and at most ``n_params`` of the parameters in which they differ."""
    params = varying_params(runs)
    own = dict.fromkeys(key.split(".")[1] for run in runs for key in run.params if key.startswith("metrics."))
    monitored = dict.fromkeys(run.params.get("checkpoint.monitor") or "val/macro_f1" for run in runs)
    names = [*monitored, "val/loss", *(name.replace("val/", "test/") for name in monitored)]
    names += [f"{split}/{name}" for name in own for split in ("val", "test")]
    metrics = [name for name in dict.fromkeys(names) if any(name in run.metrics for run in runs)]
    columns = ["seconds", *metrics, *params[:n_params]]
    rows = [[str(run.folder), run.status, *(_cell(run.values.get(key)) for key in columns)] for run in runs]
    table = _align([["run", "status", *columns], *rows])
    if len(params) > n_params:
        table += f"\nalso different: {some(params[n_params:], 12)}"
    return table


def compare_runs(runs: Sequence[Run]) -> str:
    """A table with a column for each run: metrics, and every parameter in which the runs differ."""
    metrics = dict.fromkeys(name for run in runs for name in run.metrics)
    keys = ["status", "seconds", *metrics, *varying_params(runs)]
    fields = {"data": "data_fingerprint", "commit": "git_commit", "bundle": "bundle_id"}
    rows = [["", *(str(run.folder) for run in runs)], *([key, *(_cell(run.values.get(key)) for run in runs)] for key in keys)]
    rows += [[name, *(str(run.fields.get(field) or "–")[:12] for run in runs)] for name, field in fields.items()]
    return _align(rows)


def varying_params(runs: Sequence[Run]) -> list[str]:
    """The parameters that are not the same in all of these runs, in the order of the configuration."""
    params = [run.params for run in runs if run.params]  # a damaged run has none
    keys = dict.fromkeys(key for of_run in params for key in of_run)
    return [key for key in keys if len({json.dumps(of_run.get(key), sort_keys=True) for of_run in params}) > 1]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a nested mapping.

    >>> dict(flatten({"optim": {"lr": 0.1}, "seed": 1}))
    {'optim.lr': 0.1, 'seed': 1}
    """
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _process_exists(host: str, pid: int) -> bool:
    """Whether the process may still run. True for another machine's, of which nothing is known."""
    if host != socket.gethostname() or os.name == "nt":  # on Windows signal 0 is Ctrl-C
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it belongs to another user
        return True
    return True


def _check_key(option: str, key: str, keys: set[str]) -> None:
    if key not in keys:
        raise ConfigError(
            f"{option} {key}: no run has this key{nearest(key, keys)}; give a metric, parameter, status or seconds."
        )


def _holds(compare: Callable[[Any, Any], bool], value: Any, text: str) -> bool:
    if value is None and compare not in (operator.eq, operator.ne):
        return False
    if isinstance(value, bool) or value is None:
        return compare(str(value).lower(), text.lower().replace("null", "none"))
    if isinstance(value, int | float):
        try:
            return compare(float(value), float(text))
        except ValueError:
            raise ConfigError(f"--where …{text}: expected a number, since the key's values are numbers.") from None
    return compare(str(value), text)


def _sort_key(value: Any) -> tuple[bool, float, str]:
    """Numbers by value, then everything else by its text."""
    is_number = isinstance(value, int | float)
    return (not is_number, float(value) if is_number else 0.0, str(value))


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _align(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
