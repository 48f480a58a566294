"""The account that every run keeps of itself, run.json in its folder, and the table of runs that is read from those."""

import json
import operator
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sodaops.errors import ConfigError, nearest, some
from sodaops.io import storage

RECORD = "run.json"
FORMAT = 1
ROOTS = ("outputs", "multirun", "artifacts")
# running, then one of finished, failed, pruned, interrupted; lost is a running one whose process is gone.
STATUSES = ("running", "finished", "failed", "pruned", "interrupted", "lost", "damaged")
_OPERATORS = {"<=": operator.le, ">=": operator.ge, "!=": operator.ne, "=": operator.eq, "<": operator.lt, ">": operator.gt}


class Record:
    """A run's account while it runs; each change is written whole.

    Args:
        folder: the run's.
        params: the configuration, nested.
        fields: what else is known at the start.
    """

    def __init__(self, folder: Path, params: Mapping[str, Any], **fields: Any) -> None:
        self._path, self._begun_s = folder / RECORD, time.monotonic()
        started = datetime.now(UTC).isoformat(timespec="seconds")
        begun = {"format": FORMAT, "status": "running", "started": started, "host": socket.gethostname(), "pid": os.getpid()}
        self._fields = {**begun, "seconds": None, "metrics": {}, "bundle_id": None, "error": None, **fields, "params": params}
        self.update()

    def update(self, **fields: Any) -> None:
        """Changes fields, and writes."""
        self._fields |= fields
        storage.write_json(self._path, self._fields)

    def measured(self, split: str, metrics: Mapping[str, float]) -> None:
        """Adds the metrics of a split."""
        self.update(metrics={**self._fields["metrics"], split: dict(metrics)})

    def end(self, status: str, error: str | None = None) -> None:
        """The last change."""
        self.update(status=status, error=error, seconds=round(time.monotonic() - self._begun_s, 1))


@dataclass(frozen=True)
class Run:
    """A run as its folder tells it."""

    folder: Path
    status: str
    started: str
    seconds: float | None
    metrics: dict[str, float]  # val/macro_f1 -> value
    params: dict[str, Any]  # optim.lr -> value
    fields: dict[str, Any]  # the whole account

    @property
    def values(self) -> dict[str, Any]:
        """What a run can be sorted and filtered by."""
        own = {"run": str(self.folder), "status": self.status, "started": self.started, "seconds": self.seconds}
        return {**self.params, **self.metrics, **own}


def read(folder: str | Path) -> Run:
    """Reads a run folder's account; a damaged one is said to be so, in its status.

    Raises:
        ConfigError: no run folder.
    """
    folder = Path(folder)
    try:
        fields = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        status = fields["status"]
        if status == "running" and not _alive(fields["host"], fields["pid"]):
            status = "lost"
        metrics = {f"{split}/{name}": value for split, of in fields["metrics"].items() for name, value in of.items()}
        params = dict(flatten(fields["params"]))
        return Run(folder, status, fields["started"], fields["seconds"], metrics, params, fields)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{folder}: no {RECORD} here; expected a folder that training wrote.") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return Run(folder, "damaged", "", None, {}, {}, {"error": f"{RECORD} cannot be read ({type(error).__name__}: {error})"})


def find(roots: Sequence[str | Path] = ()) -> list[Run]:
    """Every run below these folders, oldest first; none named: those of :data:`ROOTS` that are there.

    Raises:
        ConfigError: a folder that is named and is not there.
    """
    for root in roots:
        if not Path(root).is_dir():
            raise ConfigError(f"{root}: no such folder.")
    folders = [Path(root) for root in (roots or ROOTS) if Path(root).is_dir()]
    found = {path.parent for folder in folders for path in folder.rglob(RECORD)}
    return sorted((read(folder) for folder in found), key=lambda run: (run.started, str(run.folder)))


def select(found: Iterable[Run], where: Sequence[str], sort: str | None) -> list[Run]:
    """Filters and sorts.

    Args:
        found: the runs.
        where: each KEY, one of = != < > <= >=, and a value: ``val/macro_f1>0.7``, ``status=finished``.
        sort: a key; one with ``-`` before it puts the largest first. Runs without the key come last.

    Raises:
        ConfigError: a condition that cannot be read, or a key that no run has.
    """
    found = list(found)
    names = {name for run in found for name in run.values}
    for condition in where:
        parts = re.fullmatch(r"([^<>=!]+)(<=|>=|!=|=|<|>)(.*)", condition)
        if parts is None:
            raise ConfigError(f"--where {condition}: expected KEY=VALUE, or !=, <, >, <=, >= in place of =.")
        key, symbol, text = parts.groups()
        _check_key("--where", key, names)
        found = [run for run in found if _holds(_OPERATORS[symbol], run.values.get(key), text)]
    if sort is not None:
        key = sort.removeprefix("-")
        _check_key("--sort", key, names)
        with_it, without = ([run for run in found if (run.values.get(key) is not None) is has] for has in (True, False))
        with_it.sort(key=lambda run: _order(run.values[key]), reverse=sort.startswith("-"))
        found = [*with_it, *without]
    return found


def table(found: Sequence[Run], n_params: int = 4) -> str:
    """The runs as text: metrics, and the parameters in which they differ, at most ``n_params`` of those."""
    differing = varying(found)
    metrics = [name for name in ("val/macro_f1", "val/loss", "test/macro_f1") if any(name in run.metrics for run in found)]
    header = ["run", "status", "seconds", *metrics, *differing[:n_params]]
    rows = [
        [str(run.folder), run.status, *(_shown(run.values.get(key)) for key in header[2:])]
        for run in found
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [header, *rows]]
    if len(differing) > n_params:
        lines.append(f"also different: {some(differing[n_params:], 12)}")
    return "\n".join(lines)


def compare(runs: Sequence[Run]) -> str:
    """The runs beside each other: metrics, and each parameter in which they differ."""
    shared = list(dict.fromkeys(name for run in runs for name in run.metrics))
    keys = ["status", "seconds", *shared, *varying(runs)]
    facts = {"data": "data_fingerprint", "commit": "git_commit", "bundle": "bundle_id"}
    cells = [["", *(str(run.folder) for run in runs)], *([key, *(_shown(run.values.get(key)) for run in runs)] for key in keys)]
    cells += [[name, *(str(run.fields.get(field) or "–")[:12] for run in runs)] for name, field in facts.items()]
    widths = [max(len(row[i]) for row in cells) for i in range(len(runs) + 1)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells)


def varying(found: Sequence[Run]) -> list[str]:
    """The parameters that are not the same in all of these runs, in the tree's order."""
    told = [run for run in found if run.params]
    keys = dict.fromkeys(key for run in told for key in run.params)
    return [key for key in keys if len({json.dumps(run.params.get(key), sort_keys=True) for run in told}) > 1]


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


def in_rank(environment: Mapping[str, str]) -> bool:
    """Whether an agent started this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in environment


def leads(environment: Mapping[str, str]) -> bool:
    """Whether this process is the one that writes: rank 0, or the only one."""
    return not in_rank(environment) or environment.get("RANK") == "0"


def _alive(host: str, pid: int) -> bool:
    """Whether the process may still run; of another machine's nothing is known, and the benefit of the doubt is given."""
    if host != socket.gethostname() or os.name == "nt":  # where signal 0 is Ctrl-C
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _check_key(option: str, key: str, names: set[str]) -> None:
    if key not in names:
        raise ConfigError(f"{option} {key}: no run has it{nearest(key, names)}; it is a metric, parameter, status or seconds.")


def _holds(compare: Any, value: Any, text: str) -> bool:
    if value is None and compare not in (operator.eq, operator.ne):
        return False
    if isinstance(value, bool) or value is None:
        return compare(str(value).lower(), text.lower().replace("null", "none"))
    if isinstance(value, int | float):
        try:
            return compare(float(value), float(text))
        except ValueError:
            raise ConfigError(f"--where …{text}: expected a number, as the key's values are.") from None
    return compare(str(value), text)


def _order(value: Any) -> tuple[bool, float, str]:
    is_number = isinstance(value, int | float)
    return (not is_number, float(value) if is_number else 0.0, str(value))


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
