"""ASGI middleware of every service: request ids, checks of heads and keys, body limits, headers, access log, errors."""

import asyncio
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, NamedTuple

from opentelemetry import trace
from pydantic import SecretStr
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sodaops.web.heads import PROBES, Refusal, head_fault, media_fault
from sodaops.web.keys import Keys, client_of
from sodaops.web.log import format_trace
from sodaops.web.metrics import HttpMetrics

if TYPE_CHECKING:
    from fastapi import FastAPI

log = logging.getLogger(__name__)
access_log = logging.getLogger("sodaops.access")
OPEN = {"/", "/docs", "/openapi.json", *PROBES}  # need no key; nor does /swagger/…
HEADERS = {  # of every response that does not set them itself
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cache-control": b"no-store",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
}


def _new_ids() -> Iterator[bytes]:
    while True:
        block = os.urandom(4096)  # one system call for many requests
        yield from (block[i : i + 16].hex().encode() for i in range(0, len(block), 16))


_NEW_IDS = _new_ids()
_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class Access(NamedTuple):
    """Who may use a service.

    Attributes:
        api_keys: each of them gives access; without any, the service is open.
        admin_keys: each of them gives access to everything; without any, /admin/… is closed.
        allowed_hosts: names by which the service may be addressed; empty: any.
        cors_origins: other origins whose pages may call it.
    """

    api_keys: Sequence[SecretStr] = ()
    admin_keys: Sequence[SecretStr] = ()
    allowed_hosts: Sequence[str] = ()
    cors_origins: Sequence[str] = ()


def guard(app: "FastAPI", metrics: HttpMetrics, access: Access, max_body_bytes: int, body_s: float) -> None:
    """Wraps an application, whose routes are all there, in a :class:`Guard`."""
    paths = {route.path for route in app.routes if hasattr(route, "path")}
    app.add_middleware(Guard, metrics=metrics, paths=paths, access=access, max_body_bytes=max_body_bytes, body_s=body_s)


class Guard:
    """Wraps an application; pure ASGI, since Starlette's BaseHTTPMiddleware costs more time per request.

    HEAD is answered as GET, without the body.

    Args:
        app: the application.
        metrics: updated for each request.
        paths: known paths; all others are counted as "other".
        access: who may use it.
        max_body_bytes: largest request body.
        body_s: seconds within which the body must arrive.
    """

    def __init__(
        self, app: ASGIApp, metrics: HttpMetrics, paths: set[str], access: Access, max_body_bytes: int, body_s: float
    ) -> None:
        self._app, self._metrics, self._paths = app, metrics, paths
        self._max_body_bytes, self._body_s = max_body_bytes, body_s
        self._too_large = 413, f"the request body is too large; the limit is {max_body_bytes} bytes"
        self._access, self._keys = access, Keys(access.api_keys, access.admin_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        path, method = route_path(scope), scope["method"]
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"")
        if not _ID.fullmatch(request_id):
            request_id = next(_NEW_IDS)
        scope.setdefault("state", {}).update(request_id=request_id.decode(), began=began)
        if scope.get("fastapi.telemetry"):
            trace.get_current_span().set_attribute("request_id", request_id.decode())
        status = 0  # until the response starts

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                present = {name for name, _ in message["headers"]}
                added = [(name, value) for name, value in HEADERS.items() if name not in present]
                own = _with_head(message["headers"]) if status == 405 else message["headers"]
                message["headers"] = [*own, *added, (b"x-request-id", request_id)]
            elif method == "HEAD":
                message = {**message, "body": b""}
            await send(message)

        has_body = headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers
        self._metrics.in_flight.inc()
        try:
            refusal = self._refusal(scope, path, headers, has_body)
            if refusal:
                await problem_response(scope, *refusal)(scope, receive, send_with_headers)
            else:
                scope = {**scope, "method": "GET"} if method == "HEAD" else scope
                await self._app(scope, self._limited(receive, has_body), send_with_headers)
        except Exception as error:  # no handler took it: the client gets the request id, the log gets the traceback
            log.error("unexpected error", extra={"request_id": request_id.decode(), "trace": format_trace(error)})
            if status == 0:
                detail = "internal error; the service's log has the details under this request id"
                await problem_response(scope, 500, detail)(scope, receive, send_with_headers)
        finally:
            self._metrics.in_flight.dec()
            path = getattr(scope.get("route"), "path", path)  # /v2/models/{name}, whatever the name
            self._record(method, path, status, request_id.decode(), time.perf_counter() - began)

    def _refusal(self, scope: Scope, path: str, headers: dict[bytes, bytes], has_body: bool) -> Refusal | None:
        """Status, detail and headers for a request that is refused by its head alone."""
        if int(headers.get(b"content-length", b"0")) > self._max_body_bytes:
            return *self._too_large, {}
        if fault := head_fault(scope, path, headers, self._access.allowed_hosts, self._access.cors_origins):
            return fault
        if path not in OPEN and not path.startswith("/swagger/"):
            client = client_of(scope["client"][0]) if scope.get("client") else ""
            if fault := self._keys.refusal(headers, client, path.startswith("/admin/")):
                return fault
        return media_fault(headers, path) if has_body and scope["method"] == "POST" else None

    def _limited(self, receive: Receive, has_body: bool) -> Receive:
        """``receive`` with limits on the size and the duration of the body; waiting for a disconnect has no limit."""
        deadline, n_bytes = asyncio.get_running_loop().time() + self._body_s, 0
        is_complete = not has_body

        async def limited() -> Message:
            nonlocal n_bytes, is_complete
            if is_complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                detail = f"the request body did not arrive within {self._body_s:g} s"
                raise HTTPException(408, detail, {"connection": "close"}) from None
            n_bytes += len(message.get("body", b""))
            if n_bytes > self._max_body_bytes:
                raise HTTPException(*self._too_large)
            is_complete = message["type"] != "http.request" or not message.get("more_body", False)
            return message

        return limited

    def _record(self, method: str, path: str, status: int, request_id: str, seconds: float) -> None:
        """Counts a request and writes its line of the access log."""
        path = path if path in self._paths else "other"
        method = method if method in ("GET", "POST", "HEAD", "OPTIONS") else "other"
        self._metrics.answered(method, path, status).inc()
        self._metrics.seconds_of(path).observe(seconds)
        fields = {"request_id": request_id, "method": method, "path": path, "status": status, "ms": round(1000 * seconds, 2)}
        access_log.info("answered" if status else "client disconnected", extra=fields)


def route_path(scope: Scope) -> str:
    """The path as routes know it, without the prefix under which a proxy serves the application."""
    path, root = scope["path"], scope.get("root_path", "").rstrip("/")
    return path.removeprefix(root) if root and path.startswith(f"{root}/") else path


def _with_head(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Adds HEAD to the methods of an Allow header that has GET, as the routes do not know that it is answered."""
    return [(name, value.replace(b"GET", b"GET, HEAD") if name == b"allow" else value) for name, value in headers]


def problem(status: int, detail: str, request_id: str) -> dict[str, Any]:
    """The body of an RFC 9457 problem."""
    title = HTTPStatus(status).phrase if status in set(HTTPStatus) else detail
    return {"title": title, "status": status, "detail": detail, "request_id": request_id}


def problem_response(scope: Scope, status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    """An RFC 9457 problem response."""
    body = problem(status, detail, scope["state"]["request_id"])
    if route_path(scope).startswith("/v2"):
        body["error"] = detail  # where clients of KServe's protocol look
    return JSONResponse(body, status, headers, media_type="application/problem+json")
