"""What stands around every request: its id, keys, limits of the body, headers, one log line, and the last resort."""

import asyncio
import hashlib
import hmac
import json
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

log = logging.getLogger("sodaops.serving")
access = logging.getLogger("sodaops.access")
OPEN = {"/", "/healthz", "/readyz", "/docs", "/openapi.json"}  # no key needed; nor for /swagger/…
_encode = json.JSONEncoder(default=str).encode  # made once: json.dumps would make one for each line
_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_POLICY = b"content-security-policy"
_HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cache-control": b"no-store",
    _POLICY: b"default-src 'none'; frame-ancestors 'none'",
}
_PAGES = (  # what the two pages may do: their own script and style, and calls to this service
    b"default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    b"connect-src 'self'; frame-ancestors 'none'"
)


class Guard:
    """Pure ASGI middleware; see the module's first line.

    Args:
        app: what answers.
        metrics: told of each request.
        paths: known paths; others are counted as one.
        api_keys: any of them opens the service; none: it is open.
        admin_keys: any of them opens /admin/…, and the rest; none: /admin/… is shut.
        max_body_bytes: of a request.
        body_s: time for it to arrive.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: HttpMetrics,
        paths: set[str],
        api_keys: Sequence[SecretStr],
        admin_keys: Sequence[SecretStr],
        max_body_bytes: int,
        body_s: float,
    ) -> None:
        self._app, self._metrics, self._paths = app, metrics, paths
        self._max_body_bytes, self._body_s = max_body_bytes, body_s
        self._too_large = 413, f"the body is too large; at most {max_body_bytes} bytes are read"
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
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                present = {name for name, _ in message["headers"]}
                fixed = {**_HEADERS, _POLICY: _PAGES} if path in ("/", "/docs") else _HEADERS
                extra = [(name, value) for name, value in fixed.items() if name not in present]
                message["headers"] = [*message["headers"], *extra, (b"x-request-id", request_id)]
            await send(message)

        has_body = b"content-length" in headers or b"transfer-encoding" in headers
        self._metrics.in_flight.inc()
        try:
            refusal = self._refusal(path, headers)
            if refusal:
                await problem_response(scope, *refusal)(scope, receive, answer)
            else:
                await self._app(scope, self._bounded(receive, has_body), answer)
        except Exception as error:  # the last resort: the client learns the id, the log learns the rest
            log.error("unexpected fault", extra={"request_id": request_id.decode(), "trace": format_trace(error)})
            if status == 0:
                detail = "something went wrong here; the log has it under this request id"
                await problem_response(scope, 500, detail)(scope, receive, answer)
        finally:
            self._metrics.in_flight.dec()
            self._tell(scope["method"], path, status, request_id.decode(), time.perf_counter() - began)

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        if int(headers.get(b"content-length", b"0")) > self._max_body_bytes:
            return self._too_large
        if path in OPEN or path.startswith("/swagger/"):
            return None
        given = headers.get(b"x-api-key", b"")
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        if not given and scheme.lower() == b"bearer":
            given = token.strip()
        admin = _among(given, self._admin)
        if path.startswith("/admin/"):
            if not self._admin:
                return 403, "no admin key is set; set SODAOPS_ADMIN_KEYS to use this"
            return None if admin else (401, "wrong or missing admin key; send it as X-API-Key or as a bearer token")
        if not self._api or admin or _among(given, self._api):
            return None
        return 401, "wrong or missing key; send it as X-API-Key or as a bearer token"

    def _bounded(self, receive: Receive, has_body: bool) -> Receive:
        """Gives up on a body that is too large, or does not arrive; waiting for a client to go away has no limit."""
        until, n_bytes = asyncio.get_running_loop().time() + self._body_s, 0
        whole = not has_body

        async def bounded() -> Message:
            nonlocal n_bytes, whole
            if whole:
                return await receive()
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "the body did not arrive in time") from None
            n_bytes += len(message.get("body", b""))
            if n_bytes > self._max_body_bytes:
                raise HTTPException(*self._too_large)
            whole = message["type"] != "http.request" or not message.get("more_body", False)
            return message

        return bounded

    def _tell(self, method: str, path: str, status: int, request_id: str, seconds: float) -> None:
        path = path if path in self._paths else "other"
        method = method if method in ("GET", "POST", "HEAD", "OPTIONS") else "other"
        self._metrics.answered(method, path, status).inc()
        self._metrics.seconds_of(path).observe(seconds)
        facts = {"request_id": request_id, "method": method, "path": path, "status": status, "ms": round(1000 * seconds, 2)}
        access.info("answered" if status else "client gone", extra=facts)


def route_path(scope: Scope) -> str:
    """The path that routes know: without the prefix under which a proxy offers the service."""
    path, root = scope["path"], scope.get("root_path", "").rstrip("/")
    return path.removeprefix(root) if root and path.startswith(f"{root}/") else path


def problem_response(scope: Scope, status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    """An RFC 9457 problem."""
    title = HTTPStatus(status).phrase if status in set(HTTPStatus) else detail
    body = {"title": title, "status": status, "detail": detail, "request_id": scope["state"]["request_id"]}
    more = {"www-authenticate": "Bearer"} if status == 401 else {}
    return JSONResponse(body, status, {**more, **(headers or {})}, media_type="application/problem+json")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _among(given: bytes, digests: Sequence[bytes]) -> bool:
    """Whether a key is one of several, in a time that does not tell which, nor how much of it was right."""
    found = False
    for digest in digests:
        found |= hmac.compare_digest(_digest(given), digest)
    return found
