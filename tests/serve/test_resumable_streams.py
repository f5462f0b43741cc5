"""Streams that go on at another replica: after the death of theirs, and while it lives."""

from __future__ import annotations

import asyncio
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray

from max_ray.actors.messages import NAMESPACE
from max_ray.config import ServeConfig
from max_ray.serve.stream_journal import ActorStreamJournal, actor_name
from tests.actors.helpers import actors_of, eventually, kill, num_used_blocks
from tests.serve.applications import deployed, replica_processes
from tests.serve.conftest import Served, settings_for

pytestmark = [pytest.mark.ray]

SCHEMA = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}}, "required": ["a"]}
LONG: dict[str, Any] = {"model": "tiny", "max_tokens": 200, "stream": True}
DRAWN: dict[str, Any] = {"prompt": "drawn", "temperature": 1, "ignore_eos": True}
FORMAT = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
BODIES: list[dict[str, Any]] = [
    {"prompt": "greedy", "temperature": 0, "ignore_eos": True},
    {"prompt": "seeded", "temperature": 1, "seed": 11, "ignore_eos": True},
    DRAWN,
    {"prompt": "two", "temperature": 1, "seed": 3, "n": 2, "ignore_eos": True},
    {"prompt": "log", "temperature": 1, "seed": 4, "logprobs": 2, "ignore_eos": True},
    {"prompt": "schema", "temperature": 1, "seed": 5, "response_format": FORMAT},
]
ALL = 10**6


@dataclass
class Reading:
    """A stream as a client has it. `events`: data by id, in the order in which they came."""

    stream_id: str
    events: list[tuple[str, str]] = field(default_factory=list)

    @property
    def last_id(self) -> str:
        return self.events[-1][0] if self.events else "0"

    @property
    def is_whole(self) -> bool:
        return bool(self.events) and self.events[-1][1] == "[DONE]"

    def chunks_of(self, number: int) -> list[Any]:
        """What came of a choice."""
        chunks = [json.loads(data)["choices"][0] for _, data in self.events if data != "[DONE]"]
        return [chunk for chunk in chunks if chunk["index"] == number]


async def read(response: httpx.Response, reading: Reading, at_most: int) -> None:
    """Until so many events are there, or the stream ends or breaks."""
    number, left = "", at_most
    async for line in response.aiter_lines():
        if line.startswith("id: "):
            number = line[4:]
        elif line.startswith("data: ") and number:
            reading.events.append((number, line[6:]))
            number = ""
            left -= 1
        if not left:
            return


def http(served: Served) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=served.url, headers=served.headers, timeout=120)


async def begun(served: Served, body: dict[str, Any], reading: Reading, at_most: int = ALL) -> None:
    """Asks for a stream, reads some of it and leaves. Raises httpx.HTTPError when the connection breaks."""
    options = {"request_id": reading.stream_id.removeprefix("cmpl-"), "stream_options": {"resumable": True}}
    asked = {**LONG, **body, **options}
    async with http(served) as client, client.stream("POST", "/v1/completions", json=asked) as response:
        assert response.status_code == 200, await response.aread()
        await read(response, reading, at_most)


async def read_on(served: Served, reading: Reading, at_most: int = ALL, within_s: float = 100) -> list[int]:
    """Until so many more events are there or the stream is whole, over as many connections as that takes.

    Returns:
        The statuses of refusals, 0 for a connection that broke.
    """
    refusals: list[int] = []
    until = len(reading.events) + at_most
    async with asyncio.timeout(within_s):
        while not reading.is_whole and len(reading.events) < until:
            try:
                refusals += await _read_on_once(served, reading, until - len(reading.events))
            except httpx.HTTPError:
                refusals.append(0)
                await asyncio.sleep(0.1)
    return refusals


async def _read_on_once(served: Served, reading: Reading, at_most: int) -> list[int]:
    path = f"/v1/streams/{reading.stream_id}"
    async with http(served) as client:
        async with client.stream("GET", path, params={"from": reading.last_id}) as response:
            if response.status_code == 200:
                await read(response, reading, at_most)
                return []
        await asyncio.sleep(0.2)
    return [response.status_code]


def assert_same(found: Reading, expected: Reading, num_choices: int) -> None:
    """The same chunks. A batch of other rows may change the last bits of log probabilities."""
    assert len(found.events) == len(expected.events)
    for number in range(num_choices):
        for one, other in zip(found.chunks_of(number), expected.chunks_of(number), strict=True):
            assert one == approximate(other)


def approximate(value: Any) -> Any:
    """A JSON value with its numbers to be compared to 1e-4."""
    if isinstance(value, float):
        return pytest.approx(value, abs=1e-4)
    if isinstance(value, list):
        return [approximate(item) for item in value]
    if isinstance(value, dict):
        return {name: approximate(item) for name, item in value.items()}
    return value


async def undisturbed(served: Served, prefix: str) -> list[Reading]:
    readings = [Reading(f"cmpl-{prefix}{number}") for number in range(len(BODIES))]
    await asyncio.gather(*[begun(served, body, one) for body, one in zip(BODIES, readings, strict=True)])
    assert all(one.is_whole for one in readings)
    return readings


async def test_streams_go_on_after_the_death_of_their_replica(
    ray_cluster: Any, tiny_llama: Path, serve_port: int
) -> None:
    """The connections break with the replica. The stream that drew its own seed ends, too."""
    async with deployed(tiny_llama, serve_port, "resumed", lease_grace_s=60) as served:
        expected = await undisturbed(served, "u")
        readings = [Reading(f"cmpl-k{i}") for i in range(len(BODIES))]
        reading = [asyncio.create_task(begun(served, body, one)) for body, one in zip(BODIES, readings, strict=True)]
        await eventually(lambda: all(len(one.events) > 2 for one in readings), 30, "every stream has begun")
        (replica,) = replica_processes("resumed")
        replica.kill()
        replica.wait(10)
        await asyncio.gather(*reading, return_exceptions=True)
        print("events before the death", [len(one.events) for one in readings], [one.is_whole for one in readings])
        assert not all(one.is_whole for one in readings)
        print("refusals", await asyncio.gather(*[read_on(served, one) for one in readings]))
        for body, found, whole in zip(BODIES, readings, expected, strict=True):
            assert found.is_whole
            if body is not DRAWN:
                assert_same(found, whole, body.get("n", 1))
        await eventually(lambda: used_blocks("resumed") == 0, 15, "every block is given back")
    await eventually(lambda: not actors_of("resumed"), 15, "the group ends with its application")


@pytest.mark.slow
async def test_streams_move_to_another_replica_that_lives(ray_cluster: Any, tiny_llama: Path, serve_port: int) -> None:
    """Connections are spread over two replicas: with one after each few events, streams go back and forth."""
    async with deployed(tiny_llama, serve_port, "moved", min_replicas=2, max_replicas=2) as served:
        await eventually(lambda: len(replica_processes("moved")) == 2, 60, "two replicas")
        expected = await undisturbed(served, "u")
        num_moves = 0
        for number, (body, whole) in enumerate(zip(BODIES, expected, strict=True)):
            one = Reading(f"cmpl-m{number}")
            await begun(served, body, one, at_most=2)
            for _ in range(4):
                await read_on(served, one, at_most=2)
            await read_on(served, one)
            if body is not DRAWN:
                assert_same(one, whole, body.get("n", 1))
            num_moves += await moves_of("moved", one.stream_id)
        assert num_moves > 0
        kill(ray.get_actor(actor_name("moved"), namespace=NAMESPACE))
        one = Reading("cmpl-new")
        await begun(served, BODIES[0], one, at_most=5)
        await read_on(served, one)
        assert_same(one, expected[0], 1)
        await eventually(lambda: used_blocks("moved") == 0, 15, "every block is given back")


@pytest.mark.slow
async def test_streams_outlast_an_update(ray_cluster: Any, tiny_llama: Path, serve_port: int, tmp_path: Path) -> None:
    """Longer than the old replica may drain: they end there with an event, and go on at the new one."""
    from ray import serve

    from max_ray.serve.application import build_application

    model = tmp_path / "long"
    shutil.copytree(tiny_llama, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 20_000}))
    settings = {"drain_timeout_s": 3.0, "max_length": 10_000, "lease_grace_s": 60}
    bodies = [{**body, "max_tokens": 4000} for body in BODIES[:2]]
    async with deployed(model, serve_port, "updated", **settings) as served:
        whole = [Reading(f"cmpl-u{number}") for number in range(2)]
        await asyncio.gather(*[begun(served, body, one) for body, one in zip(bodies, whole, strict=True)])
        (before,) = replica_processes("updated")
        found = [Reading(f"cmpl-f{number}") for number in range(2)]
        await asyncio.gather(*[begun(served, body, one, 50) for body, one in zip(bodies, found, strict=True)])
        reading = [asyncio.create_task(read_on(served, one)) for one in found]
        changed = ServeConfig(**settings_for(model, serve_port, "updated", max_queued_requests=7, **settings))
        built = await asyncio.to_thread(build_application, changed)
        await asyncio.to_thread(lambda: serve.run(built, name="updated", route_prefix="/updated"))
        await asyncio.gather(*reading)
        assert before not in replica_processes("updated")
        for one, expected in zip(found, whole, strict=True):
            assert await moves_of("updated", one.stream_id) > 0
            assert_same(one, expected, 1)


async def moves_of(app: str, stream_id: str) -> int:
    """How often a complete stream has gone to another replica."""
    kept = await ActorStreamJournal(app).claim("a test", stream_id)
    assert kept is not None
    assert kept.is_ended
    return kept.start.epoch


def used_blocks(app: str) -> int:
    """Of all groups."""
    names = [name for name in actors_of(app) if ":kv_manager:" in name]
    return sum(num_used_blocks(ray.get_actor(name, namespace=NAMESPACE)) for name in names)
