"""Replicas come and go: a killed one, a scaled application, a shutdown."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import ray
from ray.util.placement_group import placement_group_table

from max_ray.actors.messages import NAMESPACE, REGISTRY_NAME
from max_ray.serve import application
from tests.actors.helpers import actors_of, eventually, num_used_blocks, registry_status
from tests.serve.applications import deployed, replica_processes, text_of, worker_pids
from tests.serve.conftest import Served

pytestmark = [pytest.mark.ray]


async def answers_again(served: Served, within_s: float) -> str:
    deadline = time.monotonic() + within_s
    while True:
        try:
            return await text_of(served, "x")
        except openai.APIError:
            assert time.monotonic() < deadline, "no answer"
            await asyncio.sleep(0.2)


async def test_a_killed_replica_leaves_a_warm_group_to_its_successor(
    ray_cluster: Any, tiny_llama: Path, serve_port: int
) -> None:
    async with deployed(tiny_llama, serve_port, "successor", lease_grace_s=60) as served:
        expected = await text_of(served, "x")
        before = worker_pids("successor")
        (group,) = [row for row in (await registry_status()).groups if row.app == "successor"]
        chunks = await served.client().completions.create(
            model="tiny", prompt="y", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
        )
        await anext(aiter(chunks))
        (replica,) = replica_processes("successor")
        assert replica.nice() == psutil.Process().nice()
        replica.kill()
        replica.wait(10)
        assert await answers_again(served, 120) == expected
        (after,) = [row for row in (await registry_status()).groups if row.app == "successor"]
        assert (after.group_id, after.epoch) == (group.group_id, group.epoch + 1)
        assert worker_pids("successor") == before
        name = next(name for name in actors_of("successor") if ":kv_manager:" in name)
        manager = ray.get_actor(name, namespace=NAMESPACE)
        await eventually(lambda: num_used_blocks(manager) == 0, 5, "every block is given back")
    took = await eventually(lambda: not actors_of("successor"), 15, "the group ends with its application")
    assert took < 15
    await eventually(lambda: not _registry_is_up(), 15, "the registry ends when there is no group")
    rows = placement_group_table().values()
    assert not [row for row in rows if "max_ray:successor" in row["name"] and row["state"] != "REMOVED"]


def _registry_is_up() -> bool:
    return REGISTRY_NAME in [entry["name"] for entry in ray.util.list_named_actors(all_namespaces=True)]


@pytest.mark.slow
async def test_the_application_scales_up_and_down(
    ray_cluster: Any, tiny_llama: Path, serve_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(application, "UPSCALE_DELAY_S", 1.0)
    monkeypatch.setattr(application, "DOWNSCALE_DELAY_S", 3.0)
    scaling = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 2}
    async with deployed(tiny_llama, serve_port, "scaled", **scaling) as served:
        assert len(worker_pids("scaled")) == 1
        busy = asyncio.create_task(_keep_busy(served))
        await eventually(lambda: len(replica_processes("scaled")) == 2 and len(actors_of("scaled")) == 4, 90, "two")
        await _both_replicas_in_metrics(served)
        busy.cancel()
        await eventually(lambda: len(actors_of("scaled")) == 2, 90, "one again")
        await text_of(served, "x")


async def _keep_busy(served: Served) -> None:
    while True:
        await asyncio.gather(*[text_of(served, f"load {i}", 200) for i in range(16)], return_exceptions=True)


async def _both_replicas_in_metrics(served: Served) -> None:
    """One scrape reaches one replica, and knows all."""
    async with httpx.AsyncClient(base_url=served.url, headers=served.headers, timeout=30) as client:
        for _ in range(100):
            text = (await client.get("/metrics")).text
            replicas = set(re.findall(r'max_ray_generated_tokens_total\{.*replica="(\w+)"', text))
            if len(replicas) == 2:
                return
            await asyncio.sleep(0.5)
    raise AssertionError(f"only {replicas}")
