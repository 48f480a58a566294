"""The middleware of every service, on requests that no client library would send."""

import asyncio

import pytest
from starlette.middleware.exceptions import ExceptionMiddleware

from sodaops.web.guard import Access, Guard
from sodaops.web.metrics import HttpMetrics


async def read_body(scope, receive, send):
    while (await receive()).get("more_body"):
        continue
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


@pytest.mark.parametrize(
    ("chunks", "ends", "status"),
    [([b"x" * 10], True, 200), ([b"x"], False, 408), ([b"x" * 8, b"x" * 8], False, 413)],
    ids=["complete", "does not arrive", "too large"],
)
def test_bodies_without_a_length(chunks, ends, status):
    sent = []
    messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    messages[-1]["more_body"] = not ends

    async def receive():
        return messages.pop(0) if messages else await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    guard = Guard(ExceptionMiddleware(read_body), HttpMetrics(), {"/"}, Access(), max_body_bytes=10, body_s=0.05)
    headers = [(b"transfer-encoding", b"chunked"), (b"content-type", b"application/json")]
    asyncio.run(guard({"type": "http", "method": "POST", "path": "/x", "headers": headers}, receive, send))
    assert sent[0]["status"] == status
