"""Routes of the predictor: ``sodaops serve``, or ``python -m sodaops.serving``."""

import contextlib
import logging
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import numpy as np
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from pydantic_core import to_json
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.routing import Route
from starlette.types import Receive

from sodaops.errors import BundleError, SodaOpsError
from sodaops.serving import openapi, schemas, v2
from sodaops.serving.abstention import PLAIN, Asked
from sodaops.serving.batcher import EmptyText, QueueFull, WorkerDied
from sodaops.serving.canary import CANARY_HEADER
from sodaops.serving.metrics import Metrics
from sodaops.serving.pages import add_pages
from sodaops.serving.service import ClientDisconnected, DeadlineExceeded, Service
from sodaops.serving.settings import ServeSettings
from sodaops.serving.shadow import add_shadow
from sodaops.text.columns import join
from sodaops.web.guard import Access, guard, problem_response, route_path
from sodaops.web.keys import client_of
from sodaops.web.log import configure_json_logging
from sodaops.web.traces import telemetry_config

_HINT = (
    "Set SODAOPS_BUNDLE to the bundle to serve: a folder, gs://BUCKET/FOLDER or REGISTRY@ALIAS. In a container, mount the "
    "folder: -v RUN/bundle:/bundle:ro."
)
log = logging.getLogger(__name__)


def create_app(settings: ServeSettings | None = None) -> FastAPI:
    """Creates the application, with its bundle loaded and warmed up.

    Args:
        settings: None: read from environment variables.

    Raises:
        SystemExit: 2, after printing what is wrong with the settings or the bundle.
    """
    configure_json_logging()
    settings, service, traces = _load(settings)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        info = service.models.current.info
        log.info("ready", extra={"bundle_id": info.bundle_id, "variant": service.models.current.variant})
        async with service.running():
            yield
        if "tracer_provider" in traces:
            traces["tracer_provider"].shutdown()  # sends the remaining spans
        log.info("stopped")

    app = FastAPI(
        title="SoDaOps", lifespan=lifespan, docs_url=None, redoc_url=None, swagger_ui_oauth2_redirect_url=None,
        redirect_slashes=False, telemetry=traces,
    )  # fmt: skip
    app.state.service = service
    text_request, explanation_request, batch_request = schemas.request_models(service.models.current.info.text_columns)
    _add_predictions(app, service, text_request, batch_request)
    _add_explanations(app, service, explanation_request)
    _add_operations(app, service)
    if service.shadow:
        add_shadow(app, service.shadow)
    add_pages(app, service.models.current.info.text_columns)
    _add_error_handlers(app, service.metrics)
    access = Access(settings.api_keys, settings.admin_keys, settings.allowed_hosts, settings.cors_origins)
    guard(app, service.metrics, access, settings.max_body_bytes, settings.deadline_s)
    if settings.cors_origins:  # outermost: a browser's preflight request has no key
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    # as FastAPI's docs do
    app.openapi = lambda: openapi.schema(app, settings, service.models.current)  # type: ignore[method-assign]
    return app


def _load(settings: ServeSettings | None) -> tuple[ServeSettings, Service, Any]:
    try:
        settings, traces = settings or ServeSettings(), telemetry_config()
        provider = traces.get("tracer_provider")
        return settings, Service(settings, provider.get_tracer("sodaops") if provider else None), traces
    except SodaOpsError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        if isinstance(error, BundleError):
            print(_HINT, file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def _add_predictions(app: FastAPI, service: Service, text_request: Any, batch_request: Any) -> None:
    settings, columns = service.settings, service.models.current.info.text_columns

    async def predict_texts(
        request: Request, texts: list[str], asked: Asked = PLAIN
    ) -> tuple[list[dict[str, Any]], dict[str, str]]:
        _check_sizes(texts, settings)
        state = request.state
        is_fixed = "version" in request.path_params  # the client names the bundle in use
        key = None if is_fixed else request.headers.get(CANARY_HEADER, state.request_id)
        disconnection = _disconnection(request.receive)
        predictions, info = await service.predict(texts, state.request_id, disconnection, state.began, key, asked)
        return predictions, {"bundle_version": info.bundle_id, "request_id": state.request_id}

    async def predict_text(request: Request, text: str, asked: Asked = PLAIN) -> Response:
        (prediction,), ids = await predict_texts(request, [text], asked)
        return _json({**prediction, **ids})

    @app.get(
        "/predict", tags=["predict"], summary="Classify one text", response_model=schemas.TextResponse,
        openapi_extra={"parameters": schemas.query(columns)},
    )  # fmt: skip
    async def predict_get(request: Request) -> Response:
        items = request.query_params.multi_items()  # parsing by FastAPI would take a fifth of the request's time
        if len(columns) > 1:
            if sorted(name for name, _ in items) != sorted(columns):
                raise HTTPException(422, f"expected the query parameters {', '.join(columns)}, each once")
            return await predict_text(request, join([dict(items)[name] for name in columns]))
        if len(items) != 1 or items[0][0] not in ("text", "review"):
            raise HTTPException(422, "expected exactly one query parameter, text or review")
        return await predict_text(request, items[0][1])

    @app.post("/predict", tags=["predict"], summary="Classify one text", response_model=schemas.TextResponse)
    async def predict(request: Request, body: text_request) -> Response:
        return await predict_text(request, _read(service, body, columns)[0], Asked(body.abstain, body.sets))

    @app.post("/predict/batch", tags=["predict"], summary="Classify several texts", response_model=schemas.BatchResponse)
    async def predict_batch(request: Request, body: batch_request) -> Response:
        predictions, ids = await predict_texts(request, _read(service, body, columns), Asked(body.abstain, body.sets))
        return _json({"predictions": predictions, **ids})

    v2.add_routes(app, service, predict_texts)


def _add_explanations(app: FastAPI, service: Service, explanation_request: Any) -> None:
    settings, columns = service.settings, service.models.current.info.text_columns

    @app.post(
        "/explain", tags=["predict"], summary="Classify one text, and show the effect of its pieces",
        response_model=schemas.Explanation,
    )  # fmt: skip
    async def explain(request: Request, body: explanation_request) -> Response:
        (raw,) = texts = _read(service, body, columns)
        _check_sizes(texts, settings)
        state = request.state
        disconnection, key = _disconnection(request.receive), request.headers.get(CANARY_HEADER, state.request_id)
        prediction, spans, info = await service.explain(raw, body.label, state.request_id, disconnection, state.began, key)
        return _json({**prediction, "bundle_version": info.bundle_id, "request_id": state.request_id, "spans": spans})

    @app.post("/feedback", tags=["predict"], summary="Correct or confirm a prediction")
    async def feedback(request: Request, body: schemas.FeedbackRequest) -> schemas.FeedbackResponse:
        client = client_of(request.client.host) if request.client else ""
        await service.store_feedback(body.request_id, body.place, body.label, client)
        return schemas.FeedbackResponse(noted=True)


def _add_operations(app: FastAPI, service: Service) -> None:
    models = service.models

    @app.get("/healthz", tags=["operate"], summary="Whether the process is alive")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", tags=["operate"], summary="Whether it can answer, and with which bundle")
    async def readyz() -> schemas.Readiness:
        service.batcher.check_workers()
        return schemas.Readiness(ready=True, bundle_version=models.current.info.bundle_id)

    @app.get("/metrics", tags=["operate"], summary="Metrics for Prometheus", response_class=Response)
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/info", tags=["operate"], summary="The model card")
    async def info() -> schemas.ModelCard:
        bundle_info, latencies = models.current.info, list(service.latencies_ms)
        p50, p95 = np.quantile(latencies, (0.5, 0.95)).tolist() if latencies else (None, None)
        shared = {name: getattr(bundle_info, name) for name in schemas.ModelCard.model_fields if hasattr(bundle_info, name)}
        return schemas.ModelCard(
            **shared,
            bundle_version=bundle_info.bundle_id,
            variant=models.current.variant,
            previous=models.previous.info.bundle_id if models.previous else None,
            recent=schemas.RecentLatency(n_requests=len(latencies), p50_ms=p50, p95_ms=p95),
            max_chars=service.settings.max_chars,
            max_texts=service.settings.max_request_texts,
        )

    @app.post("/admin/reload", tags=["admin"], summary="Load a new bundle now, even one that was rolled back")
    async def reload() -> schemas.BundleChange:
        changed = await models.reload(force=True)
        if service.shadow:
            with contextlib.suppress(SodaOpsError):  # which is logged; the old challenger stays
                await service.shadow.challenger.reload(force=True)
        return schemas.BundleChange(changed=changed, bundle_version=models.current.info.bundle_id)

    @app.post("/admin/rollback", tags=["admin"], summary="Switch back to the previous bundle")
    async def rollback() -> schemas.BundleChange:
        await models.roll_back()
        return schemas.BundleChange(changed=True, bundle_version=models.current.info.bundle_id)


def _read(service: Service, body: Any, columns: Sequence[str]) -> list[str]:
    """The raw texts of a valid request, whose context is kept for the request log."""
    service.contexts.keep(body.context, service.models.current.info.slice_columns)
    texts = body.texts if hasattr(body, "texts") else [body.text]
    return texts if len(columns) == 1 else [join([text[name] for name in columns]) for text in texts]


def _json(body: dict[str, Any]) -> Response:
    """A response that FastAPI does not validate, which would take a tenth of the request's time."""
    return Response(to_json(body), media_type="application/json")


def _check_sizes(texts: list[str], settings: ServeSettings) -> None:
    if len(texts) > settings.max_request_texts:
        raise HTTPException(422, f"{len(texts)} texts; a request may have at most {settings.max_request_texts}")
    for place, text in enumerate(texts):
        if len(text) > settings.max_chars:
            raise HTTPException(422, f"text {place + 1} has {len(text)} characters; the limit is {settings.max_chars}")


def _disconnection(receive: Receive) -> Callable[[], Awaitable[None]]:
    """A function that returns when the client disconnects."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            continue

    return disconnected


def _add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    """Turns exceptions into problem responses, none of which quotes a text."""

    def handle(
        kind: type[Exception], explain: Callable[[Any], tuple[int, str]], headers: Callable[[Any], dict] | None = None
    ) -> None:
        async def handler(request: Request, error: Exception) -> Response:
            if kind is QueueFull:
                metrics.refused.inc()
            return problem_response(request.scope, *explain(error), headers(error) if headers else None)

        app.add_exception_handler(kind, handler)

    async def by_status(request: Request, error: Any) -> Response:
        headers = dict(error.headers or {})
        if error.status_code == 405:  # the router lists only the methods of the first route with this path
            path, routes = route_path(request.scope), [route for route in app.routes if isinstance(route, Route)]
            allowed = [route.methods or set() for route in routes if route.path_regex.match(path)]
            headers = {"allow": ", ".join(sorted(set().union(*allowed)))}
        return problem_response(request.scope, error.status_code, str(error.detail), headers)

    app.add_exception_handler(AnyHTTPException, by_status)
    handle(RequestValidationError, lambda e: (422, schemas.faults(e.errors())))
    handle(EmptyText, lambda e: (422, f"text {e.place + 1} is empty after cleaning, or has no tokens; send a text with words"))
    handle(WorkerDied, lambda e: (503, "a worker thread has ended; restart this process"))
    handle(QueueFull, lambda e: (429, "the queue is full; try again later"), lambda e: {"retry-after": str(e.retry_after_s)})
    handle(DeadlineExceeded, lambda e: (504, "no answer within the deadline; try again later"))
    handle(ClientDisconnected, lambda e: (499, "the client disconnected"))
    handle(SodaOpsError, lambda e: (409, str(e)))
