"""The server of every service, and its middleware, under requests that no client library would send."""

import contextlib
import functools
import json
import socket
import threading
import time

import pytest
from pydantic import SecretStr

from tests.conftest import lazy, wait_until

guard = lazy("sodaops.web.guard")
exceptions = lazy("starlette.middleware.exceptions")
metrics = lazy("sodaops.web.metrics")
server = lazy("sodaops.web.server")
uvicorn = lazy("uvicorn")
web_keys = lazy("sodaops.web.keys")

OK = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"
LARGE = b"x" * 50_000_000


async def application(scope, receive, send):
    """Echoes the body; /large has a large answer, and does not read it."""
    body, more = b"", scope["path"] != "/large"
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    body = LARGE if scope["path"] == "/large" else body
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@contextlib.contextmanager
def served(**limits):
    """The application on a port, within these limits."""
    access = guard.Access(allowed_hosts=["a", "*.b"])
    app = guard.Guard(
        exceptions.ExceptionMiddleware(application), metrics.HttpMetrics(), {"/"}, access, max_body_bytes=1000, body_s=0.3
    )
    bounded = functools.partial(server.BoundedProtocol, server.Limits(**{"body_bytes": 1000, "connections": 50, **limits}))
    config = uvicorn.Config(app, port=0, http=bounded, ws="none", log_config=None, access_log=False, lifespan="off")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    wait_until(lambda: running.started)
    try:
        yield running.servers[0].sockets[0].getsockname()[1]
    finally:
        running.should_exit = running.force_exit = True
        thread.join(20)


@pytest.fixture(scope="module")
def port():
    with served(receive_s=0.3, send_s=0.3, pipelined=4) as port:
        yield port


def connect(port, sent=b""):
    client = socket.create_connection(("127.0.0.1", port), timeout=20)
    client.sendall(sent)
    return client


def read(client):
    """All that the service sends until it closes the connection."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while chunk := client.recv(1 << 20):
            received += chunk
    return received


def answer(port, request):
    """Status and body of the answer to a request, after which the client sends no more."""
    with connect(port) as client:
        with contextlib.suppress(OSError):  # closed already
            client.sendall(request)
            client.shutdown(socket.SHUT_WR)
        head, _, body = read(client).partition(b"\r\n\r\n")
    return int(head.split(b" ")[1]) if head else 0, body


def head(*lines, target=b"/", method=b"GET"):
    return b"\r\n".join([method + b" " + target + b" HTTP/1.1", *lines, b"", b""])


def post(body, *lines):
    return head(b"Host: a", *lines, method=b"POST") + body


JSON = b"Content-Type: application/json"
CHUNKED = b"Transfer-Encoding: chunked"


@pytest.mark.parametrize(("request_", "status"), [
    (head(b"Host: a", b"X: " + b"x" * 60_000), 200),
    (head(b"Host: a", b"X: " + b"x" * 70_000), 431),
    (head(b"Host: a", target=b"/" + b"x" * 70_000), 431),
    (head(b"Host: a", *[b"X: y"] * 99), 200),
    (head(b"Host: a", *[b"X: y"] * 10_000), 431),
    (head(b"Host: b"), 400),
    (head(b"Host: c.b:80"), 200),
    (head(b"X: y"), 400),
    (head(b"Host: a", b"Host: a"), 400),
    (head(target=b"/healthz"), 200),
    (head(b"Host: a", target=b"http://evil/x"), 200),
    (head(b"Host: a", target=b"/%zz"), 400),
    (head(b"Host: a", target=b"/x?text=%"), 400),
    (head(b"Host: a", target=b"/x?text=%ff"), 400),
    (head(b"Host: a", target=b"/x?text=%C3%BC%20"), 200),
    (head(b"Host: a", target=b"/x?text=\xfc"), 400),
    (head(b"Host: a", method=b"BREW"), 400),
    (head(b"Host: a", target=b"a:1", method=b"CONNECT"), 400),
    (head(b"Host: a", b"Connection: upgrade", b"Upgrade: websocket"), 200),
    (b"GET / HTTP/9.9\r\nHost: a\r\n\r\n", 400),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    (post(b"{}", JSON, b"Content-Length: 2"), 200),
    (post(b"{}", JSON, b"Content-Length: 2", b"Content-Length: 2"), 400),
    (post(b"0\r\n\r\n", JSON, b"Content-Length: 2", CHUNKED), 400),
    (post(b"{}", JSON, b"Content-Length: -2"), 400),
    (post(b"", JSON, b"Content-Length: 99999999999999999999"), 400),
    (post(b"", JSON, b"Content-Length: 2000"), 413),
    (post(b"2\r\n{}\r\n0\r\n\r\n", JSON, CHUNKED), 200),
    (post(b"2;" + b"x" * 5000 + b"\r\n{}\r\n0\r\n\r\n", JSON, CHUNKED), 200),
    (post(b"zz\r\n{}\r\n0\r\n\r\n", JSON, CHUNKED), 400),
    (post(b"2\r\n{}\r\n0\r\nX-Api-Key: a\r\n\r\n", JSON, CHUNKED), 200),
    (post(b"a=b", b"Content-Type: application/x-www-form-urlencoded", b"Content-Length: 3"), 415),
    (post(b"{}", b"Content-Type: text/plain", b"Content-Length: 2"), 415),
    (post(b"{}", b"Content-Type: application/json; charset=latin-1", b"Content-Length: 2"), 415),
    (post(b"{}", b"Content-Type: application/json; charset=UTF-8", b"Content-Length: 2"), 200),
    (post(b"{}", JSON, b"Content-Encoding: gzip", b"Content-Length: 2"), 415),
    (post(b"{}", JSON, b"Content-Length: 2", b"Origin: http://evil"), 403),
    (post(b"{}", JSON, b"Content-Length: 2", b"Origin: null"), 403),
    (post(b"{}", JSON, b"Content-Length: 2", b"Origin: http://a"), 200),
    (post(b"{}", JSON, b"Content-Length: 2", b"Sec-Fetch-Site: cross-site"), 403),
    (head(b"Host: a", b"Sec-Fetch-Site: same-site", b"Sec-Fetch-Mode: no-cors"), 403),
    (head(b"Host: a", b"Sec-Fetch-Site: cross-site", b"Sec-Fetch-Mode: navigate"), 200),
    (post(b"{}", JSON, b"Content-Length: 2", b"Sec-Fetch-Site: same-origin", b"Origin: http://a"), 200),
], ids=lambda value: repr(value)[-60:])  # fmt: skip
def test_odd_requests(port, request_, status):
    found, body = answer(port, request_)
    assert found == status, body[:500]
    if status >= 400:
        assert json.loads(body)["status"] == status
    assert answer(port, OK)[0] == 200


def test_head_has_no_body(port):
    assert answer(port, post(b"{}", JSON, b"Content-Length: 2")) == (200, b"{}")
    assert answer(port, head(b"Host: a", b"Content-Length: 2", method=b"HEAD") + b"{}") == (200, b"")


@pytest.mark.parametrize(("begin", "drip", "statuses"), [
    (b"", b"", []),
    (b"GET / HTTP/1.1\r\nHost: a\r\nX: ", b"x", [408]),
    (b"\r\n", b"\r\n", []),
    (OK, b"\r\n", [200]),
    (OK + b"GET /", b"x", [200, 408]),
    (post(b"{", JSON, b"Content-Length: 900"), b" ", [408]),
    (post(b"", JSON, CHUNKED), b"1\r\nx\r\n", [408]),
    (post(b"0\r\n", JSON, CHUNKED), b"X: y\r\n", [408]),
    (post(b"{", b"Content-Length: 900"), b" ", [415]),  # refused by its head: nobody reads the body
], ids=lambda value: repr(value)[-40:])  # fmt: skip
def test_slow_clients_are_cut_off(port, begin, drip, statuses):
    with connect(port, begin) as client:
        client.settimeout(0.02)
        received, deadline = b"", time.monotonic() + 20
        with contextlib.suppress(ConnectionError):
            while True:
                assert time.monotonic() < deadline, received[:500]
                client.sendall(drip)
                with contextlib.suppress(TimeoutError):
                    if not (chunk := client.recv(100_000)):
                        break
                    received += chunk
    assert [int(part[:3]) for part in received.split(b"HTTP/1.1 ")[1:]] == statuses


def test_an_answer_that_is_not_read_is_given_up(port):
    with connect(port, head(b"Host: a", target=b"/large")) as client, pytest.raises(ConnectionError):
        for _ in range(1000):  # until the service has closed the connection
            time.sleep(0.02)
            client.send(b"x")


@pytest.mark.parametrize(
    "begin", [b"", OK[:-2], post(b"{", JSON, b"Content-Length: 900"), OK], ids=["", "head", "body", "idle"]
)
def test_others_are_answered_while_slow_clients_hold_all_connections(begin):
    with served(connections=8) as port, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(port, begin)) for _ in range(30)]
        for _ in range(3):
            assert answer(port, OK)[0] == 200
        late = stack.enter_context(connect(port, OK))
        assert late.recv(100).startswith(b"HTTP/1.1 200")
        clients[0].settimeout(20)
        assert b"408" not in read(clients[0]), "the oldest is closed, long before its time is over"


def test_endless_heads_take_no_memory(port):
    """Each is cut off soon after the limit; the kernel's buffers take some more."""
    for line in (b"x" * 65_536, b"X: y\r\n" * 10_000):
        with connect(port, OK[:-2] + b"X: ") as client, pytest.raises(ConnectionError):
            for _ in range(1000):
                client.sendall(line)
    assert answer(port, OK)[0] == 200


def test_more_pipelined_requests_than_allowed(port):
    with connect(port, OK * 4) as client:
        received = b""
        while received.count(b"HTTP/1.1 200") < 4:
            chunk = client.recv(100_000)
            assert chunk, received
            received += chunk
    with connect(port, OK * 1000) as client:
        assert read(client).count(b"HTTP/1.1 200") < 1000


def test_wrong_keys_slow_a_client_down():
    now = [0.0]
    keys = web_keys.Keys([SecretStr("right"), SecretStr("new")], [])
    keys._attempts = web_keys.Attempts(lambda: now[0])

    def status(key, client="a"):
        refusal = keys.refusal({b"x-api-key": key} if key else {}, client, False)
        return refusal[0] if refusal else 200

    assert status(b"right") == 200
    assert [status(b"wrong%d" % n) for n in range(12)] == [401] * 10 + [429] * 2
    assert (status(b"new"), status(b"")) == (429, 401), "a key is not looked at, and none is no guess"
    assert status(b"right") == 200, "a key that was right before still is"
    assert status(b"new", "b") == 200 and status(b"wrong", "b") == 401, "other clients are not affected"
    now[0] = 1.5
    assert [status(b"wrong"), status(b"wrong")] == [401, 429]
    now[0] = 60
    assert status(b"new") == 200


def test_failed_attempts_take_bounded_memory():
    attempts = web_keys.Attempts()
    for n in range(10_100):
        attempts.fail(str(n))
    assert len(attempts._until) == 10_000
