"""OpenTelemetry spans of requests, where OTEL_EXPORTER_OTLP_ENDPOINT names a collector; needs the extra ``otel``."""

import os
from typing import Any

from fastapi.telemetry import TelemetryConfig

from sodaops.errors import ConfigError

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def telemetry_config() -> TelemetryConfig:
    """FastAPI's own spans, without what its other signals and the query would tell: texts.

    Raises:
        ConfigError: an endpoint without the packages that send to it.
    """
    only: TelemetryConfig = {"logs": False, "metrics": False, "operation_spans": False, "auto_configure": False}
    endpoint = next((name for name in _ENDPOINTS if os.environ.get(name)), None)
    if endpoint is None:
        return {**only, "tracing": False}
    try:
        return {**only, "tracing": True, "tracer_provider": _provider()}
    except ImportError as error:
        raise ConfigError(f"{endpoint} is set, and {error.name} is not installed; pip install 'sodaops[otel]'.") from None


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
