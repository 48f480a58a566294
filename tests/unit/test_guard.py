"""The middleware of every service, without a service."""

import asyncio
import json

import pytest
from starlette.middleware.exceptions import ExceptionMiddleware

from sodaops.web.guard import Guard
from sodaops.web.metrics import HttpMetrics


async def read_body(scope, receive, send):
    """An application that reads the whole body."""
    while (await receive()).get("more_body"):
        continue
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def send_request(messages, headers=(), application=read_body, body_s=0.05):
    """Status and body of the response to a request whose body arrives in ``messages``, and then no more."""
    sent, app = [], ExceptionMiddleware(application)

    async def receive():
        return messages.pop(0) if messages else await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    guard = Guard(app, HttpMetrics(), {"/"}, api_keys=[], admin_keys=[], max_body_bytes=10, body_s=body_s)
    scope = {"type": "http", "method": "POST", "path": "/x", "headers": list(headers), "query_string": b""}
    asyncio.run(guard(scope, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)


CHUNKED = [(b"transfer-encoding", b"chunked")]


def part(body, more=True):
    return {"type": "http.request", "body": body, "more_body": more}


@pytest.mark.parametrize(
    ("messages", "headers", "status"),
    [
        ([part(b"x" * 10, more=False)], CHUNKED, 200),
        ([part(b"x")], CHUNKED, 408),
        ([part(b"x" * 8), part(b"x" * 8)], CHUNKED, 413),
        ([], [(b"content-length", b"11")], 413),
    ],
    ids=["whole", "does not arrive", "too large", "too large by its header"],
)
def test_bodies(messages, headers, status):
    assert send_request(messages, headers)[0] == status


def test_an_error_before_the_response_is_a_500_with_a_request_id():
    async def fails(scope, receive, send):
        raise RuntimeError("secret matter")

    status, body = send_request([], [(b"x-request-id", b"one")], fails)
    assert status == 500 and json.loads(body)["request_id"] == "one" and b"secret matter" not in body
