"""The annotation service: the page on which people label texts, and its three routes."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from sodaops.annotation.store import Store
from sodaops.annotation.tasks import Task, check_annotator
from sodaops.errors import DataError, StorageError
from sodaops.text.columns import split
from sodaops.web.guard import Access, guard, problem_response
from sodaops.web.metrics import HttpMetrics
from sodaops.web.policy import page_response
from sodaops.web.traces import telemetry_config

MAX_BODY_BYTES = 65_536
_PAGE = Path(__file__).parent / "page.html"
_OPEN_TO_ALL = Access()
log = logging.getLogger("sodaops.annotation")
Name = Annotated[str, Field(min_length=1, max_length=100)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    annotator: Name
    session: Name = Field(description="random hexadecimal digits; the page draws new ones when it is loaded")


class AnswerRequest(_Request):
    """A label, several of them or a number, as the store's question demands, or with null a skip."""

    task: Name
    label: str | list[str] | float | None


class UndoRequest(_Request):
    """Takes the last answer of the session back, if it was to ``task``."""

    task: Name | None = None


def create_annotation_app(store_folder: str | Path, access: Access = _OPEN_TO_ALL) -> FastAPI:
    """Creates the application for a store that exists.

    Args:
        store_folder: with store.json.
        access: who may use it. The page itself is always open.

    Raises:
        DataError: no store.
        StorageError: the store could not be read.
    """
    store = Store(store_folder)
    log.info("ready", extra={"store": str(store_folder), "n_tasks": len(store.state().tasks)})
    app = FastAPI(
        title="SoDaOps annotation", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False,
        telemetry=telemetry_config(),
    )  # fmt: skip
    _add_routes(app, store)
    _add_error_handlers(app)
    guard(app, HttpMetrics(), access, MAX_BODY_BYTES, body_s=10.0)
    return app


def _add_routes(app: FastAPI, store: Store) -> None:
    page = page_response(_PAGE.read_text(encoding="utf-8"))

    @app.get("/")
    async def index() -> Response:
        return page

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    # These wait for the disk: FastAPI runs plain functions in threads.
    @app.get("/api/next")
    def next_task(annotator: Annotated[str, Query()]) -> dict[str, Any]:
        return _page_state(store, annotator)

    @app.post("/api/answer")
    def answer(body: AnswerRequest) -> dict[str, Any]:
        store.session(body.annotator, body.session).answer(body.task, body.label)
        return _page_state(store, body.annotator)

    @app.post("/api/undo")
    def undo(body: UndoRequest) -> dict[str, Any]:
        task = store.session(body.annotator, body.session).undo(body.task)
        return _page_state(store, body.annotator, task)


def _page_state(store: Store, annotator: str, task: str | None = None) -> dict[str, Any]:
    """What the page of an annotator shows: the given task, or else the next one, their progress, and agreement with others.

    The model's prediction is not sent, so that it does not influence the annotator.
    """
    annotator, state = check_annotator(annotator), store.state()
    shown = next((each for each in state.tasks if each.task == task), None) or state.next_for(annotator)
    progress, agreements = state.progress(), state.agreements_of(annotator)
    return {
        "task": _shown(shown, state.text_columns) if shown else None,  # null: nothing is left for this annotator
        "labels": state.labels,
        "question": state.ml_task.question,
        "n_tasks": progress.tasks,
        "n_answered": progress.answered,  # by anybody; the next two by this annotator
        "n_labelled": progress.labelled.get(annotator, 0),
        "n_skipped": progress.skipped.get(annotator, 0),
        "agreements": [{"annotator": a.other, "n_shared": a.n_shared, "raw": a.raw, "kappa": a.kappa} for a in agreements],
    }


def _shown(task: Task, columns: Sequence[str]) -> dict[str, Any]:
    """What the page shows of a task: its text, or the name and the text of each part."""
    if len(columns) == 1:
        return {"task": task.task, "text": task.text}
    parts = zip(columns, split(task.text, len(columns)), strict=True)
    return {"task": task.task, "parts": [{"column": name, "text": part} for name, part in parts]}


def _add_error_handlers(app: FastAPI) -> None:
    """Answers every error with a problem document (RFC 9457)."""

    def handle(kind: type[Exception], explain: Callable[[Any], tuple[Any, ...]]) -> None:
        async def handler(request: Request, error: Exception) -> Response:
            return problem_response(request.scope, *explain(error))

        app.add_exception_handler(kind, handler)

    handle(HTTPException, lambda error: (error.status_code, str(error.detail), error.headers))
    handle(RequestValidationError, lambda error: (422, "; ".join(map(_field_error, error.errors()[:5]))))
    handle(DataError, lambda error: (422, str(error)))
    handle(StorageError, lambda error: (503, str(error)))


def _field_error(error: Any) -> str:
    return f"{'.'.join(str(part)[:40] for part in error['loc'])}: {error['msg']}"
