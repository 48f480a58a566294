"""The routes: ``uvicorn sodaops.serving.app:create_app --factory``, or ``sodaops serve``."""

import contextlib
import logging
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from http import HTTPStatus
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse
from fastapi_swagger import patch_fastapi
from pydantic_core import to_json
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.types import Receive

from sodaops.errors import BundleError, SodaOpsError
from sodaops.serving import schemas
from sodaops.serving.batcher import EmptyText, QueueFull, WorkerDied
from sodaops.serving.metrics import Metrics
from sodaops.serving.service import ClientDisconnected, DeadlineExceeded, Service
from sodaops.serving.settings import ServeSettings
from sodaops.web.guard import OPEN, Guard, problem_response, route_path
from sodaops.web.log import configure_json_logging
from sodaops.web.traces import telemetry_config

_PAGE = Path(__file__).parent / "page.html"
_REFUSALS = (400, 401, 403, 408, 409, 413, 422, 429, 500, 503, 504)
_GIVE = (
    "SODAOPS_BUNDLE says which bundle to serve: a folder, gs://BUCKET/FOLDER or REGISTRY@ALIAS. In a container a folder must "
    "be mounted: -v RUN/bundle:/bundle:ro."
)
log = logging.getLogger("sodaops.serving")


def create_app(settings: ServeSettings | None = None) -> FastAPI:
    """The application, its bundle loaded and warmed up.

    Args:
        settings: None reads the environment.

    Raises:
        SystemExit: 2, after saying what is wrong with the settings or the bundle.
    """
    configure_json_logging()
    try:
        settings = settings or ServeSettings()
        service = Service(settings)
        traces = telemetry_config()
    except SodaOpsError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        if isinstance(error, BundleError):
            print(_GIVE, file=sys.stderr)
        raise SystemExit(error.exit_code) from None

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        info = service.models.current.info
        log.info("ready", extra={"bundle_id": info.bundle_id, "variant": service.models.current.variant})
        async with service.running():
            yield
        if "tracer_provider" in traces:
            traces["tracer_provider"].shutdown()  # type: ignore[union-attr]  # the SDK's own; sends what is left
        log.info("stopped")

    app = FastAPI(
        title="SoDaOps", lifespan=lifespan, docs_url=None, redoc_url=None, swagger_ui_oauth2_redirect_url=None,
        telemetry=traces,
    )  # fmt: skip
    app.state.service = service
    _predictions(app, service)
    _operations(app, service)
    _pages(app)
    _refusals(app, service.metrics)
    paths = {route.path for route in app.routes if hasattr(route, "path")}
    app.add_middleware(
        Guard, metrics=service.metrics, paths=paths, api_keys=settings.api_keys, admin_keys=settings.admin_keys,
        max_body_bytes=settings.max_body_bytes, body_s=settings.deadline_s,
    )  # fmt: skip
    if settings.cors_origins:  # outermost: a browser's question before a call brings no key
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    app.openapi = lambda: _openapi(app, bool(settings.api_keys))  # type: ignore[method-assign]  # as FastAPI's docs do
    return app


def _predictions(app: FastAPI, service: Service) -> None:
    settings = service.settings

    async def answers(request: Request, texts: list[str]) -> tuple[list[dict[str, Any]], dict[str, str]]:
        _check_sizes(texts, settings)
        state = request.state
        found = await service.answer(texts, state.request_id, _leaving(request.receive), state.began)
        return [vars(p) for p in found.predictions], {"bundle_version": found.info.bundle_id, "request_id": state.request_id}

    async def one(request: Request, text: str) -> Response:
        (answer,), rest = await answers(request, [text])
        return _json({**answer, **rest})

    @app.get(
        "/predict", tags=["predict"], summary="Answer one text", response_model=schemas.TextAnswer,
        openapi_extra={"parameters": schemas.QUERY},
    )  # fmt: skip
    async def predict_get(request: Request) -> Response:
        given = request.query_params.multi_items()  # FastAPI's own reading of these takes a fifth of the request's time
        if len(given) != 1 or given[0][0] not in ("text", "review"):
            raise HTTPException(422, "give text once, or review in its place, and nothing else")
        return await one(request, given[0][1])

    @app.post("/predict", tags=["predict"], summary="Answer one text", response_model=schemas.TextAnswer)
    async def predict(request: Request, body: schemas.TextRequest) -> Response:
        return await one(request, body.text)

    @app.post("/predict/batch", tags=["predict"], summary="Answer several texts", response_model=schemas.BatchAnswer)
    async def predict_batch(request: Request, body: schemas.BatchRequest) -> Response:
        predictions, rest = await answers(request, body.texts)
        return _json({"predictions": predictions, **rest})

    @app.post("/explain", tags=["predict"], summary="Answer one text, and say which pieces of it mattered")
    async def explain(request: Request, body: schemas.TextRequest) -> schemas.Explanation:
        _check_sizes([body.text], settings)
        state = request.state
        answer, pieces, info = await service.explain(body.text, state.request_id, _leaving(request.receive), state.began)
        spans = [schemas.Span(text=text, effect=effect) for text, effect in pieces]
        ids = {"bundle_version": info.bundle_id, "request_id": request.state.request_id}
        return schemas.Explanation(label=answer.label, score=answer.score, probs=answer.probs, spans=spans, **ids)

    @app.post("/feedback", tags=["predict"], summary="Say what an answer should have been")
    async def feedback(body: schemas.FeedbackRequest) -> schemas.Noted:
        if body.label not in service.models.current.info.labels:
            labels = ", ".join(service.models.current.info.labels)
            raise HTTPException(422, f"label: the bundle has no such label; it has {labels}")
        await service.note_feedback(body.request_id, body.place, body.label)
        return schemas.Noted(noted=True)


def _operations(app: FastAPI, service: Service) -> None:
    models = service.models

    @app.get("/healthz", tags=["operate"], summary="Whether the process lives")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", tags=["operate"], summary="Whether it answers, and with which bundle")
    async def readyz() -> schemas.Ready:
        service.batcher.check()
        return schemas.Ready(ready=True, bundle_version=models.current.info.bundle_id)

    @app.get("/metrics", tags=["operate"], summary="For Prometheus", response_class=Response)
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/info", tags=["operate"], summary="The model card")
    async def info() -> schemas.Info:
        found, latencies = models.current.info, list(service.latencies_ms)
        p50, p95 = np.quantile(latencies, (0.5, 0.95)).tolist() if latencies else (None, None)
        same = {name: getattr(found, name) for name in schemas.Info.model_fields if hasattr(found, name)}
        return schemas.Info(
            **same,
            bundle_version=found.bundle_id,
            variant=models.current.variant,
            previous=models.previous.info.bundle_id if models.previous else None,
            recent=schemas.Recent(n_requests=len(latencies), p50_ms=p50, p95_ms=p95),
            max_chars=service.settings.max_chars,
            max_texts=service.settings.texts_of_a_request,
        )

    @app.post("/admin/reload", tags=["admin"], summary="Look for a new bundle now, a refused one too")
    async def reload() -> schemas.Changed:
        changed = await models.reload(anyway=True)
        return schemas.Changed(changed=changed, bundle_version=models.current.info.bundle_id)

    @app.post("/admin/rollback", tags=["admin"], summary="Let the bundle before answer again")
    async def rollback() -> schemas.Changed:
        await models.roll_back()
        return schemas.Changed(changed=True, bundle_version=models.current.info.bundle_id)


def _pages(app: FastAPI) -> None:
    patch_fastapi(app, redirect_from_root_to_docs=False)
    page = _PAGE.read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page)


def _json(body: dict[str, Any]) -> Response:
    """A response as it stands: FastAPI would check it against the schema first, at a tenth of the request's time."""
    return Response(to_json(body), media_type="application/json")


def _check_sizes(texts: list[str], settings: ServeSettings) -> None:
    if len(texts) > settings.texts_of_a_request:
        raise HTTPException(422, f"{len(texts)} texts; at most {settings.texts_of_a_request} go into a request")
    for place, text in enumerate(texts):
        if len(text) > settings.max_chars:
            raise HTTPException(422, f"text {place + 1} has {len(text)} characters; at most {settings.max_chars} are read")


def _leaving(receive: Receive) -> Callable[[], Awaitable[None]]:
    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            continue

    return gone


def _refusals(app: FastAPI, metrics: Metrics) -> None:
    """Every refusal is a problem with a detail that a person can act on; none quotes a text."""

    def refuse(
        kind: type[Exception], explain: Callable[[Any], tuple[int, str]], headers: Callable[[Any], dict] | None = None
    ) -> None:
        async def handler(request: Request, error: Exception) -> Response:
            if kind is QueueFull:
                metrics.refused.inc()
            return problem_response(request.scope, *explain(error), headers(error) if headers else None)

        app.add_exception_handler(kind, handler)

    async def by_status(request: Request, error: Any) -> Response:
        headers = dict(error.headers or {})
        if error.status_code == 405:  # the router names the methods of the first route with this path alone
            routes: list[Any] = [route for route in app.routes if getattr(route, "path", None) == route_path(request.scope)]
            allowed = [route.methods for route in routes]
            headers = {"allow": ", ".join(sorted(set().union(*allowed)))}
        return problem_response(request.scope, error.status_code, str(error.detail), headers)

    app.add_exception_handler(AnyHTTPException, by_status)
    refuse(RequestValidationError, lambda e: (422, "; ".join(f"{_place(d['loc'])}: {d['msg']}" for d in e.errors()[:5])))
    refuse(EmptyText, lambda e: (422, f"text {e.place + 1} is empty after cleaning; give one with words"))
    refuse(WorkerDied, lambda e: (503, "the threads that compute have ended; this process must be started anew"))
    refuse(QueueFull, lambda e: (429, "too many texts wait; try again later"), lambda e: {"retry-after": str(e.retry_after_s)})
    refuse(DeadlineExceeded, lambda e: (504, "no answer before the deadline; try again later"))
    refuse(ClientDisconnected, lambda e: (499, "the client went away"))
    refuse(SodaOpsError, lambda e: (409, str(e)))


def _place(loc: tuple[Any, ...]) -> str:
    return ".".join(str(part)[:40] for part in loc)


def _openapi(app: FastAPI, keyed: bool) -> dict[str, Any]:
    """The schema, with the refusals that any route may give, and the two ways to send a key."""
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title, version=version("sodaops"), description="Text classification from a bundle.", routes=app.routes
        )
        parts = schema.setdefault("components", {})
        parts.setdefault("schemas", {})["Problem"] = schemas.Problem.model_json_schema()
        parts["securitySchemes"] = {
            "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            "bearer": {"type": "http", "scheme": "bearer"},
        }
        content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
        for path, operations in schema["paths"].items():
            for operation in operations.values():
                if path.startswith("/admin/") or (keyed and path not in OPEN):
                    operation["security"] = [{"key": []}, {"bearer": []}]
                for status in _REFUSALS:
                    described = {"description": HTTPStatus(status).phrase, "content": content}
                    operation["responses"][str(status)] = described
        app.openapi_schema = schema
    return app.openapi_schema
