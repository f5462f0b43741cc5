"""Traces of requests: spans in memory, and as a collector receives them over HTTP."""

from __future__ import annotations

import asyncio
import gzip
import logging
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from max_ray.config import ServeConfig
from max_ray.errors import ConfigError, WorkerGroupError
from max_ray.serve.api.answer import prepared_generation
from max_ray.serve.api.openai import CompletionRequest
from max_ray.serve.api.routes import build_api
from max_ray.serve.api.spans import SPANS
from max_ray.serve.api.tracing import FLUSH_TIMEOUT_S, RequestTracer, traces_url
from max_ray.serve.application import api_options
from max_ray.serve.tracing_setup import check_tracing, new_tracer
from max_ray.tokenization.tokenizer import TextTokenizer
from tests.byte_tokenizer import write_byte_level
from tests.http.fake_engine import FakeEngine
from tests.scheduler.fakes import make_context
from tests.scheduler.harness import running
from tests.scheduler.test_admission import LoopEngine
from tests.serve.conftest import free_port

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
COMPLETIONS = "/v1/completions"
BODY = {"prompt": [7, 8, 9], "max_tokens": 10, "ignore_eos": True}


def traced(engine: FakeEngine) -> tuple[httpx.AsyncClient, InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    api = build_api(engine, tracer=RequestTracer(SimpleSpanProcessor(exporter), "r0"))
    transport = httpx.ASGITransport(api, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost"), exporter


def one(spans: tuple[ReadableSpan, ...], name: str) -> ReadableSpan:
    (span,) = [span for span in spans if span.name == name]
    return span


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer(write_byte_level(tmp_path_factory.mktemp("traces")), max_length=60)


async def test_the_spans_of_a_request_that_waited(small: TextTokenizer) -> None:
    async with running(max_batch_size=1, max_queued=8, budget=8) as harness:
        before = harness.loop.submit(make_context("before", [1], 40))
        await harness.at_step(2)
        client, exporter = traced(LoopEngine(small, harness.loop))
        async with client:
            begin = time.time_ns()
            answer_id = (await client.post(COMPLETIONS, json=BODY)).json()["id"]
            (record,) = (await client.get(f"/v1/requests/{answer_id}")).json()["choices"]
        spans = exporter.get_finished_spans()
        assert [output async for output in before][-1].is_done
    root, request = one(spans, f"POST {COMPLETIONS}"), one(spans, "llm_request")
    phases = [one(spans, name) for name in ("prepare", "queue", "prefill", "decode")]
    assert root.kind is SpanKind.SERVER
    assert root.parent is None
    assert request.parent == root.context
    assert all(phase.parent == request.context for phase in phases)
    assert dict(root.attributes or {}) == {
        "http.request.method": "POST",
        "http.route": COMPLETIONS,
        "http.response.status_code": 200,
    }
    assert phases[0].start_time == request.start_time
    assert phases[-1].end_time == request.end_time
    assert [phase.end_time for phase in phases[:-1]] == [phase.start_time for phase in phases[1:]]
    for phase in phases[:-1]:
        assert seconds(phase) == pytest.approx(record[f"{phase.name}_ms"] / 1e3, abs=1e-5)
    assert seconds(phases[1]) > 0
    assert root.start_time is not None
    assert begin <= root.start_time <= time.time_ns()
    assert request.start_time is not None
    assert root.start_time - 1e6 <= request.start_time
    told = dict(request.attributes or {})
    assert told["gen_ai.response.id"] == answer_id
    assert told["gen_ai.response.finish_reasons"] == ("length",)
    assert (told["gen_ai.usage.input_tokens"], told["gen_ai.usage.output_tokens"]) == (3, 10)
    assert (told["max_ray.wait_reason"], told["max_ray.kv_blocks"], told["max_ray.preemptions"]) == ("batch_full", 3, 0)
    assert told["gen_ai.latency.time_in_queue"] == pytest.approx(record["queue_ms"] / 1e3, abs=1e-5)
    assert told["gen_ai.latency.e2e"] == pytest.approx(seconds(request), abs=1e-6)
    assert root.resource.attributes["service.name"] == "max_ray"
    assert root.resource.attributes["service.instance.id"] == "r0"


async def test_a_callers_trace_is_continued(engine: FakeEngine) -> None:
    client, exporter = traced(engine)
    async with client:
        await client.post(COMPLETIONS, json={"prompt": "ab"}, headers={"traceparent": f"00-{TRACE}-{SPAN}-01"})
    root = one(exporter.get_finished_spans(), f"POST {COMPLETIONS}")
    assert root.parent is not None
    assert format(root.parent.span_id, "016x") == SPAN
    assert {format(span.context.trace_id, "032x") for span in exporter.get_finished_spans() if span.context} == {TRACE}


@pytest.mark.parametrize("header", ["nonsense", "00-0-0-01", f"00-{'0' * 32}-{SPAN}-01", f"ff-{TRACE}-{SPAN}-01", ""])
async def test_a_broken_traceparent_begins_a_new_trace(engine: FakeEngine, header: str) -> None:
    client, exporter = traced(engine)
    async with client:
        reply = await client.post(COMPLETIONS, json={"prompt": "ab"}, headers={"traceparent": header})
    assert reply.status_code == 200
    assert one(exporter.get_finished_spans(), f"POST {COMPLETIONS}").parent is None


async def test_a_caller_that_does_not_sample_is_not_traced(engine: FakeEngine) -> None:
    client, exporter = traced(engine)
    async with client:
        reply = await client.post(COMPLETIONS, json={"prompt": "ab"}, headers={"traceparent": f"00-{TRACE}-{SPAN}-00"})
    assert reply.status_code == 200
    assert exporter.get_finished_spans() == ()


@pytest.mark.parametrize(
    ("route", "body"),
    [
        (COMPLETIONS, {"prompt": "ab", "stream": True, "n": 3}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "ab"}], "stream": True}),
        ("/v1/responses", {"input": "ab"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 9, "stream": True}),
        ("/api/generate", {"prompt": "ab"}),
    ],
)
async def test_every_dialect_streamed_or_not(engine: FakeEngine, route: str, body: dict[str, Any]) -> None:
    client, exporter = traced(engine)
    async with client:
        assert (await client.post(route, json={"model": "fake", **body})).status_code == 200
    spans = exporter.get_finished_spans()
    requests = [span for span in spans if span.name == "llm_request"]
    assert [(span.attributes or {})["max_ray.choice"] for span in requests] == list(range(body.get("n", 1)))
    assert all(span.parent == one(spans, f"POST {route}").context for span in requests)
    told = repr([span.to_json() for span in spans])
    assert engine.script(engine.contexts[0]) not in told, "answers stay out of traces"


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_failure_is_an_error(engine: FakeEngine, is_streamed: bool) -> None:
    engine.failure, engine.fail_after = WorkerGroupError("gone"), 2
    client, exporter = traced(engine)
    async with client:
        await client.post(COMPLETIONS, json={"prompt": "ab", "stream": is_streamed})
    spans = exporter.get_finished_spans()
    root = one(spans, f"POST {COMPLETIONS}")
    assert root.status.status_code is StatusCode.ERROR
    assert (root.attributes or {})["http.response.status_code"] == 503
    assert (one(spans, "llm_request").attributes or {})["gen_ai.response.finish_reasons"] == ("abort",)


async def test_a_refusal_has_its_status_and_no_generation(engine: FakeEngine) -> None:
    client, exporter = traced(engine)
    async with client:
        await client.post(COMPLETIONS, json={"prompt": "ab", "max_tokens": -1})
        await client.get("/health")
        await client.get("/metrics")
    (root,) = exporter.get_finished_spans()
    assert (root.attributes or {})["http.response.status_code"] == 400
    assert root.status.status_code is StatusCode.UNSET


async def test_a_hang_up_ends_the_span(engine: FakeEngine) -> None:
    engine.gate = asyncio.Event()
    client, exporter = traced(engine)
    async with client:
        asking = asyncio.create_task(client.post(COMPLETIONS, json={"prompt": "ab"}))
        while not engine.contexts:
            await asyncio.sleep(0.001)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    spans = exporter.get_finished_spans()
    assert (one(spans, f"POST {COMPLETIONS}").attributes or {})["http.response.status_code"] == 499
    assert (one(spans, "llm_request").attributes or {})["gen_ai.response.finish_reasons"] == ("abort",)
    assert SPANS.get() is None


async def test_without_a_tracer_a_request_knows_of_none(engine: FakeEngine) -> None:
    generation = await prepared_generation(engine, CompletionRequest(prompt="ab"))
    assert generation._spans is None
    generation.close()


class Collector(BaseHTTPRequestHandler):
    """Keeps what is posted."""

    received: ClassVar[list[tuple[str, ExportTraceServiceRequest]]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        self.received.append((self.path, ExportTraceServiceRequest.FromString(body)))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed."""


@pytest.fixture
def collector() -> Iterator[str]:
    Collector.received = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


async def test_a_collector_receives_the_spans(engine: FakeEngine, collector: str) -> None:
    tracer = new_tracer(collector, "replica-7")
    assert tracer is not None
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(build_api(engine, tracer=tracer)), base_url="http://localhost"
    ) as client:
        await client.post(COMPLETIONS, json={"prompt": "ab"})
    await tracer.close()
    ((path, request),) = Collector.received
    assert path == "/v1/traces"
    (resource,) = request.resource_spans
    about = {one.key: one.value.string_value for one in resource.resource.attributes}
    assert (about["service.name"], about["service.instance.id"]) == ("max_ray", "replica-7")
    assert {span.name for span in resource.scope_spans[0].spans} == {f"POST {COMPLETIONS}", "llm_request"}


async def test_a_collector_that_is_away_holds_nothing_up(engine: FakeEngine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    tracer = new_tracer(f"http://127.0.0.1:{free_port()}", "r0")
    assert tracer is not None
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(build_api(engine, tracer=tracer)), base_url="http://localhost"
    ) as client:
        assert (await client.post(COMPLETIONS, json={"prompt": "ab"})).status_code == 200
    begin = time.monotonic()
    await tracer.close()
    assert time.monotonic() - begin < FLUSH_TIMEOUT_S + 10


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://collector:4318", "http://collector:4318/v1/traces"),
        ("http://collector:4318/", "http://collector:4318/v1/traces"),
        ("https://c.example.org/otlp/v1/traces?key=1", "https://c.example.org/otlp/v1/traces?key=1"),
    ],
)
def test_the_url_of_a_collector(endpoint: str, url: str) -> None:
    assert traces_url(endpoint) == url


@pytest.mark.parametrize("endpoint", ["collector:4317", "grpc://collector:4317", "http://", "http://a b", ""])
def test_an_endpoint_is_a_url(endpoint: str) -> None:
    with pytest.raises(ConfigError, match=r"otlp_traces_endpoint.*URL like"):
        ServeConfig(otlp_traces_endpoint=endpoint)


def test_the_setting_reaches_the_replicas() -> None:
    assert api_options(ServeConfig()).otlp_traces_endpoint is None
    endpoint = "http://collector:4318"
    assert api_options(ServeConfig(otlp_traces_endpoint=endpoint)).otlp_traces_endpoint == endpoint


def test_without_the_package_the_start_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "max_ray.serve.api.tracing", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    check_tracing(None)
    assert new_tracer(None, "r") is None
    with pytest.raises(ConfigError, match=r"pip install 'max_ray\[otel\]'"):
        check_tracing("http://collector:4318")
