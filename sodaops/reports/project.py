"""A run on one page, for people who were not there: what it is, how good, whether it is in production and why, what since."""

import contextlib
import csv
import html
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, make_dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from sodaops import pages
from sodaops.bundle import layout
from sodaops.config.schema import Config
from sodaops.drift.check import NUMBERS
from sodaops.drift.measure import Drift
from sodaops.errors import BundleError, ConfigError, DataError, RegistryError, some
from sodaops.evaluation.result import FOLDERS
from sodaops.io import remote, runs, storage
from sodaops.registry.card import LIMITS
from sodaops.registry.checks import Verdict
from sodaops.registry.gate import WRITTEN, Judged
from sodaops.registry.registry import CHAMPION, Registry

FILE = "project_report.html"
_BASELINES = {"majority": "always the most frequent label", "tfidf": "TF-IDF + logistic regression"}
_TRAINER = ("max_epochs", "precision", "accelerator", "devices", "strategy", "accumulate_grad_batches")
_POINTS = 300  # of a curve
# What evaluation/report.html says that its metrics.json does not: of which bundle and rows it is, and its pictures.
_SUBJECT = re.compile(r"rows ([^<>]*?) · bundle <code>(\w+)</code>")
_PICTURE = re.compile(r'<img alt="([^"]*)" src="data:image/png;base64,([\w+/=]+)"><figcaption>([^<]*)</figcaption>')


def _shape(**fields: Any) -> type:
    return make_dataclass("Shape", fields.items(), frozen=True)


# What metrics.json holds of a split, as far as the page reads it.
_INTERVAL = _shape(low=float, high=float)
_MEASURED = _shape(
    n_rows=int, macro_f1=float, accuracy=float, weighted_f1=float, ece=float,
    interval_95=_shape(macro_f1=_INTERVAL, accuracy=_INTERVAL, weighted_f1=_INTERVAL),
    labels=dict[str, _shape(precision=float, recall=float, f1=float, n_rows=int)],  # type: ignore[misc]
    slices=dict[str, dict[str, _shape(macro_f1=float, accuracy=float, confidence=float, n_rows=int)]],  # type: ignore[misc]
    baselines=dict[str, _shape(macro_f1=float, accuracy=float)],  # type: ignore[misc]
)  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """An evaluation of this very bundle."""

    split: str
    which: str  # rows: "that took no part in training"
    metrics: dict[str, Any]
    rows: list[tuple[str, Any, bool]]  # baselines and the model: name, metrics, whether it is the model
    pictures: list[tuple[str, str, str]]  # title, PNG in base64, caption
    missed: list[tuple[str, str, int]]  # label, what it was taken for, rows; most frequent first


@dataclass(frozen=True)
class Event:
    """Something that happened to a version in the registry."""

    when: str
    who: str
    what: str
    why: str
    champion: bool  # whether it is champion after it


def find_run(config: Config, name: str) -> Path:
    """The folder of a run: its path, or a version or alias whose bundle a run here has made.

    Raises:
        ConfigError, RegistryError: there is none.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        version = Registry(config.registry.path).version(name)
    except RegistryError as error:
        raise ConfigError(f"{name}: no run folder, and no version or alias either ({error})") from None
    for run in reversed(runs.find_runs()):
        with contextlib.suppress(BundleError):  # none there, or another run's damage
            if layout.read_info(run.folder / "bundle").bundle_id == version:
                return run.folder
    raise ConfigError(f"{name} is {version}, which no run in {', '.join(runs.ROOTS)} has made; give the folder of its run.")


def write_project_report(config: Config, run_dir: Path, output: str | Path | None = None) -> Path:
    """Gathers what is known of a run and writes the page, which loads nothing from outside and holds no text of a user.

    Args:
        config: says where registry, gate's report, evaluation and drift look are.
        run_dir: the run's folder, with ``bundle`` in it.
        output: the page; None: ``project_report.html`` in the run's folder.

    Raises:
        ConfigError: no run folder, or an evaluation that lies afar.
        BundleError, DataError, RegistryError, StorageError: a part that is there and damaged.
    """
    path, bundle = Path(output or run_dir / FILE), run_dir / "bundle"
    run = _run(run_dir)
    info = layout.read_info(bundle)
    layout.verify(bundle, info)
    manifest = json.loads(layout.read_file(bundle, info, layout.DATA))
    evaluation = _evaluation(config, run_dir, info.bundle_id)
    judged = _judged(remote.join(config.registry.report_dir, f"{info.bundle_id}/{WRITTEN[1]}"), info.bundle_id)
    registry = Registry(config.registry.path)
    state, history = registry.state(), registry.history()
    events = _events(info.bundle_id, history)
    trained_with = layout.read_config(bundle)
    trainer = {key: trained_with.get("trainer", {}).get(key) for key in _TRAINER}
    kept = {key: trained_with.get(key) for key in ("seed", "data", "model", "optim")}
    page = pages.render(
        "project", folder=run_dir, run=run, info=info, manifest=manifest, limits=LIMITS, some=some, e=evaluation,
        charts=_charts(run_dir / "metrics" / "metrics.csv"), n_earlier=len(list(run_dir.glob("metrics.*"))),
        settings={key: value for key, value in runs.flatten({**kept, "trainer": trainer}) if value is not None},
        sizes={variant: (bundle / layout.ONNX[variant]).stat().st_size / 1e6 for variant in info.onnx},
        root=registry.root, registered=info.bundle_id in state.versions, champion=state.aliases.get(CHAMPION),
        aliases=[alias for alias, version in state.aliases.items() if version == info.bundle_id], events=events,
        gate=judged, verdicts=_verdicts(info.bundle_id, judged, history), slice_rows=config.registry.gate.slice_rows,
        drift=_drift(remote.join(config.drift.output_dir, NUMBERS)), drift_dir=config.drift.output_dir,
        report_dir=config.registry.report_dir, created=datetime.now(UTC).isoformat(timespec="minutes"),
    )  # fmt: skip
    storage.write_text(path, page)
    return path


def _run(folder: Path) -> runs.Run | None:
    """The run's account of itself; None where there is none, as where DVC brought the bundle alone."""
    run = runs.read_run(folder) if (folder / runs.RECORD).exists() else None
    if run is not None and run.status == "damaged":
        raise DataError(f"{folder}: {run.fields['error']}. Bring a copy back, or move it away: the page then goes without it.")
    if not (folder / "bundle" / layout.INFO).is_file():
        ended = f"its training is {run.status} and kept none" if run else "expected a folder that training wrote"
        raise ConfigError(f"{folder}: no bundle/{layout.INFO} here; {ended}. Give a run that finished, as outputs/first.")
    return run


def _read(path: str | Path, kind: Any, mend: str) -> Any:
    """A JSON file, here or afar, as a class says it is; None where there is no such file.

    Raises:
        DataError: it is something else.
        StorageError: an address that cannot be read.
    """
    try:
        content = remote.read_if_exists(str(path))
        return None if content is None else TypeAdapter(kind).validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(f"{path}: damaged ({place + ': ' if place else ''}{first['msg']}); {mend}.") from None
    except OSError as error:
        raise DataError(f"{path}: could not be read ({error.strerror}); check the access, or {mend}.") from None


def _evaluation(config: Config, run_dir: Path, bundle_id: str) -> Evaluation | str:
    """The evaluation of this bundle where the key says, in the run's folder, or beside that as DVC has it; else why not."""
    mend, others = f"`sodaops evaluate {run_dir / 'bundle'}` makes one", []
    if remote.is_address(config.evaluate.output_dir):
        raise ConfigError(
            f"evaluate.output_dir={config.evaluate.output_dir}: expected a folder of this machine; bring it here first."
        )
    named = [Path(config.evaluate.output_dir)] if config.evaluate.output_dir else []
    for folder in [*named, run_dir / FOLDERS["test"], run_dir.parent / FOLDERS["test"]]:
        report = folder / "report.html"
        if not report.is_file():
            continue
        source = report.read_text(encoding="utf-8", errors="replace")
        subject = _SUBJECT.search(source)
        if subject is None:
            raise DataError(f"{report}: damaged, it does not say of which bundle it is; {mend} anew.")
        if subject[2] == bundle_id:
            pictures = [tuple(map(html.unescape, found)) for found in _PICTURE.findall(source)]
            return _evaluated(folder, html.unescape(subject[1]), pictures, mend)
        others.append(f"the one in {folder} is of bundle {subject[2]}")
    return f"No evaluation of this bundle was found{': ' + '; '.join(others) if others else ''}; {mend}."


def _evaluated(folder: Path, which: str, pictures: list[Any], mend: str) -> Evaluation:
    path = folder / "metrics.json"
    measured = Annotated[dict[str, _MEASURED], Field(min_length=1), BeforeValidator(_of_splits)]  # type: ignore[valid-type]
    if _read(path, measured, f"{mend} anew") is None:
        raise DataError(f"{path}: missing, and report.html is there; {mend} anew.")
    split, metrics = next(iter(_of_splits(json.loads(path.read_text(encoding="utf-8"))).items()))
    rows = [(_BASELINES.get(name, name), values, False) for name, values in metrics["baselines"].items()]
    try:
        answers = pq.read_table(folder / "predictions.parquet", columns=["label", "predicted"]).to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{folder / 'predictions.parquet'}: damaged or missing ({error}); {mend} anew.") from None
    wrong = Counter((row["label"], row["predicted"]) for row in answers if row["label"] != row["predicted"])
    missed = [(label, other, n_rows) for (label, other), n_rows in wrong.most_common()]
    return Evaluation(split, which, metrics, [*rows, ("this model", metrics, True)] if rows else [], pictures, missed)


def _of_splits(content: Any) -> Any:
    """The splits of a metrics.json, without what it says of itself."""
    return {key: value for key, value in content.items() if key in FOLDERS} if isinstance(content, dict) else content


def _judged(path: str, version: str) -> Judged | None:
    found = _read(path, Judged, "`sodaops promote` writes it anew")
    if found is not None and found.version != version:
        raise DataError(f"{path}: is of {found.version}; move it away, `sodaops promote {version}` writes it anew.")
    return found


def _verdicts(version: str, judged: Judged | None, history: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    """The gate's rules, from its report or, without words, from the registry's history."""
    if judged is not None:
        return judged.verdicts
    gates = [entry["gate"] for entry in history if entry.get("version") == version and entry.get("gate")]
    rules = gates[-1].get("rules", {}) if gates else {}
    return [Verdict(name, of["passed"], of["value"], of["limit"], "") for name, of in rules.items()]


def _events(version: str, history: Sequence[Mapping[str, Any]]) -> list[Event]:
    """What happened to a version, oldest first."""
    was, found = None, []
    for entry in history:
        now = entry["aliases"].get(CHAMPION)
        what = None
        if now == version != was:
            back = entry["event"] == "rollback"
            what = f"became champion again: {was} was rolled back" if back else f"became champion{_by_gate(entry)}"
        elif was == version != now:
            what = f"was rolled back: {now} is champion again" if entry["event"] == "rollback" else f"{now} became champion"
        elif version in entry.get("taken", []):
            what = "was deleted from the registry"
        elif entry.get("version") == version:
            what = "was registered" if entry["event"] == "register" else f"became {entry['alias']}"
        if what is not None:
            found.append(Event(entry["when"], entry["who"], what, entry["why"], now == version))
        was = now
    return found


def _by_gate(entry: Mapping[str, Any]) -> str:
    gate = entry.get("gate") or {}
    if "error" in gate:
        return f" by force; the gate could not judge it ({gate['error']})"
    broken = [name for name, of in gate.get("rules", {}).items() if not of["passed"]]
    if entry.get("forced"):
        return f" by force, against the gate: {some(broken)} did not hold"
    return f"; all {len(gate['rules'])} rules of the gate held" if gate.get("rules") else ", without the gate"


def _drift(path: str) -> Drift | None:
    """The last look, without what users wrote."""
    found = _read(path, Drift, "`sodaops drift` writes it anew")
    if found is None:
        return None
    said = f"one text makes up {found.repeated:.0%} of the requests"
    causes = [replace(cause, said=said) if cause.name == "repeated" else cause for cause in found.causes]
    return replace(found, causes=causes, said="", repeated_text=None, examples=[])


def _charts(path: Path) -> list[dict[str, Any]]:
    """Loss and scores by step, as points of two drawings; none where the run logged no CSV."""
    if not path.is_file():
        return []
    series: dict[str, list[tuple[float, float]]] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                for name in ("train/loss_step", "val/loss", "val/macro_f1", "val/accuracy"):
                    if row.get(name) and math.isfinite(value := float(row[name])):
                        series.setdefault(name, []).append((float(row["step"]), value))
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        said = f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: damaged ({said}); move it away, the page then goes without.") from None
    wanted = {"Loss": ("train/loss_step", "val/loss"), "Scores on val": ("val/accuracy", "val/macro_f1")}
    drawn = {title: {name: series[name] for name in names if name in series} for title, names in wanted.items()}
    return [_chart(title, curves) for title, curves in drawn.items() if curves]


def _chart(title: str, curves: Mapping[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Curves in a box of 420 by 210, of which the drawing takes 46..410 and 12..180."""
    xs, ys = zip(*(point for points in curves.values() for point in points), strict=True)
    low, high, last = min(ys), max(ys), max(*xs, 1)
    span = high - low or 1.0
    placed = {
        name: [(round(46 + 364 * x / last, 1), round(180 - 168 * (y - low) / span, 1)) for x, y in _thinned(points)]
        for name, points in curves.items()
    }
    return {"title": title, "curves": placed, "low": low, "high": low + span, "last": int(last)}


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return points[:: math.ceil(len(points) / _POINTS)]
