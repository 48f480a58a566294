"""The drift service: looks at the request log again and again, and tells over HTTP what it saw last."""

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

from sodaops.drift.check import EVIDENTLY, NUMBERS, PAGE, check
from sodaops.drift.measure import Drift
from sodaops.drift.settings import WatchSettings
from sodaops.errors import DataError, SodaOpsError
from sodaops.io import remote
from sodaops.web.guard import Guard, problem_response
from sodaops.web.log import configure_json_logging
from sodaops.web.metrics import HttpMetrics

log = logging.getLogger("sodaops.drift")
_TYPES = {".html": "text/html", ".json": "application/json"}
_POLICY = {  # our page has no script; evidently's brings its own within the file
    PAGE: "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'",
    EVIDENTLY: "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:; "
    "font-src data:; worker-src blob:; frame-ancestors 'none'",
}


class DriftMetrics(HttpMetrics):
    """What the drift service counts beside its requests; nothing is said of drift before the first verdict."""

    def __init__(self) -> None:
        super().__init__()
        self.detected = Gauge("sodaops_drift_detected", "1 for drift, 0 for none; absent without a verdict.", ("bundle_id",),
                              registry=self.registry)  # fmt: skip
        self.p = Gauge("sodaops_drift_p_value", "Of each feature's test.", ("feature",), registry=self.registry)
        self.effect = Gauge("sodaops_drift_effect", "Distance of each feature.", ("feature",), registry=self.registry)
        self.causes = Gauge("sodaops_drift_cause", "1 for what the drift looks like.", ("cause",), registry=self.registry)
        self.rows = Gauge("sodaops_drift_window_rows", "Requests in the last window.", registry=self.registry)
        self.age = Gauge("sodaops_drift_reference_age_seconds", "Since the reference was made.", registry=self.registry)
        self.when = Gauge("sodaops_drift_last_run_timestamp_seconds", "When it last looked.", registry=self.registry)
        self.runs = Counter("sodaops_drift_runs", "Looks at the log, by how they ended.", ("outcome",), registry=self.registry)

    def show(self, found: Drift | None) -> None:
        """Takes the last verdict over; None: there is none."""
        for gauge in (self.detected, self.p, self.effect, self.causes):
            gauge.clear()
        self.when.set(time.time())
        self.rows.set(found.n_rows if found else 0)
        if found is None:
            return
        self.age.set(86400 * found.reference_age_days)
        if found.judged:
            self.detected.labels(found.bundle_id).set(found.drifted)
        for feature in found.features:
            for gauge, value in ((self.p, feature.p), (self.effect, feature.effect)):
                if value is not None:
                    gauge.labels(feature.name).set(value)
        for cause in found.causes:
            self.causes.labels(cause.name).set(1)


class Watcher:
    """Looks on a schedule and on demand, never twice at once; who asks meanwhile gets the look that is going on."""

    def __init__(self, settings: WatchSettings, metrics: DriftMetrics) -> None:
        self._settings, self._metrics = settings, metrics
        self._going: asyncio.Task[Drift | None] | None = None
        self.found: Drift | None = None
        self.pages: dict[str, bytes] = {}  # of the same look; what is on the disk changes under a request
        self.fault: str | None = "it has not looked yet"

    async def look(self) -> Drift | None:
        """Looks now, or waits for the look that is going on; None: there was nothing to see.

        Raises:
            SodaOpsError: the log or the bundle cannot be read.
        """
        if self._going is None or self._going.done():
            self._going = asyncio.create_task(self._look())
        return await asyncio.shield(self._going)

    async def _look(self) -> Drift | None:
        settings = self._settings
        try:
            self.found, self.pages = await asyncio.to_thread(_checked, settings)
            self.fault, outcome = None, "drift" if self.found.drifted else "no_drift" if self.found.judged else "no_verdict"
        except DataError as error:  # nobody asked anything: no verdict, and no fault of this service
            self.found, self.pages, self.fault, outcome = None, {}, str(error), "no_data"
        except Exception as error:
            self.fault = str(error) if isinstance(error, SodaOpsError) else repr(error)
            self._metrics.detected.clear()  # what was seen before is no verdict of now
            self._metrics.runs.labels("failed").inc()
            raise
        self._metrics.show(self.found)
        self._metrics.runs.labels(outcome).inc()
        log.info(
            "looked", extra={"outcome": outcome, "causes": [cause.name for cause in self.found.causes] if self.found else []}
        )
        return self.found

    async def run(self) -> None:
        """Looks every ``every_s`` until cancelled."""
        while True:
            try:
                await self.look()
            except Exception as error:  # whatever it was, the next look comes
                log.error("look failed", extra={"reason": str(error)})
            await asyncio.sleep(self._settings.every_s)


def _checked(settings: WatchSettings) -> tuple[Drift, dict[str, bytes]]:
    found = check(settings, settings.bundle, settings.request_log)
    pages = {name: remote.read_if_exists(remote.join(settings.output_dir, name)) for name in (PAGE, EVIDENTLY, NUMBERS)}
    return found, {name: content for name, content in pages.items() if content is not None}


def create_drift_app(settings: WatchSettings | None = None) -> FastAPI:
    """The application; `python -m sodaops.drift` runs it.

    Args:
        settings: None reads the environment.

    Raises:
        ConfigError: what is wrong with the settings.
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

    app = FastAPI(title="SoDaOps drift", lifespan=lifespan, docs_url=None, redoc_url=None, telemetry=_NO_TELEMETRY)
    app.state.watcher = watcher
    _routes(app, watcher, metrics)
    paths = {route.path for route in app.routes if hasattr(route, "path")}
    app.add_middleware(
        Guard, metrics=metrics, paths=paths, api_keys=settings.api_keys, admin_keys=settings.admin_keys,
        max_body_bytes=1024, body_s=10.0,
    )  # fmt: skip
    return app


_NO_TELEMETRY: Any = {"logs": False, "metrics": False, "operation_spans": False, "auto_configure": False, "tracing": False}


def _routes(app: FastAPI, watcher: Watcher, metrics: DriftMetrics) -> None:
    def page(name: str) -> Response:
        if name not in watcher.pages:
            raise HTTPException(503, watcher.fault or f"there is no {name}: the window held too few requests")
        headers = {"content-security-policy": _POLICY[name]} if name in _POLICY else None
        return Response(watcher.pages[name], media_type=_TYPES[Path(name).suffix], headers=headers)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return RedirectResponse("report")

    @app.get("/report", summary="The last verdict, for people")
    async def report() -> Response:
        return page(PAGE)

    @app.get("/report/evidently", summary="evidently's own report of it")
    async def evidently_report() -> Response:
        return page(EVIDENTLY)

    @app.get("/drift.json", summary="The last verdict, for programs")
    async def numbers() -> Response:
        return page(NUMBERS)

    @app.post("/look", summary="Look now; the answer is what was seen")
    async def look() -> dict[str, Any]:
        found = await watcher.look()
        if found is None:
            raise HTTPException(503, watcher.fault)
        return {"drifted": found.drifted, "judged": found.judged, "said": found.said, "n_rows": found.n_rows}

    @app.get("/healthz", summary="Whether the process lives, and how its last look ended")
    async def healthz() -> dict[str, str]:
        return {"status": "ok", "last_look": watcher.fault or "ok"}

    @app.get("/metrics", summary="For Prometheus", response_class=Response)
    async def prometheus() -> Response:
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def by_status(request: Request, error: Any) -> Response:
        return problem_response(request.scope, error.status_code, str(error.detail), dict(error.headers or {}))

    async def by_fault(request: Request, error: Any) -> Response:
        return problem_response(request.scope, 503, str(error))

    app.add_exception_handler(AnyHTTPException, by_status)
    app.add_exception_handler(SodaOpsError, by_fault)
