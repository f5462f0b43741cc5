"""RequestTracer: OpenTelemetry spans of requests. Needs the optional extra `otel`.

    POST /v1/chat/completions      from the arrival to the end of the answer
      llm_request                  one a choice, from the arrival to its last token
        prepare                    parsing, chat template, tokens
        queue                      up to its first KV blocks
        prefill                    up to its first token
        decode                     up to its last token

A request with a `traceparent` header continues its caller's trace and obeys its decision about sampling. The spans of a
choice are made when it has ended, of times that were noted anyway: nothing is added to a token's path. They hold no
prompts and no answers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from max_ray import __version__
from max_ray.serve.api.choice import Choice
from max_ray.serve.api.generation import Generation
from max_ray.serve.api.phase_times import finished_choice
from max_ray.serve.api.request_log import PHASES, phase_seconds
from max_ray.serve.api.route_table import counted_label
from max_ray.serve.api.scope import CLIENT_CLOSED, STATUS_KEY, route_path
from max_ray.serve.api.spans import SPANS

EXPORT_TIMEOUT_S = 5.0
FLUSH_TIMEOUT_S = 3.0
_DEFAULT_PATH = "/v1/traces"
_SERVER_ERROR = 500
_Attributes = dict[str, AttributeValue]


class RequestTracer:
    """Made once a replica; `close` sends what is left.

    Args:
        processor: Gets the spans.
        replica: Name of the replica.
    """

    def __init__(self, processor: SpanProcessor, replica: str) -> None:
        self._provider = TracerProvider(resource=_resource(replica), shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("max_ray", __version__)

    @classmethod
    def to_collector(cls, endpoint: str, replica: str) -> RequestTracer:
        """Sends spans by OTLP over HTTP, in batches, on a thread of its own.

        Args:
            endpoint: URL of the collector; without a path, /v1/traces.
            replica: Name of the replica.
        """
        exporter = OTLPSpanExporter(endpoint=traces_url(endpoint), timeout=EXPORT_TIMEOUT_S)
        return cls(BatchSpanProcessor(exporter), replica)

    def wrap(self, app: ASGIApp) -> ASGIApp:
        """The application with a span around each request that metrics count."""
        return _TracedApp(app, self._tracer)

    async def close(self) -> None:
        """Sends what is left, for FLUSH_TIMEOUT_S at most."""
        await asyncio.to_thread(self._provider.force_flush, int(1e3 * FLUSH_TIMEOUT_S))


class _TracedApp:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, tracer: Tracer) -> None:
        self._app = app
        self._tracer = tracer
        self._propagator = TraceContextTextMapPropagator()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        label = counted_label(route_path(scope)) if scope["type"] == "http" else None
        if label is None:
            await self._app(scope, receive, send)
            return
        parent = self._propagator.extract(Headers(scope=scope))
        attributes: _Attributes = {"http.request.method": scope["method"], "http.route": label}
        span = self._tracer.start_span(f"{scope['method']} {label}", parent, SpanKind.SERVER, attributes)
        if not span.is_recording():
            await self._app(scope, receive, send)
            return
        with _recorded(_GenerationSpans(self._tracer, span)):
            await self._traced(span, scope, receive, send)

    async def _traced(self, span: Span, scope: Scope, receive: Receive, send: Send) -> None:
        status = _SERVER_ERROR

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except asyncio.CancelledError:
            status = CLIENT_CLOSED
            raise
        finally:
            status = scope.get(STATUS_KEY, status)
            span.set_attribute("http.response.status_code", status)
            if status >= _SERVER_ERROR:
                span.set_status(Status(StatusCode.ERROR))
            span.end()


class _GenerationSpans:
    """SpanRecorder below one request's span."""

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self._tracer = tracer
        self._context = set_span_in_context(span)

    def record(self, generation: Generation) -> None:
        """A span for each choice, with its phases below it."""
        offset_ns = time.time_ns() - time.perf_counter_ns()
        for choice in generation.choices:
            self._record_choice(generation, choice, offset_ns)

    def _record_choice(self, generation: Generation, choice: Choice, offset_ns: int) -> None:
        begin = generation.arrival
        end = choice.last_token_time or time.perf_counter()
        attributes = choice_attributes(generation, choice)
        span = self._tracer.start_span(
            "llm_request", self._context, attributes=attributes, start_time=_epoch_ns(begin, offset_ns)
        )
        below = set_span_in_context(span)
        for name, seconds in phase_seconds(choice, generation.arrival).items():
            if name == PHASES[-1]:
                seconds = end - begin if choice.first_token_time else None
            if seconds is None:
                break
            self._record_phase(name, below, (begin, begin + seconds), offset_ns)
            begin += seconds
        span.end(_epoch_ns(max(begin, end), offset_ns))

    def _record_phase(self, name: str, context: Context, times: tuple[float, float], offset_ns: int) -> None:
        begin, end = times
        span = self._tracer.start_span(name, context, start_time=_epoch_ns(begin, offset_ns))
        span.end(_epoch_ns(end, offset_ns))


def choice_attributes(generation: Generation, choice: Choice) -> _Attributes:
    """What is told of a choice: OpenTelemetry's names for generative AI where there are any, then vLLM's, then ours.

    Args:
        generation: The request's.
        choice: That has ended.
    """
    ended = finished_choice(choice, generation.arrival)
    context = choice.context
    params, trace = context.sampling_params, context.trace
    found: dict[str, AttributeValue | None] = {
        "gen_ai.request.model": generation.model_name,
        "gen_ai.response.id": generation.answer_id,
        "gen_ai.request.max_tokens": params.max_new_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.response.finish_reasons": (ended.finish_reason,),
        "gen_ai.usage.input_tokens": ended.prompt_tokens,
        "gen_ai.usage.output_tokens": ended.generated_tokens,
        "gen_ai.latency.time_in_queue": ended.queue_s,
        "gen_ai.latency.time_to_first_token": choice.first_token_time - generation.arrival
        if choice.first_token_time
        else None,
        "gen_ai.latency.e2e": ended.total_s,
        "max_ray.choice": choice.index,
        "max_ray.cached_tokens": ended.cached_tokens,
        "max_ray.preemptions": ended.preemptions,
        "max_ray.wait_reason": None if trace.wait_reason is None else trace.wait_reason.value,
        "max_ray.kv_blocks": max(trace.num_blocks, len(context.block_table)),
    }
    return {name: value for name, value in found.items() if value is not None}


def traces_url(endpoint: str) -> str:
    """The URL that spans are posted to.

    Args:
        endpoint: A URL; without a path, that of OTLP is added.
    """
    parts = urlsplit(endpoint)
    return endpoint if parts.path not in ("", "/") else parts._replace(path=_DEFAULT_PATH).geturl()


@contextmanager
def _recorded(spans: _GenerationSpans) -> Iterator[None]:
    token = SPANS.set(spans)
    try:
        yield
    finally:
        SPANS.reset(token)


def _resource(replica: str) -> Resource:
    """OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES have a say."""
    resource = Resource.create({"service.version": __version__, "service.instance.id": replica})
    name = str(resource.attributes.get("service.name", "unknown_service"))
    return resource.merge(Resource({"service.name": "max_ray"})) if name.startswith("unknown_service") else resource


def _epoch_ns(seconds: float, offset_ns: int) -> int:
    """A time of perf_counter() as nanoseconds since 1970."""
    return int(seconds * 1e9) + offset_ns
