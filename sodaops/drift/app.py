"""The drift service: checks the request log at intervals, and serves the last result over HTTP."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import RedirectResponse
from prometheus_client import Counter, Gauge
from starlette.exceptions import HTTPException as AnyHTTPException

from sodaops.drift.check import EVIDENTLY, NUMBERS, PAGE, check_drift
from sodaops.drift.result import DriftResult
from sodaops.drift.settings import WatchSettings
from sodaops.errors import DataError, SodaOpsError
from sodaops.io import remote
from sodaops.web.guard import Access, guard, problem_response
from sodaops.web.log import configure_json_logging
from sodaops.web.metrics import HttpMetrics
from sodaops.web.policy import hash_source, inline_hashes

log = logging.getLogger(__name__)
MAX_BODY_BYTES = 1024
_TYPES = {".html": "text/html", ".json": "application/json"}
_NO_TELEMETRY: Any = {"logs": False, "metrics": False, "operation_spans": False, "auto_configure": False, "tracing": False}
# Styles that plotly adds by script: an empty element, which it then fills, and that of its logo.
_PLOTLY_STYLES = (
    "",
    "".join(f"  .cls-{i}{{fill:#{c};}}" for i, c in enumerate(("000", "FFF", "F26", "D69", "BAC", "9EF"))) + " ",
)


class DriftMetrics(HttpMetrics):
    """Metrics of the drift service. Those of a result are absent until there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.detected = Gauge("sodaops_drift_detected", "1 for drift, 0 for none; absent without a verdict.", ("bundle_id",),
                              registry=self.registry)  # fmt: skip
        self.p = Gauge("sodaops_drift_p_value", "p-value of each feature.", ("feature",), registry=self.registry)
        self.effect = Gauge("sodaops_drift_effect", "Distance of each feature.", ("feature",), registry=self.registry)
        self.causes = Gauge("sodaops_drift_cause", "1 for each cause of the drift.", ("cause",), registry=self.registry)
        self.segments = Gauge("sodaops_drift_segment_detected", "1 for drift in a segment, 0 for none; absent unless judged.",
                              ("column", "value"), registry=self.registry)  # fmt: skip
        self.quality = Gauge("sodaops_quality", "Quality estimated without labels: value, low and high; absent if withheld.",
                             ("metric", "bound"), registry=self.registry)  # fmt: skip
        self.withheld = Gauge("sodaops_quality_withheld", "1 for the reason.", ("reason",), registry=self.registry)
        self.rows = Gauge("sodaops_drift_window_rows", "Requests in the last window.", registry=self.registry)
        self.age = Gauge("sodaops_drift_reference_age_seconds", "Age of the reference.", registry=self.registry)
        self.when = Gauge("sodaops_drift_last_run_timestamp_seconds", "Time of the last check.", registry=self.registry)
        self.runs = Counter("sodaops_drift_runs", "Checks of the log, by outcome.", ("outcome",), registry=self.registry)

    def update(self, result: DriftResult | None) -> None:
        """Sets the gauges to the last result; ``None`` means that the window was empty."""
        for gauge in (self.detected, self.p, self.effect, self.causes, self.segments, self.quality, self.withheld):
            gauge.clear()
        self.when.set(time.time())
        self.rows.set(result.n_rows if result else 0)
        if result is None:
            return
        self.age.set(86400 * result.reference_age_days)
        if result.judged:
            self.detected.labels(result.bundle_id).set(result.drifted)
        for feature in result.features:
            for gauge, value in ((self.p, feature.p), (self.effect, feature.effect)):
                if value is not None:
                    gauge.labels(feature.name).set(value)
        for cause in result.causes:
            self.causes.labels(cause.name).set(1)
        for segment in result.segments:
            if segment.drifted is not None:
                self.segments.labels(segment.column, segment.value).set(segment.drifted)
        for name, metric in result.quality.metrics.items():
            for bound, value in vars(metric).items():
                self.quality.labels(name, bound).set(value)
        if result.quality.withheld:
            self.withheld.labels(result.quality.withheld).set(1)


class Watcher:
    """Checks for drift at intervals and on demand, one check at a time: a call during a check gets that check's result.

    Attributes:
        result: of the last check; None before the first check, or if the window was empty.
        pages: the reports of that check, by file name. They are kept in memory, since the files may change during a request.
        policies: the Content-Security-Policy of each page.
        problem: why there is no current result; None after a successful check.
    """

    def __init__(self, settings: WatchSettings, metrics: DriftMetrics) -> None:
        self._settings, self._metrics = settings, metrics
        self._running: asyncio.Task[DriftResult | None] | None = None
        self.result: DriftResult | None = None
        self.pages: dict[str, bytes] = {}
        self.policies: dict[str, str] = {}
        self.problem: str | None = "no check has run yet"

    async def check(self) -> DriftResult | None:
        """Runs a check, or waits for the one that is running; returns None if the window was empty.

        Raises:
            SodaOpsError: the log or the bundle cannot be read.
        """
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._check())
        return await asyncio.shield(self._running)

    async def _check(self) -> DriftResult | None:
        try:
            result, self.pages, self.policies = await asyncio.to_thread(_run_check, self._settings)
            outcome = "drift" if result.drifted else "no_drift" if result.judged else "no_verdict"
            self.result, self.problem = result, None
        except DataError as error:  # an empty window is not an error of this service
            self.result, self.pages, self.problem, outcome = None, {}, str(error), "no_data"
        except Exception as error:
            self.problem = str(error) if isinstance(error, SodaOpsError) else repr(error)
            of = self._metrics
            for gauge in (of.detected, of.segments, of.quality, of.withheld):
                gauge.clear()  # the previous verdict is outdated
            self._metrics.runs.labels("failed").inc()
            raise
        self._metrics.update(self.result)
        self._metrics.runs.labels(outcome).inc()
        causes = [cause.name for cause in self.result.causes] if self.result else []
        log.info("drift check", extra={"outcome": outcome, "causes": causes})
        return self.result

    async def run(self) -> None:
        """Checks every ``every_s`` seconds until cancelled."""
        while True:
            try:
                await self.check()
            except Exception as error:  # logged only: the next check may succeed
                log.error("drift check failed", extra={"reason": str(error)})
            await asyncio.sleep(self._settings.every_s)


def _run_check(settings: WatchSettings) -> tuple[DriftResult, dict[str, bytes], dict[str, str]]:
    result = check_drift(settings, settings.bundle, settings.request_log)
    found = {name: remote.read_if_exists(remote.join(settings.output_dir, name)) for name in (PAGE, EVIDENTLY, NUMBERS)}
    pages = {name: content for name, content in found.items() if content is not None}
    return result, pages, {name: _policy(name, content.decode()) for name, content in pages.items() if name != NUMBERS}


def _policy(name: str, html: str) -> str:
    """The Content-Security-Policy of a report; only what stands in its head, where no text of users is, gets a hash."""
    styles = " ".join(inline_hashes(html.partition("<body")[0], "style"))
    if name == PAGE:
        return f"default-src 'none'; style-src {styles}; img-src data:; base-uri 'none'; frame-ancestors 'none'"
    # evidently's own scripts draw its page, which has no texts; the sandbox keeps it from the rest of the service
    styles = " ".join([styles, *map(hash_source, _PLOTLY_STYLES)])
    return (
        f"sandbox allow-scripts; default-src 'none'; script-src {' '.join(inline_hashes(html, 'script'))} 'unsafe-eval'; "
        f"style-src {styles}; img-src data: blob:; font-src data:; worker-src blob:; base-uri 'none'; frame-ancestors 'none'"
    )


def create_drift_app(settings: WatchSettings | None = None) -> FastAPI:
    """The application; `python -m sodaops.drift` runs it.

    Args:
        settings: None reads them from the environment.

    Raises:
        ConfigError: a setting is missing or not allowed.
    """
    configure_json_logging()
    settings = settings or WatchSettings()
    metrics = DriftMetrics()
    watcher = Watcher(settings, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(watcher.run())
        yield
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    app = FastAPI(
        title="SoDaOps drift", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False,
        telemetry=_NO_TELEMETRY,
    )  # fmt: skip
    app.state.watcher = watcher
    _routes(app, watcher, metrics)
    guard(app, metrics, Access(settings.api_keys, settings.admin_keys, settings.allowed_hosts), MAX_BODY_BYTES, body_s=10.0)
    return app


def _routes(app: FastAPI, watcher: Watcher, metrics: DriftMetrics) -> None:
    def page(name: str) -> Response:
        if name not in watcher.pages:
            raise HTTPException(503, watcher.problem or f"no {name}: too few requests in the window")
        headers = {"content-security-policy": watcher.policies[name]} if name in watcher.policies else None
        return Response(watcher.pages[name], media_type=_TYPES[Path(name).suffix], headers=headers)

    @app.get("/", include_in_schema=False)
    async def index(request: Request) -> Response:
        return RedirectResponse(f"{request.scope['root_path']}/report")

    @app.get("/report", summary="The last result as a page")
    async def report() -> Response:
        return page(PAGE)

    @app.get("/report/evidently", summary="evidently's report")
    async def evidently_report() -> Response:
        return page(EVIDENTLY)

    @app.get("/drift.json", summary="The last result as JSON")
    async def numbers() -> Response:
        return page(NUMBERS)

    @app.post("/look", summary="Check now, and return the result")
    async def look() -> dict[str, Any]:
        result = await watcher.check()
        if result is None:
            raise HTTPException(503, watcher.problem)
        return {"drifted": result.drifted, "judged": result.judged, "said": result.message, "n_rows": result.n_rows}

    @app.get("/healthz", summary="Whether the process is alive, and how its last check ended")
    async def healthz() -> dict[str, str]:
        return {"status": "ok", "last_look": watcher.problem or "ok"}

    @app.get("/metrics", summary="Metrics for Prometheus", response_class=Response)
    async def prometheus() -> Response:
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def http_error(request: Request, error: Any) -> Response:
        return problem_response(request.scope, error.status_code, str(error.detail), dict(error.headers or {}))

    async def user_error(request: Request, error: Any) -> Response:
        return problem_response(request.scope, 503, str(error))

    app.add_exception_handler(AnyHTTPException, http_error)
    app.add_exception_handler(SodaOpsError, user_error)
