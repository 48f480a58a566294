"""ASGI middleware of every service: request ids, API keys, body limits, response headers, access log, unexpected errors."""

import asyncio
import hashlib
import hmac
import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from http import HTTPStatus

from opentelemetry import trace
from pydantic import SecretStr
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sodaops.web.log import format_trace
from sodaops.web.metrics import HttpMetrics

log = logging.getLogger(__name__)
access = logging.getLogger("sodaops.access")
OPEN = {"/", "/healthz", "/readyz", "/docs", "/openapi.json"}  # need no key; nor does /swagger/…
_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_POLICY = b"content-security-policy"
_HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cache-control": b"no-store",
    _POLICY: b"default-src 'none'; frame-ancestors 'none'",
}
_PAGE_POLICY = (  # the two HTML pages may run their own script and style, and call this service
    b"default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    b"connect-src 'self'; frame-ancestors 'none'"
)


class Guard:
    """Wraps an application; pure ASGI, since Starlette's BaseHTTPMiddleware costs more time per request.

    Args:
        app: the application.
        metrics: updated for each request.
        paths: known paths; all others are counted as "other".
        api_keys: each of them gives access; without any, the service is open.
        admin_keys: each of them gives access to everything; without any, /admin/… is closed.
        max_body_bytes: largest request body.
        body_s: seconds within which the body must arrive.
    """

    def __init__(
        self, app: ASGIApp, metrics: HttpMetrics, paths: set[str], api_keys: Sequence[SecretStr],
        admin_keys: Sequence[SecretStr], max_body_bytes: int, body_s: float,
    ) -> None:  # fmt: skip
        self._app, self._metrics, self._paths = app, metrics, paths
        self._max_body_bytes, self._body_s = max_body_bytes, body_s
        self._too_large = 413, f"the request body is too large; the limit is {max_body_bytes} bytes"
        self._admin = [_digest(key.get_secret_value().encode()) for key in admin_keys]
        self._api = [_digest(key.get_secret_value().encode()) for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        path = route_path(scope)
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"")
        if not _ID.fullmatch(request_id):
            request_id = os.urandom(16).hex().encode()
        scope.setdefault("state", {}).update(request_id=request_id.decode(), began=began)
        if scope.get("fastapi.telemetry"):
            trace.get_current_span().set_attribute("request_id", request_id.decode())
        status = 0  # until the response starts

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                present = {name for name, _ in message["headers"]}
                defaults = {**_HEADERS, _POLICY: _PAGE_POLICY} if path in ("/", "/docs") else _HEADERS
                added = [(name, value) for name, value in defaults.items() if name not in present]
                message["headers"] = [*message["headers"], *added, (b"x-request-id", request_id)]
            await send(message)

        has_body = b"content-length" in headers or b"transfer-encoding" in headers
        self._metrics.in_flight.inc()
        try:
            refusal = self._refusal(path, headers)
            if refusal:
                await problem_response(scope, *refusal)(scope, receive, send_with_headers)
            else:
                await self._app(scope, self._limited(receive, has_body), send_with_headers)
        except Exception as error:  # no handler took it: the client gets the request id, the log gets the traceback
            log.error("unexpected error", extra={"request_id": request_id.decode(), "trace": format_trace(error)})
            if status == 0:
                detail = "internal error; the service's log has the details under this request id"
                await problem_response(scope, 500, detail)(scope, receive, send_with_headers)
        finally:
            self._metrics.in_flight.dec()
            self._record(scope["method"], path, status, request_id.decode(), time.perf_counter() - began)

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        """Status and detail of a request that is refused by its headers alone."""
        if int(headers.get(b"content-length", b"0")) > self._max_body_bytes:
            return self._too_large
        if path in OPEN or path.startswith("/swagger/"):
            return None
        key = headers.get(b"x-api-key", b"")
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        if not key and scheme.lower() == b"bearer":
            key = token.strip()
        is_admin = _matches_any(key, self._admin)
        if path.startswith("/admin/"):
            if not self._admin:
                return 403, "no admin key is set; set SODAOPS_ADMIN_KEYS to use this"
            return None if is_admin else (401, "wrong or missing admin key; send it as X-API-Key or as a bearer token")
        if not self._api or is_admin or _matches_any(key, self._api):
            return None
        return 401, "wrong or missing key; send it as X-API-Key or as a bearer token"

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
                raise HTTPException(408, f"the request body did not arrive within {self._body_s:g} s") from None
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
        access.info("answered" if status else "client disconnected", extra=fields)


def route_path(scope: Scope) -> str:
    """The path as routes know it, without the prefix under which a proxy serves the application."""
    path, root = scope["path"], scope.get("root_path", "").rstrip("/")
    return path.removeprefix(root) if root and path.startswith(f"{root}/") else path


def problem_response(scope: Scope, status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    """An RFC 9457 problem response."""
    title = HTTPStatus(status).phrase if status in set(HTTPStatus) else detail
    body = {"title": title, "status": status, "detail": detail, "request_id": scope["state"]["request_id"]}
    challenge = {"www-authenticate": "Bearer"} if status == 401 else {}
    return JSONResponse(body, status, {**challenge, **(headers or {})}, media_type="application/problem+json")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _matches_any(key: bytes, digests: Sequence[bytes]) -> bool:
    """Compares with every digest, in a time that depends neither on which one matches nor on how much of it does."""
    return sum(hmac.compare_digest(_digest(key), digest) for digest in digests) > 0
