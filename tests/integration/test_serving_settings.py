"""Settings of the predictor, its exit code when they are wrong, and its traces."""

import gc
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sodaops.config.schema import ServeConfig
from sodaops.errors import ConfigError
from sodaops.serving import __main__ as program
from sodaops.serving.settings import ServeSettings
from tests.conftest import REPO, configured


def test_conf_serve_is_the_settings_defaults():
    assert configured().serve == ServeConfig()
    assert ServeSettings(bundle="b").model_dump(exclude={"bundle", "api_keys", "admin_keys"}) == ServeConfig().model_dump()


@pytest.mark.parametrize(
    ("variables", "port"),
    [({}, 8000), ({"PORT": "9000"}, 9000), ({"PORT": "9000", "SODAOPS_PORT": "9001"}, 9001)],
)
def test_which_variable_gives_the_port(monkeypatch, variables, port):
    for name in ("PORT", "SODAOPS_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert ServeSettings(bundle="b").port == port
    monkeypatch.setenv("PORT", "http")
    if "SODAOPS_PORT" not in variables:
        with pytest.raises(ConfigError, match="^PORT=http: "):
            ServeSettings(bundle="b")


@pytest.mark.parametrize(("variables", "arguments", "named"), [
    ({}, [], "ConfigError: SODAOPS_BUNDLE "),
    ({"SODAOPS_BUNDLE": "b"}, ["max_queue=9"], "ConfigError: 'max_queue=9'"),
    ({"SODAOPS_BUNDLE": "/no/where"}, [], "BundleError: /no/where: "),
    ({"SODAOPS_BUNDLE": "b", "SODAOPS_MAX_QUEU": "1"}, [], "did you mean SODAOPS_MAX_QUEUE?"),
    ({"SODAOPS_BUNDLE": "b", "SODAOPS_MAX_QUEUE": "none"}, [], "ConfigError: SODAOPS_MAX_QUEUE=none: "),
    ({"SODAOPS_BUNDLE": "b", "SODAOPS_PORT": "-1"}, [], "ConfigError: SODAOPS_PORT=-1: "),
    ({"SODAOPS_BUNDLE": "b", "SODAOPS_VARIANT": "int4"}, [], "ConfigError: SODAOPS_VARIANT=int4: "),
    ({"SODAOPS_BUNDLE": "b", "SODAOPS_CORS_ORIGINS": "x"}, [], "ConfigError: SODAOPS_CORS_ORIGINS: "),
    ({"SODAOPS_REQUEST_LOG": "gs://b/log"}, [], "ConfigError: SODAOPS_JOURNAL_DIR "),
    ({"SODAOPS_REQUEST_LOG": "/dev/null/x"}, [], "StorageError: /dev/null/x/journal: "),
])  # fmt: skip
def test_faulty_settings_end_with_2(trained, monkeypatch, capsys, variables, arguments, named):
    if "SODAOPS_REQUEST_LOG" in variables:
        variables = {**variables, "SODAOPS_BUNDLE": str(trained / "run/bundle")}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["serving", *arguments])
    try:
        code = program.main()
    except SystemExit as error:
        code = error.code
    finally:
        gc.enable()  # main() turns it off until the bundle is loaded
    assert code == 2 and named in capsys.readouterr().err


def test_faulty_settings_end_uvicorn_with_2():
    module = ["uvicorn", "sodaops.serving.app:create_app", "--factory"]
    env = {**os.environ, "SODAOPS_BUNDLE": "b", "SODAOPS_MAX_QUEU": "1"}
    done = subprocess.run([sys.executable, "-m", *module], env=env, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 2 and "SODAOPS_MAX_QUEU " in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_spans_reach_a_collector_without_texts(serve, monkeypatch):
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

    received = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            received.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        client = serve()
        client.get("/predict", params={"text": "secretword"}, headers={"x-request-id": "one"})
        client.post("/predict", json={"text": 5, "secretword": "secretword"})
        client.post("/predict/batch", json={"texts": ["secretword", "x"]})
        client.__exit__()  # sends what is left
        collector.shutdown()
    requests = [trace_service_pb2.ExportTraceServiceRequest.FromString(body) for body in received]
    spans = [s for r in requests for resource in r.resource_spans for scope in resource.scope_spans for s in scope.spans]
    attributes = {span.name: {a.key: a.value for a in span.attributes} for span in spans}
    assert attributes.keys() == {"GET /predict", "POST /predict", "POST /predict/batch", "queue", "batch"}
    assert attributes["GET /predict"]["request_id"].string_value == "one"
    assert attributes["POST /predict"]["http.response.status_code"].int_value == 422
    assert not any(b"secretword" in body for body in received)
    by_id = {span.span_id: span for span in spans}
    waits, batches = ([span for span in spans if span.name == name] for name in ("queue", "batch"))
    assert {by_id[wait.parent_span_id].name for wait in waits} == {"GET /predict", "POST /predict/batch"}
    assert sum({a.key: a.value.int_value for a in batch.attributes}["texts"] for batch in batches) == 3
    for wait in waits:  # each says which batch answered, and that batch which requests it answered
        (batch,) = (by_id[link.span_id] for link in wait.links)
        assert wait.parent_span_id in {link.span_id for link in batch.links} and wait.trace_id != batch.trace_id
        assert wait.start_time_unix_nano <= wait.end_time_unix_nano <= batch.end_time_unix_nano


def test_a_collector_without_its_package(serve, monkeypatch, capsys):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace.export", None)
    with pytest.raises(SystemExit, match="2"):
        serve()
    assert "ConfigError: OTEL_EXPORTER_OTLP_ENDPOINT " in capsys.readouterr().err
