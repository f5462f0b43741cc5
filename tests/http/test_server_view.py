"""`GET /v1/server`: replicas, requests and the map of KV blocks."""

from __future__ import annotations

import json
import random

import httpx
import numpy as np
import pytest

from max_ray.interfaces import RequestID
from max_ray.scheduler import Histogram, RequestActivity, SchedulerStats
from max_ray.serve.api.api_context import ModelDetails
from max_ray.serve.api.metrics import GroupView, Metrics
from max_ray.serve.api.routes import build_api
from max_ray.serve.api.server_view import MAX_CELLS, MAX_REQUESTS, block_map
from tests.http.fake_engine import FakeEngine


def request(blocks: range, request_id: str = "secret-id") -> RequestActivity:
    return RequestActivity(RequestID(request_id), "decode", 1.5, 40, 16, 45, 6, np.array(blocks, dtype=np.int32))


async def test_the_object(engine: FakeEngine) -> None:
    engine.listed = (request(range(3)), request(range(2, 5), "other"))
    transport = httpx.ASGITransport(build_api(engine, details=ModelDetails(family="llama", encoding="q4_k")))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        await client.post("/v1/completions", json={"prompt": "ab"})
        found = (await client.get("/v1/server")).json()
    assert found["object"] == "server"
    assert found["model"]["id"] == "fake"
    assert (found["model"]["family"], found["model"]["encoding"]) == ("llama", "q4_k")
    assert found["limits"]["max_batch_size"] == 8
    assert [(one["replica"], one["running"], one["queued"]) for one in found["replicas"]] == [
        ("r0", 3, 2),
        ("r1", 0, 0),
    ]
    assert (found["replicas"][0]["prompt_tokens"], found["replicas"][0]["generated_tokens"]) == (3, 6)
    assert found["replica"] == "r0"
    assert found["latency"]["time_to_first_token_seconds"]["count"] == 1
    assert 0 < found["latency"]["time_to_first_token_seconds"]["p50"] < 30
    assert found["num_requests"] == 2
    one = found["requests"][0]
    assert (one["phase"], one["prompt_tokens"], one["cached_tokens"], one["generated_tokens"]) == ("decode", 40, 16, 6)
    assert one["num_blocks"] == 3
    cache = found["kv_cache"]
    assert (cache["num_blocks"], cache["page_size"], cache["blocks_per_cell"]) == (64, 16, 1)
    assert cache["used"] == [1] * 5 + [0] * 59
    assert cache["shared"] == [0, 0, 1] + [0] * 61
    assert cache["request"] == [0, 0, 0, 1, 1] + [-1] * 59


async def test_ids_are_not_given_away(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.listed = (request(range(3)), request(range(3), "other"), request(range(3)))
    reply = await client.get("/v1/server")
    assert "secret-id" not in reply.text
    tags = [one["tag"] for one in reply.json()["requests"]]
    assert tags[0] == tags[2] != tags[1]


async def test_many_requests_are_cut_and_counted(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.listed = tuple(request(range(1), str(number)) for number in range(MAX_REQUESTS + 5))
    found = (await client.get("/v1/server")).json()
    assert (len(found["requests"]), found["num_requests"]) == (MAX_REQUESTS, MAX_REQUESTS + 5)


async def test_it_is_not_counted(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await client.get("/v1/server")
    assert engine.metrics.snapshot(SchedulerStats()).requests == {}


@pytest.mark.parametrize("num_blocks", [1, MAX_CELLS - 1, MAX_CELLS, MAX_CELLS + 1, 3 * MAX_CELLS + 7])
def test_the_map_equals_its_definition(num_blocks: int) -> None:
    rng = random.Random(num_blocks)
    per_cell = max(1, -(-num_blocks // MAX_CELLS))
    for _ in range(20):
        tables = [rng.sample(range(num_blocks), rng.randint(0, min(num_blocks, 60))) for _ in range(rng.randint(0, 6))]
        used, shared, owner = block_map([np.array(table, dtype=np.int32) for table in tables], num_blocks, per_cell)
        assert len(used) == len(shared) == len(owner) == -(-num_blocks // per_cell) <= MAX_CELLS
        for cell in range(len(used)):
            blocks = range(cell * per_cell, min(num_blocks, (cell + 1) * per_cell))
            holders = [sum(block in table for table in tables) for block in blocks]
            counts = [sum(block in table for block in blocks) for table in tables]
            assert used[cell] == sum(count > 0 for count in holders)
            assert shared[cell] == sum(count > 1 for count in holders)
            assert owner[cell] == (counts.index(max(counts)) if any(counts) else -1)


def test_blocks_of_a_cache_that_was_replaced_are_left_out() -> None:
    used, _, owner = block_map([np.array([2, 7], dtype=np.int32)], num_blocks=4, per_cell=1)
    assert used.tolist() == [0, 0, 1, 0]
    assert owner.tolist() == [-1, -1, 0, -1]
    assert [part.tolist() for part in block_map([], 0, 1)] == [[], [], []]


def test_the_group_of_every_replica_is_told() -> None:
    group = GroupView("app-0-1234", 2, 4, "cuda")
    snapshot = Metrics("m", "r").snapshot(SchedulerStats(), group=group)
    assert snapshot.group == group
    json.dumps(snapshot.startup_phases)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.95, 1.0])
def test_quantiles_lie_in_the_bucket_of_the_true_value(share: float) -> None:
    rng = random.Random(3)
    for _ in range(50):
        bounds = (1.0, 2.0, 4.0, 8.0)
        values = sorted(rng.uniform(0, 8) for _ in range(rng.randint(1, 40)))
        histogram = Histogram(bounds)
        for value in values:
            histogram.observe(value)
        found = histogram.quantile(share)
        assert found is not None
        true = values[max(0, -(-int(share * len(values) * 1000) // 1000) - 1)]
        upper = next(bound for bound in bounds if true <= bound)
        assert upper / 2 * (upper > 1) <= found <= upper, (values, share)


def test_quantiles_at_the_borders() -> None:
    histogram = Histogram((1.0, 2.0))
    assert histogram.quantile(0.5) is None
    histogram.observe(99.0)
    assert histogram.quantile(0.5) == 2.0, "the last bound at most"
    histogram = Histogram((1.0, 2.0))
    histogram.observe(1.5, times=4)
    assert histogram.quantile(0.5) == 1.5
    assert histogram.quantile(1.0) == 2.0
