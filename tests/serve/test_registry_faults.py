"""A registry that hangs, or dies while a group is being rebuilt, under traffic: clients see a pause at most."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.actors.helpers import eventually, registry_status
from tests.serve.applications import deployed, text_of, worker_pids
from tests.serve.conftest import Served

pytestmark = [pytest.mark.ray]
STOPPED_S = 8.0


@asynccontextmanager
async def traffic(served: Served) -> AsyncIterator[None]:
    """Requests all the time, of which none may fail or answer otherwise than the first one."""
    expected = await text_of(served, "x", 100)
    stop = False

    async def ask() -> None:
        while not stop:
            assert await text_of(served, "x", 100) == expected

    clients = [asyncio.create_task(ask()) for _ in range(4)]
    yield
    stop = True
    await asyncio.gather(*clients)


async def registry_process() -> psutil.Process:
    return psutil.Process((await registry_status()).pid)


async def healthy_again(served: Served, within_s: float) -> None:
    """Asks for nothing but /health."""
    deadline = time.monotonic() + within_s
    async with httpx.AsyncClient(headers=served.headers) as client:
        while (answer := await client.get(f"{served.url}/health", timeout=30)).status_code != 200:
            assert time.monotonic() < deadline, answer.text
            await asyncio.sleep(0.2)


async def test_a_hung_registry_is_nothing_to_clients_and_a_dead_one_is_asked_again(
    ray_cluster: Any, tiny_llama: Path, serve_port: int
) -> None:
    async with deployed(tiny_llama, serve_port, "orders", lease_grace_s=STOPPED_S / 2) as served:
        before = worker_pids("orders")
        async with traffic(served):
            hung = await registry_process()
            hung.suspend()
            await asyncio.sleep(STOPPED_S)  # longer than a lease lasts that depends on it
            hung.resume()
            await asyncio.sleep(3)
            assert worker_pids("orders") == before, "the group has not ended itself"
            (group,) = [row for row in (await registry_status()).groups if row.app == "orders"]

            psutil.Process(before[0]).kill()
            await asyncio.sleep(1)  # the order for a new one is under way
            (await registry_process()).kill()
        (after,) = [row for row in (await registry_status()).groups if row.app == "orders"]
        assert after.owner_id == group.owner_id
        assert worker_pids("orders") != before


@pytest.mark.slow
async def test_an_idle_replica_gets_well_by_itself(ray_cluster: Any, tiny_llama: Path, serve_port: int) -> None:
    async with deployed(tiny_llama, serve_port, "idle") as served:
        expected = await text_of(served, "x")
        (pid,) = worker_pids("idle")
        registry = await registry_process()
        psutil.Process(pid).kill()
        await asyncio.sleep(1)
        registry.kill()
        await eventually(lambda: not registry.is_running(), 5, "the registry is dead")
        await healthy_again(served, 90)
        assert await text_of(served, "x") == expected
