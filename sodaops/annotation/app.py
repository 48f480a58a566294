"""The annotation service: the page on which people label texts, and its three routes."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, ConfigDict, Field, SecretStr
from starlette.exceptions import HTTPException

from sodaops.annotation.store import Store
from sodaops.annotation.tasks import check_annotator
from sodaops.errors import DataError, SodaOpsError, StorageError
from sodaops.web.guard import Guard, problem_response
from sodaops.web.metrics import HttpMetrics
from sodaops.web.traces import telemetry_config

_PAGE = Path(__file__).parent / "page.html"
_STATUS = {DataError: 422, StorageError: 503, SodaOpsError: 409}
log = logging.getLogger("sodaops.annotation")
Name = Annotated[str, Field(min_length=1, max_length=100)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    annotator: Name
    session: Name = Field(description="random hexadecimal digits; the page draws new ones when it is loaded")


class AnswerRequest(_Request):
    """A label, or with null a skip."""

    task: Name
    label: str | None


class UndoRequest(_Request):
    """Takes the last answer of the session back, if it was to ``task``."""

    task: Name | None = None


class OpenTask(BaseModel):
    """A text to label. The model's prediction is not sent, so that it does not influence the annotator."""

    task: str
    text: str


class PairAgreement(BaseModel):
    """How far two annotators agree on the tasks that both labelled."""

    annotator: str
    n_shared: int
    raw: float
    kappa: float | None = Field(description="Cohen's; null where it is not defined")


class PageState(BaseModel):
    """The next task of an annotator, their progress and their agreement with others."""

    task: OpenTask | None = Field(description="null: this annotator has answered all tasks")
    labels: list[str]
    n_tasks: int
    n_answered: int = Field(description="tasks with a label by anybody")
    n_labelled: int = Field(description="by this annotator")
    n_skipped: int
    agreements: list[PairAgreement] = Field(description="with each annotator who labelled some of the same tasks")


def create_annotation_app(
    store_folder: str | Path,
    api_keys: Sequence[SecretStr] = (),
    admin_keys: Sequence[SecretStr] = (),
    max_body_bytes: int = 65_536,
    body_s: float = 10.0,
) -> FastAPI:
    """Creates the application for a store that exists.

    Args:
        store_folder: with store.json.
        api_keys: requests need one of them; without keys, all are allowed. The page itself is always open.
        admin_keys: as api_keys.
        max_body_bytes: limit on the body of a request.
        body_s: seconds in which it must arrive.

    Raises:
        DataError: no store.
        StorageError: the store could not be read.
    """
    store = Store(store_folder)
    log.info("ready", extra={"store": str(store_folder), "n_tasks": len(store.state().tasks)})
    app = FastAPI(title="SoDaOps annotation", docs_url=None, redoc_url=None, openapi_url=None, telemetry=telemetry_config())
    _add_routes(app, store)
    _add_error_handlers(app)
    paths = {route.path for route in app.routes if hasattr(route, "path")}
    app.add_middleware(
        Guard, metrics=HttpMetrics(), paths=paths, api_keys=api_keys, admin_keys=admin_keys, max_body_bytes=max_body_bytes,
        body_s=body_s,
    )  # fmt: skip
    return app


def _add_routes(app: FastAPI, store: Store) -> None:
    page = _PAGE.read_text(encoding="utf-8")

    @app.get("/")
    async def index() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    # These wait for the disk: FastAPI runs plain functions in threads.
    @app.get("/api/next")
    def next_task(annotator: Annotated[str, Query()]) -> PageState:
        return _page_state(store, annotator)

    @app.post("/api/answer")
    def answer(body: AnswerRequest) -> PageState:
        store.session(body.annotator, body.session).answer(body.task, body.label)
        return _page_state(store, body.annotator)

    @app.post("/api/undo")
    def undo(body: UndoRequest) -> PageState:
        task = store.session(body.annotator, body.session).undo(body.task)
        return _page_state(store, body.annotator, task)


def _page_state(store: Store, annotator: str, task: str | None = None) -> PageState:
    """What the page of an annotator shows: the given task, or else the next one."""
    annotator, state = check_annotator(annotator), store.state()
    shown = next((each for each in state.tasks if each.task == task), None) or state.next_for(annotator)
    progress = state.progress()
    return PageState(
        task=OpenTask(task=shown.task, text=shown.text) if shown else None,
        labels=list(state.labels),
        n_tasks=progress.tasks,
        n_answered=progress.answered,
        n_labelled=progress.labelled.get(annotator, 0),
        n_skipped=progress.skipped.get(annotator, 0),
        agreements=[PairAgreement(annotator=a.other, **a._asdict()) for a in state.agreements_of(annotator)],
    )


def _add_error_handlers(app: FastAPI) -> None:
    """Answers every error with a problem document (RFC 9457)."""

    async def http_error(request: Request, error: Any) -> Response:
        return problem_response(request.scope, error.status_code, str(error.detail), error.headers)

    async def sodaops_error(request: Request, error: Any) -> Response:
        status = next(status for kind, status in _STATUS.items() if isinstance(error, kind))
        return problem_response(request.scope, status, str(error))

    async def validation_error(request: Request, error: Any) -> Response:
        faults = [f"{'.'.join(str(part)[:40] for part in d['loc'])}: {d['msg']}" for d in error.errors()[:5]]
        return problem_response(request.scope, 422, "; ".join(faults))

    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(SodaOpsError, sodaops_error)
    app.add_exception_handler(RequestValidationError, validation_error)
