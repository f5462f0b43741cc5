"""A replica on Ray sends its spans to a collector, with the phases that its scheduler has noted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.actors.helpers import eventually
from tests.http.test_tracing import Collector, collector
from tests.serve.applications import deployed

__all__ = ["collector"]
pytestmark = [pytest.mark.ray]
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
EXPORTED_WITHIN_S = 30


@pytest.mark.slow
async def test_spans_of_a_replica(ray_cluster: Any, tiny_llama: Path, serve_port: int, collector: str) -> None:
    async with deployed(tiny_llama, serve_port, "traced", otlp_traces_endpoint=collector) as served:
        headers = served.headers | {"traceparent": f"00-{TRACE}-{SPAN}-01"}
        body = {"model": "tiny", "prompt": "abc", "max_tokens": 5, "ignore_eos": True, "stream": True}
        async with httpx.AsyncClient(timeout=60) as client:
            reply = await client.post(f"{served.url}/v1/completions", json=body, headers=headers)
            assert reply.status_code == 200
        await eventually(lambda: bool(Collector.received), EXPORTED_WITHIN_S, "spans are sent in batches")
    spans = [
        span
        for _, request in Collector.received
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    by_name = {span.name: span for span in spans}
    assert set(by_name) == {"POST /v1/completions", "llm_request", "prepare", "queue", "prefill", "decode"}
    assert {span.trace_id.hex() for span in spans} == {TRACE}
    root = by_name["POST /v1/completions"]
    assert root.parent_span_id.hex() == SPAN
    assert root.start_time_unix_nano <= by_name["prepare"].start_time_unix_nano
    assert by_name["decode"].end_time_unix_nano <= root.end_time_unix_nano
