"""How much later the first token comes when a request has a schema that the server has not seen before.

    SMOLLM2_GGUF=SmolLM2-135M-Instruct.Q4_1.gguf python -m pytest -m slow -s tests/slow/test_schema_latency.py

The routes over a model in this process. Requests with a new schema and without one take turns. Of each, the wall time
and the processor time of this process and of the one that checks grammars.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from max_ray.pipelines import PipelineConfig
from max_ray.serve.api.routes import build_api
from max_ray.serve.api.structured_output_fields import close_checker, start_checker
from max_ray.serve.local_engine import LocalEngine
from tests.slow.peer import smollm2
from tests.structured_output.corpus import ENFORCED

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
NUM_SCHEMAS = 30
MAX_LATER_S = 0.05


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    given = os.environ.get("SMOLLM2_GGUF")
    path = str(Path(given) if given else smollm2())
    engine = LocalEngine.load(PipelineConfig(model_path=path, devices="cpu", num_threads=1, max_length=1024))
    engine.start()
    start_checker()
    transport = httpx.ASGITransport(build_api(engine))
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=300) as client:
        yield client
    await engine.close()
    close_checker()


def processor_seconds() -> float:
    """Of this process and of its children."""
    found = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return time.process_time() + sum(times.user + times.system for times in found)


async def first_token(client: httpx.AsyncClient, number: int, schema: Any) -> tuple[float, float]:
    """Wall and processor seconds of an answer of one token."""
    body: dict[str, Any] = {"messages": [{"role": "user", "content": f"Write JSON, please. ({number})"}]}
    body |= {"max_tokens": 1, "temperature": 0}
    if schema is not None:
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    wall, processor = time.perf_counter(), processor_seconds()
    reply = await client.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    return time.perf_counter() - wall, processor_seconds() - processor


def new_schema(number: int) -> dict[str, Any]:
    """An object that no other number gives: ten keys, some of them with a schema of the corpus."""
    names = list(ENFORCED)
    corpus = {
        f"part_{number}_{i}": schema
        for i in range(3)
        if isinstance(schema := ENFORCED[names[(7 * number + i) % len(names)]], dict) and "$ref" not in str(schema)
    }
    fields = {f"field_{number}_{i}": {"type": "string", "maxLength": 20} for i in range(7)}
    return {
        "type": "object",
        "properties": {**corpus, **fields},
        "required": list(fields),
        "additionalProperties": False,
    }


async def test_a_new_schema_costs_little(client: httpx.AsyncClient) -> None:
    """The median of the differences."""
    for warm in range(3):
        await first_token(client, -warm, new_schema(1000 + warm))
    later: list[tuple[float, float]] = []
    for number in range(NUM_SCHEMAS):
        plain = await first_token(client, 2 * number, None)
        given = await first_token(client, 2 * number + 1, new_schema(number))
        later.append((given[0] - plain[0], given[1] - plain[1]))
    wall, processor = ([one[i] for one in later] for i in (0, 1))
    print(
        f"first token with a new schema: wall +{1000 * statistics.median(wall):.1f} ms p50, "
        f"+{1000 * max(wall):.1f} ms at most; processor +{1000 * statistics.fmean(processor):.1f} ms on average"
    )
    assert statistics.median(wall) <= MAX_LATER_S
