"""A drift check: reads the request log, compares it with the reference, and writes the reports."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from sodaops import pages
from sodaops.bundle import layout, reference
from sodaops.config.schema import DriftConfig
from sodaops.drift.evidently_report import save_page
from sodaops.drift.measure import measure_drift
from sodaops.drift.result import DriftResult, to_json_fields
from sodaops.errors import BundleError, DataError, some
from sodaops.io import remote, storage
from sodaops.registry.bundles import bundle_at
from sodaops.request_log.window import Window, read_window
from sodaops.tasks.estimate import METRICS

PAGE, EVIDENTLY, NUMBERS = "drift.html", "evidently.html", "drift.json"


def check_drift(settings: DriftConfig, source: str, log: str) -> DriftResult:
    """Compares a window of the request log with a bundle's reference, and writes reports to ``output_dir``.

    The reports are ``drift.json``, ``drift.html`` and, with enough rows, evidently's ``evidently.html``.

    Args:
        settings: conf/drift.
        source: the bundle: a folder, gs://BUCKET/FOLDER, or REGISTRY@ALIAS.
        log: folder or gs:// of the request log's parts.

    Raises:
        BundleError, RegistryError: no such bundle, or one without a reference.
        DataError: no request in the window.
        StorageError: no such log, or a folder that cannot be written to.
    """
    info, reference_rows = load_reference(source)
    window = read_window(log, settings.last, settings.since, settings.until, settings.max_rows)
    if not len(window.rows):
        raise DataError(_empty_window_message(settings, log, window))
    result, snapshot = measure_drift(settings, info, reference_rows, window)
    _write_reports(settings, result, snapshot)
    return result


def format_result(result: DriftResult) -> str:
    """A table for the terminal."""
    header = f"{'feature':<34}{'verdict':<12}{'p-value':>10}{'distance':>10}{'reference':>10}{'current':>10}"
    lines = [header] if result.features else []
    for feature in result.features:
        verdict = "not logged" if feature.p is None else "DRIFT" if feature.drifted else "no drift"
        numbers = [_number(value) for value in (feature.p, feature.effect, feature.reference, feature.current)]
        lines.append(f"{feature.title:<34}{verdict:<12}" + "".join(f"{number:>10}" for number in numbers))
    for segment in result.segments:
        lines.append(f"segment {segment.title}, {segment.n_texts:,} texts: {segment.verdict}")
    if result.quality.metrics or result.quality.withheld:
        lines.append(f"estimated quality: {result.quality}")
    for bundle_id, other in result.others.items():
        lines.append(f"note: {other['n_rows']:,} requests of bundle {bundle_id} are judged separately: {_other_verdict(other)}")
    if result.skipped:
        lines.append(f"note: {_skipped_parts(result.skipped)}")
    if result.ahead:
        lines.append(f"note: {result.ahead} rows left out: their time is in the future")
    verdict = "DRIFT" if result.drifted else "no drift" if result.judged else "no verdict"
    lines.append(f"{verdict}, {result.n_rows:,} requests of bundle {result.bundle_id}: {result.message}")
    return "\n".join(lines)


def _other_verdict(other: dict[str, Any]) -> str:
    if other["drifted"] is None:
        return "too few for a verdict"
    return f"drift in {', '.join(other['drifted'])}" if other["drifted"] else "length, letters and script like the reference"


def _skipped_parts(skipped: dict[str, str]) -> str:
    parts = [f"{path} ({reason})" for path, reason in skipped.items()]
    return f"parts that could not be read: {len(parts)}: {some(parts, 3)}"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.1e}" if 0 < abs(value) < 0.001 else f"{value:.3g}"


def load_reference(source: str) -> tuple[layout.BundleInfo, reference.Reference]:
    """The info and the drift reference of a bundle.

    Raises:
        BundleError, RegistryError, StorageError: no such bundle, or one without a reference.
    """
    with bundle_at(source, lambda info: [name for name in (layout.DRIFT,) if name in info.files]) as folder:
        info = layout.read_info(folder)
        if layout.DRIFT not in info.files:
            raise BundleError(f"{source}: has no drift reference ({layout.DRIFT}); `sodaops export {source}` adds it.")
        return info, reference.read_reference(folder, info)


def _empty_window_message(settings: DriftConfig, log: str, window: Window) -> str:
    limits = [f"drift.{key}={value}" for key, value in (("since", settings.since), ("until", settings.until)) if value]
    message = f"{log}: no request in the window" + (f" ({', '.join(limits)})" if limits else "")
    if window.skipped:
        message += f"; {_skipped_parts(window.skipped)}"
    if window.ahead:
        message += f"; {window.ahead} rows have a time in the future"
    return f"{message}. The predictor writes a part of the log every serve.part_s seconds."


def _write_reports(settings: DriftConfig, result: DriftResult, snapshot: Any) -> None:
    causes = ", ".join(cause.name for cause in result.causes)
    verdict = f"Drift: {causes}" if result.drifted else "No drift" if result.judged else "No verdict"
    if segments := ", ".join(segment.title for segment in result.segments if segment.drifted):
        verdict += f", {segments}" if causes else f" overall; drift in {segments}"
    page = pages.render_page(
        "drift", d=result, verdict=verdict, alpha=settings.alpha, min_effect=settings.min_effect,
        quality_titles=METRICS,
    )  # fmt: skip
    names = [PAGE, EVIDENTLY, NUMBERS]
    with _locked(settings.output_dir), remote.output_folder(settings.output_dir, names, NUMBERS, private=True) as folder:
        storage.write_json(folder / NUMBERS, to_json_fields(result))
        storage.write_text(folder / PAGE, page)
        if snapshot is not None:
            save_page(snapshot, folder / EVIDENTLY)


@contextlib.contextmanager
def _locked(output_dir: str) -> Iterator[None]:
    """The service and a command may write at the same time. On remote storage each file is whole, and the last writer wins."""
    if remote.is_address(output_dir):
        yield
        return
    path = Path(output_dir).resolve()
    with storage.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.parent / f".{path.name}.lock")
    with lock:
        yield
