"""OpenTelemetry spans of requests, sent to the collector at OTEL_EXPORTER_OTLP_ENDPOINT; needs the extra ``otel``."""

import os
from typing import Any

from fastapi.telemetry import TelemetryConfig

from sodaops.errors import ConfigError

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def telemetry_config() -> TelemetryConfig:
    """FastAPI's tracing with everything off that could hold users' texts: logs, metrics, and the query string.

    Raises:
        ConfigError: an endpoint is set, but the packages that send to it are not installed.
    """
    base: TelemetryConfig = {"logs": False, "metrics": False, "operation_spans": False, "auto_configure": False}
    endpoint = next((name for name in _ENDPOINTS if os.environ.get(name)), None)
    if endpoint is None:
        return {**base, "tracing": False}
    try:
        return {**base, "tracing": True, "tracer_provider": _provider()}
    except ImportError as error:
        raise ConfigError(f"{endpoint} is set, but {error.name} is not installed; run `pip install 'sodaops[otel]'`.") from None


def _provider() -> Any:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    class WithoutQuery(SpanProcessor):
        def on_start(self, span: Any, parent_context: Any = None) -> None:
            if "url.query" in (span.attributes or {}):
                span.set_attribute("url.query", "REDACTED")

    name = os.environ.get("OTEL_SERVICE_NAME", "sodaops")
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    provider.add_span_processor(WithoutQuery())
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
