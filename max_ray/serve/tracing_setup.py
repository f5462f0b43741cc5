"""Tracing, switched on by `otlp_traces_endpoint`. What it needs, the extra `otel`, is imported only then."""

from __future__ import annotations

from typing import TYPE_CHECKING

from max_ray.errors import ConfigError

if TYPE_CHECKING:
    from max_ray.serve.api.tracing import RequestTracer


def new_tracer(endpoint: str | None, replica: str) -> RequestTracer | None:
    """What traces the requests of a replica; None without an endpoint.

    Args:
        endpoint: URL of the collector.
        replica: Name of the replica.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """
    if endpoint is None:
        return None
    return _tracer_type().to_collector(endpoint, replica)


def check_tracing(endpoint: str | None) -> None:
    """Raises ConfigError where an endpoint is given and OpenTelemetry is not installed."""
    if endpoint is not None:
        _tracer_type()


def _tracer_type() -> type[RequestTracer]:
    try:
        from max_ray.serve.api.tracing import RequestTracer
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("opentelemetry"):
            raise
        raise ConfigError(
            "otlp_traces_endpoint needs OpenTelemetry: pip install 'max_ray[otel]' (on every node)."
        ) from None
    return RequestTracer
