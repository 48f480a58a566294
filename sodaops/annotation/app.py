"""The page on which people label texts, and its three calls: ``sodaops annotate serve STORE``."""

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, ConfigDict, Field, SecretStr
from starlette.exceptions import HTTPException

from sodaops.annotation.store import Session, Store
from sodaops.annotation.tasks import Task, check_annotator
from sodaops.errors import DataError, SodaOpsError, StorageError, some
from sodaops.web.guard import Guard, problem_response
from sodaops.web.metrics import HttpMetrics
from sodaops.web.traces import telemetry_config

_PAGE = Path(__file__).parent / "page.html"
_STATUS = {DataError: 422, StorageError: 503, SodaOpsError: 409}
log = logging.getLogger("sodaops.annotation")
Name = Annotated[str, Field(min_length=1, max_length=100)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    annotator: Name
    session: Name = Field(description="hexadecimal digits that the page drew when it was loaded")


class Answer(_Body):
    """A label, or with null a skip."""

    task: Name
    label: str | None


class Undo(_Body):
    """The last answer of the session, or nothing if it is not that to ``task``."""

    task: Name | None = None


class OpenTask(BaseModel):
    """A text to label. What the model said of it is kept from the annotator."""

    task: str
    text: str


class With(BaseModel):
    """How far two annotators agree on the tasks that both labelled."""

    annotator: str
    n_shared: int
    raw: float
    kappa: float | None = Field(description="Cohen's; null where it is not defined")


class Turn(BaseModel):
    """What the page shows."""

    task: OpenTask | None = Field(description="null: this annotator has answered all")
    labels: list[str]
    n_tasks: int
    n_answered: int = Field(description="tasks that have a label by anybody")
    n_labelled: int = Field(description="by this annotator")
    n_skipped: int
    agreements: list[With] = Field(description="with each other annotator, where there are shared tasks")


def create_annotation_app(
    store_folder: str | Path,
    api_keys: Sequence[SecretStr] = (),
    admin_keys: Sequence[SecretStr] = (),
    max_body_bytes: int = 65_536,
    body_s: float = 10.0,
) -> FastAPI:
    """The application over a store that is there.

    Args:
        store_folder: with store.json.
        api_keys: any of them opens the calls; none: they are open. The page itself is always open.
        admin_keys: the same.
        max_body_bytes: of a request.
        body_s: time for it to arrive.

    Raises:
        DataError: no store.
    """
    store = Store(store_folder)
    state = store.state()
    if state.damaged:
        log.warning("damaged lines are left out", extra={"n": len(state.damaged), "places": some(state.damaged)})
    log.info("ready", extra={"store": str(store_folder), "n_tasks": len(state.tasks)})
    app = FastAPI(title="SoDaOps annotation", docs_url=None, redoc_url=None, openapi_url=None, telemetry=telemetry_config())
    _routes(app, store)
    _refusals(app)
    paths = {route.path for route in app.routes if hasattr(route, "path")}
    app.add_middleware(
        Guard, metrics=HttpMetrics(), paths=paths, api_keys=api_keys, admin_keys=admin_keys, max_body_bytes=max_body_bytes,
        body_s=body_s,
    )  # fmt: skip
    return app


def _routes(app: FastAPI, store: Store) -> None:
    page = _PAGE.read_text(encoding="utf-8")

    @functools.lru_cache(maxsize=1000)  # one that comes back after that goes on in a new file, under its old code
    def session(annotator: str, code: str) -> Session:
        return store.session(annotator, code)

    def session_of(body: _Body) -> Session:
        return session(check_annotator(body.annotator), body.session)

    @app.get("/")
    async def index() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    # Plain functions: they wait for the disk, so they run in threads.
    @app.get("/api/next")
    def next_task(annotator: Annotated[str, Query()]) -> Turn:
        return _turn(store, annotator)

    @app.post("/api/answer")
    def answer(body: Answer) -> Turn:
        session_of(body).answer(body.task, body.label)
        return _turn(store, body.annotator)

    @app.post("/api/undo")
    def undo(body: Undo) -> Turn:
        return _turn(store, body.annotator, session_of(body).undo(body.task))


def _turn(store: Store, annotator: str, again: str | None = None) -> Turn:
    """What an annotator is to see: the task named, or the next one."""
    annotator, state = check_annotator(annotator), store.state()
    named = next((task for task in state.tasks if task.task == again), None)
    found: Task | None = named or state.next_for(annotator)
    progress = state.progress()
    return Turn(
        task=OpenTask(task=found.task, text=found.text) if found else None,
        labels=list(state.labels),
        n_tasks=progress.tasks,
        n_answered=progress.answered,
        n_labelled=progress.labelled.get(annotator, 0),
        n_skipped=progress.skipped.get(annotator, 0),
        agreements=[With(annotator=a.other, **a._asdict()) for a in state.agreements_of(annotator)],
    )


def _refusals(app: FastAPI) -> None:
    """Every refusal is a problem with a detail that a person can act on."""

    async def by_status(request: Request, error: Any) -> Response:
        return problem_response(request.scope, error.status_code, str(error.detail), error.headers)

    async def by_kind(request: Request, error: Any) -> Response:
        status = next(status for kind, status in _STATUS.items() if isinstance(error, kind))
        return problem_response(request.scope, status, str(error))

    async def by_place(request: Request, error: Any) -> Response:
        faults = [f"{'.'.join(str(part)[:40] for part in d['loc'])}: {d['msg']}" for d in error.errors()[:5]]
        return problem_response(request.scope, 422, "; ".join(faults))

    app.add_exception_handler(HTTPException, by_status)
    app.add_exception_handler(SodaOpsError, by_kind)
    app.add_exception_handler(RequestValidationError, by_place)
