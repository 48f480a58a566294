"""The project report: one page about a run, its metrics, its place in the registry and the drift of its requests."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sodaops import pages
from sodaops.bundle import layout
from sodaops.bundle.card import LIMITS
from sodaops.config.schema import Config
from sodaops.drift.check import NUMBERS
from sodaops.errors import BundleError, ConfigError, DataError, RegistryError, some
from sodaops.evaluation.result import own_metrics
from sodaops.io import remote, runs, storage
from sodaops.registry.checks import Verdict
from sodaops.registry.gate import GATE_JSON, GateResult
from sodaops.registry.registry import CHAMPION, Registry
from sodaops.reports.curves import training_charts
from sodaops.reports.sources import read_drift, read_evaluation, read_gate_report

PROJECT_REPORT = "project_report.html"
_TRAINER_KEYS = ("max_epochs", "precision", "accelerator", "devices", "strategy", "accumulate_grad_batches")


@dataclass(frozen=True)
class Event:
    """An event in the registry's history that concerns a version."""

    when: str
    who: str
    what: str
    why: str
    champion: bool  # whether the version is champion after it


def find_run(config: Config, name: str) -> Path:
    """The folder of a run.

    Args:
        config: names the registry.
        name: the folder, or a version or alias whose bundle was trained by a run on this machine.

    Raises:
        ConfigError, RegistryError: no such run.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        version = Registry(config.registry.path).version(name)
    except RegistryError as error:
        raise ConfigError(f"{name}: not a run folder, and not a version or alias ({error})") from None
    for run in reversed(runs.find_runs()):
        with contextlib.suppress(BundleError):  # runs without a bundle, or with a damaged one
            if layout.read_info(run.folder / "bundle").bundle_id == version:
                return run.folder
    raise ConfigError(f"{name}: version {version}, of no run in {', '.join(runs.ROOTS)}; give the folder of its run.")


def write_project_report(config: Config, run_dir: Path, output: str | Path | None = None) -> Path:
    """Writes the project report of a run. The page loads nothing from outside, and contains no texts of users.

    Args:
        config: names the folders of the registry, the gate's report, the evaluation and the drift check.
        run_dir: the run's folder, with ``bundle`` in it.
        output: the page; None: ``project_report.html`` in the run's folder.

    Raises:
        ConfigError: not a run folder, or a remote evaluation.
        BundleError, DataError, RegistryError, StorageError: a damaged file.
    """
    path, bundle = Path(output or run_dir / PROJECT_REPORT), run_dir / "bundle"
    run = _read_record(run_dir)
    info = layout.read_info(bundle)
    task = layout.task_of(bundle, info)
    layout.verify(bundle, info)
    trained = layout.read_config(bundle, info)
    registry = Registry(config.registry.path)
    state, history = registry.state(), registry.history()
    gate = read_gate_report(remote.join(config.registry.report_dir, f"{info.bundle_id}/{GATE_JSON}"), info.bundle_id)
    page = pages.render_page(
        "project", folder=run_dir, run=run, info=info, task=task, manifest=layout.read_json(bundle, info, layout.DATA),
        limits=LIMITS, some=some, own_metrics=own_metrics, e=read_evaluation(config, run_dir, info, task),
        charts=training_charts(run_dir / "metrics" / "metrics.csv", task, trained.get("metrics", {})),
        n_earlier=len(list(run_dir.glob("metrics.*"))), settings=_settings(trained),
        sizes={name: (bundle / layout.ONNX[name]).stat().st_size / 1e6 for name in info.onnx},
        root=registry.root, registered=info.bundle_id in state.versions, champion=state.aliases.get(CHAMPION),
        aliases=[alias for alias, version in state.aliases.items() if version == info.bundle_id],
        events=_events(info.bundle_id, history), gate=gate, verdicts=_verdicts(info.bundle_id, gate, history),
        slice_rows=config.registry.gate.slice_rows, report_dir=config.registry.report_dir,
        drift=read_drift(remote.join(config.drift.output_dir, NUMBERS)), drift_dir=config.drift.output_dir,
        created=datetime.now(UTC).isoformat(timespec="minutes"),
    )  # fmt: skip
    storage.write_text(path, page)
    return path


def _read_record(folder: Path) -> runs.Run | None:
    """The content of run.json; None if there is none, as in a folder that DVC restored."""
    run = runs.read_run(folder) if (folder / runs.RECORD).exists() else None
    if run is not None and run.status == "damaged":
        raise DataError(f"{folder}: {run.fields['error']}. Restore the file, or delete it: the page is then made without it.")
    if not (folder / "bundle" / layout.INFO).is_file():
        reason = f"its training is {run.status} and wrote none" if run else "expected the folder of a training"
        raise ConfigError(f"{folder}: no bundle/{layout.INFO}; {reason}. Give a finished run, for example outputs/first.")
    return run


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the training's configuration that the page shows; null is left out."""
    trainer = {key: config.get("trainer", {}).get(key) for key in _TRAINER_KEYS}
    sections = {key: config.get(key) for key in ("seed", "data", "model", "head", "loss", "optim")}
    return {key: value for key, value in runs.flatten({**sections, "trainer": trainer}) if value is not None}


def _verdicts(version: str, gate: GateResult | None, history: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    """The gate's verdicts: from its report, or without explanations from the registry's history."""
    if gate is not None:
        return gate.verdicts
    gates = [event["gate"] for event in history if event.get("version") == version and event.get("gate")]
    rules = gates[-1].get("rules", {}) if gates else {}
    return [Verdict(name, rule["passed"], rule["value"], rule["limit"], "") for name, rule in rules.items()]


def _events(version: str, history: Sequence[Mapping[str, Any]]) -> list[Event]:
    """The events that concern a version, oldest first."""
    previous, events = None, []  # the champion before each event
    for entry in history:
        champion, rollback = entry["aliases"].get(CHAMPION), entry["event"] == "rollback"
        what = None
        if champion == version != previous:
            what = f"became champion again: {previous} was rolled back" if rollback else f"became champion{_decision(entry)}"
        elif previous == version != champion:
            what = f"was rolled back: {champion} is champion again" if rollback else f"{champion} became champion"
        elif version in entry.get("taken", []):
            what = "was deleted from the registry"
        elif entry.get("version") == version:
            what = "was registered" if entry["event"] == "register" else f"became {entry['alias']}"
        if what is not None:
            events.append(Event(entry["when"], entry["who"], what, entry["why"], champion == version))
        previous = champion
    return events


def _decision(entry: Mapping[str, Any]) -> str:
    """How a promotion was decided."""
    gate = entry.get("gate") or {}
    if "error" in gate:
        return f" by force; the gate failed ({gate['error']})"
    failed = [name for name, rule in gate.get("rules", {}).items() if not rule["passed"]]
    if entry.get("forced"):
        return f" by force, although checks failed: {some(failed)}"
    return f"; all {len(gate['rules'])} checks passed" if gate.get("rules") else ", without the gate"
