"""Helpers for tests of the alerts: configurations, and an HTTP server that gives metrics and takes messages."""

import copy
import functools
import http.server
import json
import threading
from typing import Any, Self

from sodaops.config.alerts import AlertsConfig
from sodaops.config.validation import build_config
from tests.conftest import configured

RULES = {"drift", "errors", "latency", "confidence", "quality", "traffic", "log_lost", "down"}
RULE = {"signal": "error_rate", "above": 0.25, "clear": 0.25, "for_s": 120.0, "severity": "page", "summary": "Bad."}
EMAIL = {"host": "h", "port": 25, "sender": "a@b", "recipients": ["c@d", "e@f"], "starttls": True}
SECRET = "T0KEN-hunter2"


@functools.cache
def _composed() -> dict[str, Any]:
    return configured().model_dump()


def alerts_config(**changes: Any) -> AlertsConfig:
    """conf/alerts with some keys changed."""
    tree = copy.deepcopy(_composed())
    tree["alerts"] |= changes
    return build_config(tree).alerts


class Receiver:
    """An HTTP server: GET gives metrics, POST is recorded.

    Attributes:
        metrics: answers to GET, in order; the last one stays. None: status 500.
        messages: the JSON of each POST.
        keys: the X-API-Key of each GET.
        status: the answer to POST.
    """

    def __init__(self, *metrics: str | None) -> None:
        self.metrics, self.messages, self.keys, self.status = list(metrics) or [None], [], [], 200
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.host = f"127.0.0.1:{self._server.server_port}"
        self.url = f"http://{self.host}/metrics"

    def _handler(receiver) -> type[http.server.BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                receiver.keys.append(self.headers["x-api-key"])
                text = receiver.metrics.pop(0) if len(receiver.metrics) > 1 else receiver.metrics[0]
                redirects = text is not None and text.startswith("http")
                self._answer(302 if redirects else 500 if text is None else 200, text or "")

            def do_POST(self) -> None:
                receiver.messages.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                self._answer(receiver.status, "")

            def _answer(self, status: int, text: str) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(text)), **({"Location": text} if status == 302 else {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: Any) -> None:
                pass

        return Handler

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
