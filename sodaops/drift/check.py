"""One look at the request log: read, measure, write the pages."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from sodaops import pages
from sodaops.bundle import layout, reference
from sodaops.config.schema import DriftConfig
from sodaops.drift.evidently_report import save_page
from sodaops.drift.measure import Drift, as_dict, measure
from sodaops.errors import BundleError, DataError, some
from sodaops.io import remote, storage
from sodaops.registry.bundles import bundle_at
from sodaops.request_log.window import Window, read_window

PAGE, EVIDENTLY, NUMBERS = "drift.html", "evidently.html", "drift.json"


def check(settings: DriftConfig, source: str, log: str) -> Drift:
    """Holds a window of the request log against a bundle's reference, and writes what it finds to ``output_dir``.

    ``drift.json`` and ``drift.html`` are ours; ``evidently.html`` is evidently's, where there were rows enough.

    Args:
        settings: conf/drift.
        source: the bundle: a folder, gs://BUCKET/FOLDER, or REGISTRY@ALIAS.
        log: folder or gs:// of the request log's parts.

    Raises:
        BundleError, RegistryError: no such bundle, or one without a reference.
        DataError: no request in the window.
        StorageError: no such log, or a folder that cannot be written to.
    """
    info, found = reference_of(source)
    window = read_window(log, settings.last, settings.since, settings.until, settings.max_rows)
    if not len(window.rows):
        raise DataError(_nothing(settings, log, window))
    drift, snapshot = measure(settings, info, found, window)
    _write(settings, drift, snapshot)
    return drift


def describe(found: Drift) -> str:
    """A table for the terminal."""
    lines = [f"{'feature':<34}{'verdict':<12}{'p-value':>10}{'distance':>10}{'before':>10}{'now':>10}"]
    for f in found.features:
        verdict = "not logged" if f.p is None else "DRIFT" if f.drifted else "holds"
        numbers = [_number(f.p), _number(f.effect), _number(f.before), _number(f.now)]
        lines.append(f"{f.title:<34}{verdict:<12}" + "".join(f"{number:>10}" for number in numbers))
    for bundle_id, other in found.others.items():
        lines.append(f"note: {other['n_rows']:,} requests of bundle {bundle_id} are judged apart: {_apart(other)}")
    if found.skipped:
        parts = "part" if len(found.skipped) == 1 else "parts"
        lines.append(
            f"note: {len(found.skipped)} {parts} left out: {some([f'{k} ({v})' for k, v in found.skipped.items()], 3)}"
        )
    if found.ahead:
        lines.append(
            f"note: left out, since a clock is ahead: {found.ahead} {'row' if found.ahead == 1 else 'rows'} of the future"
        )
    verdict = "DRIFT" if found.drifted else "no drift" if found.judged else "no verdict"
    lines.append(f"{verdict}, {found.n_rows:,} requests of bundle {found.bundle_id}: {found.said}")
    return "\n".join(lines if found.features else lines[1:])


def _apart(other: dict[str, Any]) -> str:
    if other["drifted"] is None:
        return "too few for a verdict"
    return f"drift in {', '.join(other['drifted'])}" if other["drifted"] else "length, letters and script as the reference"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.1e}" if 0 < abs(value) < 0.001 else f"{value:.3g}"


def reference_of(source: str) -> tuple[layout.BundleInfo, reference.Reference]:
    """A bundle's account of itself, and its reference.

    Raises:
        BundleError, RegistryError, StorageError: no such bundle, or one without a reference.
    """
    with bundle_at(source, lambda info: [name for name in (layout.DRIFT,) if name in info.files]) as folder:
        info = layout.read_info(folder)
        if layout.DRIFT not in info.files:
            raise BundleError(f"{source}: holds no reference for drift; `sodaops export` adds it to a bundle.")
        return info, reference.read_reference(folder, info)


def _nothing(settings: DriftConfig, log: str, window: Window) -> str:
    span = [f"drift.{key}={value}" for key, value in (("since", settings.since), ("until", settings.until)) if value]
    said = f"{log}: no request in the window" + (f" ({', '.join(span)})" if span else "")
    if window.skipped:
        said += f"; parts that could not be read: {some([f'{k} ({v})' for k, v in window.skipped.items()], 3)}"
    if window.ahead:
        said += f"; rows of the future: {window.ahead}"
    return f"{said}. Requests come into it a part at a time, every serve.part_s seconds."


def _write(settings: DriftConfig, found: Drift, snapshot: Any) -> None:
    causes = ", ".join(cause.name for cause in found.causes)
    verdict = f"Drift: {causes}" if found.drifted else "No drift" if found.judged else "No verdict"
    page = pages.render_page("drift", d=found, verdict=verdict, alpha=settings.alpha, min_effect=settings.min_effect)
    names = [PAGE, EVIDENTLY, NUMBERS]
    with _alone(settings.output_dir), remote.output_folder(settings.output_dir, names, NUMBERS, private=True) as folder:
        storage.write_json(folder / NUMBERS, as_dict(found))
        storage.write_text(folder / PAGE, page)
        if snapshot is not None:
            save_page(snapshot, folder / EVIDENTLY)


@contextlib.contextmanager
def _alone(output_dir: str) -> Iterator[None]:
    """The service and somebody's own look may write at once; afar each of the files is whole, and the last one wins."""
    if remote.is_address(output_dir):
        yield
        return
    path = Path(output_dir).resolve()
    with storage.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.parent / f".{path.name}.lock")
    with lock:
        yield
