"""Responses on a real Serve with two replicas: whichever one is asked finds them; a store that dies; the end of it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest
import ray

from max_ray.actors.messages import NAMESPACE
from max_ray.serve import application_actor
from max_ray.serve.response_store import ActorResponseStore, ResponseStoreActor, actor_name
from tests.actors.helpers import eventually, kill
from tests.serve.applications import deployed, replica_processes
from tests.serve.conftest import Served

pytestmark = [pytest.mark.ray]


async def test_two_handles_and_a_death(ray_cluster: Any) -> None:
    first, second = ActorResponseStore("store-test"), ActorResponseStore("store-test")
    await first.put("a", b"ra", b"ia", b"oa", None, True)
    found = await second.find("a")
    assert found is not None
    assert (found.response, found.items) == (b"ra", b"ia")
    await second.put("b", b"rb", b"ib", b"[]", "a", False)
    assert await first.history("b") is None
    assert await first.heartbeat(["b", "c"]) == ["c"]
    assert await first.finish("b", b"rb", b"ob")
    assert await second.history("b") == [b"ia", b"oa", b"ib", b"ob"]
    assert await second.delete("b")
    kill(ray.get_actor(actor_name("store-test"), namespace=NAMESPACE))
    async with asyncio.timeout(60):
        while await first.find("a") is not None:  # Ray kills it after the call
            await asyncio.sleep(0.1)
    await second.put("c", b"", b"", b"", None, True)
    assert await first.find("c") is not None
    kill(ray.get_actor(actor_name("store-test"), namespace=NAMESPACE))


async def test_a_store_ends_with_its_application(ray_cluster: Any) -> None:
    """No worker group of this name has ever been."""
    actor: Any = ray.remote(_Impatient).options(name="gone:responses", namespace=NAMESPACE, lifetime="detached")
    handle = actor.remote("gone")
    await handle.begin.remote()

    async def has_ended() -> bool:
        try:
            await asyncio.to_thread(ray.get_actor, "gone:responses", NAMESPACE)
        except ValueError:
            return True
        return False

    async with asyncio.timeout(60):
        while not await has_ended():
            await asyncio.sleep(0.2)


class _Impatient(ResponseStoreActor):
    def __init__(self, app: str) -> None:
        application_actor.LOOK_EVERY_S = 0.1
        application_actor.UNNEEDED_LOOKS = 3
        super().__init__(app)


async def test_conversations_over_two_replicas(ray_cluster: Any, tiny_llama: Path, serve_port: int) -> None:
    """50 turns, each read back, over connections of their own, so that both replicas serve some."""
    async with deployed(tiny_llama, serve_port, "responses-app", min_replicas=2, max_replicas=2) as served:
        await eventually(lambda: len(replica_processes("responses-app")) == 2, 60, "two replicas")
        asked_by = await _converse(served, 50)
        assert len(asked_by) == 50


async def _converse(served: Served, num_turns: int) -> list[str]:
    previous: str | None = None
    ids: list[str] = []
    for turn in range(num_turns):
        async with served.client() as client:
            response = await client.responses.create(
                model="tiny",
                input=f"{turn % 10}",
                max_output_tokens=16,
                truncation="auto",
                previous_response_id=previous,
                background=turn % 5 == 0,
            )
            previous = response.id
        async with served.client() as client:
            while (found := await client.responses.retrieve(previous)).status == "in_progress":
                await asyncio.sleep(0.05)
            assert found.status in ("completed", "incomplete")
            assert found.id == previous
        ids.append(previous)
    async with served.client() as client:
        await client.responses.delete(ids[0])
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(ids[0])
    return ids
