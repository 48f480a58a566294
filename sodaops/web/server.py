"""Runs a service with uvicorn, with limits on what its clients can hold: time, memory, open files."""

import json
import os
from asyncio import TimerHandle, Transport
from typing import Any, NamedTuple

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from sodaops.config.sections import ServerSection
from sodaops.web.guard import HEADERS, problem

_OWN_FILES = 256  # that are not connections, at most


class Limits(NamedTuple):
    """What one client, or all of them together, may hold."""

    body_bytes: int  # of a request, without its framing
    connections: int
    head_bytes: int = 65_536  # request line and headers
    headers: int = 100
    pipelined: int = 16  # requests that are sent before the answer to the first
    receive_s: float = 10.0  # for a head; for the rest of a body that nobody reads
    send_s: float = 60.0  # for a response that the client does not read
    idle_s: int = 620  # longer than load balancers keep connections, which might otherwise send on a closed one


def run(app: ASGIApp, settings: ServerSection, max_body_bytes: int, stop_s: int) -> None:
    """Serves until SIGTERM or Ctrl-C.

    Args:
        app: the application.
        settings: where it listens, and behind which proxies.
        max_body_bytes: largest request body that the application takes.
        stop_s: seconds in which requests may end after SIGTERM.
    """
    limits = Limits(max_body_bytes, max(16, min(10_000, _max_files() - _OWN_FILES)))

    def protocol(**arguments: Any) -> BoundedProtocol:
        return BoundedProtocol(limits, **arguments)

    uvicorn.run(
        app, host=settings.host, port=settings.port, root_path=settings.root_path, proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=settings.trusted_proxies, http=protocol,  # type: ignore[arg-type]  # uvicorn only calls it
        ws="none", log_config=None, access_log=False, server_header=False, timeout_keep_alive=limits.idle_s,
        timeout_graceful_shutdown=stop_s,
    )  # fmt: skip


def _max_files() -> int:
    """How many files, connections included, the process may open."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return 10_000
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 10_000 if soft == resource.RLIM_INFINITY else soft


class _Refused(Exception):  # noqa: N818
    """Raised in a callback of the parser, which it stops."""


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, in which a client that makes the service wait cannot do so for long, nor keep others out.

    A connection is *waiting* while its client has to act: send a head or the rest of a body, or read a response. Each such
    wait ends after some seconds. If there are too many connections, the one that has waited longest is closed, first among
    those that never completed a request; so slow clients cannot keep out one that sends its request at once.

    Heads that are too large, and requests that are not HTTP, are answered here, before the application sees them.
    """

    def __init__(self, limits: Limits, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._limits = limits
        # Connections that wait, oldest first: those that never completed a request, and the others.
        shared = vars(self.server_state).setdefault("waiting", ({}, {}))
        self._waiting: tuple[dict[BoundedProtocol, None], dict[BoundedProtocol, None]] = shared
        self._group: dict[BoundedProtocol, None] | None = None  # the one of these two that it is in
        self._deadline: TimerHandle | None = None
        self._refusal = 400, "not a valid HTTP/1.1 request"
        self._in_head = self._in_message = self._is_known = False
        self._n_bytes = 0  # of the current message, as far as it came in chunks of its own
        self._n_new = 0  # of this chunk, if a message can begin with it

    @property
    def _is_busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """Takes a connection, and closes another one if there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self._limits.connections:
            oldest = next((next(iter(group)) for group in self._waiting if group), self)
            oldest._close()
        if not transport.is_closing():
            self._wait(self._limits.receive_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets the connection."""
        super().connection_lost(exc)
        self._go_on()

    def data_received(self, data: bytes) -> None:
        """Parses a chunk."""
        self._n_bytes += len(data)
        self._n_new = 0 if self._in_message else len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._in_head and self._n_bytes > self._limits.head_bytes:
            self._refuse_head()
            self.send_400_response("")
        elif self._n_bytes > self._limits.head_bytes + 8 * self._limits.body_bytes:  # chunks of one byte have six
            self._close()
        elif not self._is_busy and self._deadline is None:
            self._wait(self._limits.receive_s)

    def on_message_begin(self) -> None:
        """Begins a head."""
        super().on_message_begin()
        self._in_head = self._in_message = True
        self._n_bytes, self._n_new = self._n_new, 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keeps a header; the trailers of a chunked body are ignored."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Starts the request, unless its head is too large."""
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self._limits.head_bytes or len(self.headers) > self._limits.headers:
            self._refuse_head()
            raise _Refused
        if len(self.pipeline) >= self._limits.pipelined:
            raise _Refused
        self._in_head = False
        if self._deadline is not None:  # the application limits the time for the body
            self._set_deadline(None)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Ends the body: now it is the application's turn."""
        self._in_message = False
        super().on_message_complete()
        self._is_known = True
        self._go_on()

    def on_response_complete(self) -> None:
        """Waits for the next request, or for the rest of a body that nobody reads."""
        super().on_response_complete()
        if self.flow.write_paused or self.transport.is_closing():
            self._wait(self._limits.send_s)
        elif self._in_message or not self._is_busy:
            self._wait(self._limits.receive_s if self._in_message and not self._is_busy else None)

    def pause_writing(self) -> None:
        """The client reads too slowly."""
        super().pause_writing()
        self._wait(self._limits.send_s)

    def resume_writing(self) -> None:
        """The client has read."""
        super().resume_writing()
        if self._is_busy:
            self._go_on()
        else:
            self._wait(None)

    def timeout_keep_alive_handler(self) -> None:
        """Closes an idle connection, even if its client does not read the last response."""
        self._close()

    def send_400_response(self, msg: str) -> None:
        """Answers a request that the application does not see, and closes the connection."""
        # Another response would come first, or cannot be written.
        if self.flow.write_paused or (self._is_busy and (self._in_head or self.cycle.response_started)):
            self._close()
            return
        status, detail = self._refusal
        if self._is_busy:
            self.cycle.disconnected = True
        body = json.dumps(problem(status, detail, os.urandom(16).hex())).encode()
        headers = {**HEADERS, b"content-type": b"application/problem+json", b"content-length": b"%d" % len(body)}
        lines = [STATUS_LINE[status], *(b"%s: %s\r\n" % pair for pair in headers.items()), b"connection: close\r\n\r\n", body]
        self.transport.write(b"".join(lines))
        self._wait(self._limits.send_s)
        self.transport.close()

    def _refuse_head(self) -> None:
        limits = f"{self._limits.head_bytes} bytes and {self._limits.headers} headers"
        self._refusal = 431, f"the head of the request is too large; the limits are {limits}; send long texts in a body"

    def _wait(self, seconds: float | None) -> None:
        """Notes that the client has to act, and for how long at most; None: as long as uvicorn keeps idle connections."""
        self._go_on()
        self._group = self._waiting[self._is_known]
        self._group[self] = None
        if seconds is not None:
            self._set_deadline(seconds)

    def _go_on(self) -> None:
        """Ends the wait."""
        if self._group is not None:
            del self._group[self]
            self._group = None
        if self._deadline is not None:
            self._set_deadline(None)

    def _set_deadline(self, seconds: float | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if seconds is None else self.loop.call_later(seconds, self._expire)

    def _expire(self) -> None:
        if self._in_head and not self.transport.is_closing():
            self._refusal = 408, f"the head of the request did not arrive within {self._limits.receive_s:g} s"
            self.send_400_response("")
        else:
            self._close()

    def _close(self) -> None:
        """Closes the connection at once, with whatever is not sent yet."""
        self._go_on()
        self.transport.abort()
