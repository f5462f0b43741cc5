"""Streams of a replica that ends: they go on for `drain_timeout_s`, and end with an error event after that."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from max_ray.config import ServeConfig
from max_ray.serve.drain import DrainState, end_streams_in_time
from tests.serve.applications import running
from tests.serve.commands import until_said
from tests.serve.conftest import Served, free_port, settings_for
from tests.serve.test_server_watch import serve_command

ENDLESS = {"model": "tiny", "prompt": "x", "max_tokens": 100_000, "temperature": 0, "ignore_eos": True, "stream": True}


async def ended_after(limit_s: float, *, shorter: float | None = None, drains_after_s: float = 0.3) -> float:
    """Seconds from the beginning of the drain to the end of the streams."""
    began, ended = time.monotonic() + drains_after_s, []

    def state() -> DrainState:
        return DrainState(time.monotonic() >= began, limit_s)

    await end_streams_in_time(lambda: ended.append(time.monotonic()), "app", state, lambda _: shorter)
    (end,) = ended
    return end - began


async def test_streams_end_a_moment_before_serve_kills_the_replica() -> None:
    assert 0.8 <= await ended_after(1.0) < 1.0 + 0.3
    assert 0.4 <= await ended_after(100.0, shorter=0.5) < 1.0
    assert 0.4 <= await ended_after(0.5, shorter=100.0) < 1.0, "never longer than Serve waits"


async def test_a_replica_that_does_not_drain_ends_nothing() -> None:
    ended: list[int] = []
    waiting = asyncio.create_task(
        end_streams_in_time(lambda: ended.append(1), "app", lambda: DrainState(False, 0.1), lambda _: None)
    )
    await asyncio.sleep(0.6)
    assert not waiting.done()
    waiting.cancel()
    assert ended == []


async def events(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> list[str]:
    """The data of all events, until the connection ends."""
    async with client.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as response:
        assert response.status_code == 200
        return [line.removeprefix("data: ") async for line in response.aiter_lines() if line.startswith("data: ")]


def is_error(event: str) -> bool:
    return event != "[DONE]" and "server is stopping" in json.loads(event).get("error", {}).get("message", "")


@pytest.mark.ray
@pytest.mark.slow
async def test_a_removed_replica_finishes_short_streams_and_ends_long_ones_with_an_event(
    ray_cluster: Any, long_llama: Path, serve_port: int
) -> None:
    from max_ray.serve.application import build_application

    settings = settings_for(long_llama, serve_port, "drained", drain_timeout_s=6.0, max_length=100_200)
    built = await asyncio.to_thread(build_application, ServeConfig(**settings))
    async with running(built, serve_port, "drained") as served, httpx.AsyncClient(headers=served.headers) as client:
        short = {**ENDLESS, "max_tokens": 300}
        streams = [asyncio.create_task(events(client, served.url, body)) for body in (ENDLESS, short, ENDLESS)]
        await asyncio.sleep(0.5)
        await remove(served)
        long, finished, other = await asyncio.wait_for(asyncio.gather(*streams), 60)
    assert finished[-1] == "[DONE]"
    assert is_error(long[-2] if long[-1] == "[DONE]" else long[-1])
    assert is_error(other[-2] if other[-1] == "[DONE]" else other[-1])


async def remove(served: Served) -> None:
    from ray import serve

    await asyncio.to_thread(serve.delete, served.app_name)


@pytest.fixture(scope="module")
def long_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which a stream can last for minutes."""
    from tests.checkpoints import make_llama

    folder = make_llama(tmp_path_factory.mktemp("models") / "long-llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 200_000}))
    return folder


@pytest.mark.ray
@pytest.mark.slow
async def test_the_end_of_the_server_is_an_event_to_its_streams(long_llama: Path, tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [*serve_command(long_llama, port), "--max-length", "100200", "--served-model-name", "tiny"]
    with until_said(command, "Serving", tmp_path / "log") as (process, _):
        async with httpx.AsyncClient() as client:
            stream = asyncio.create_task(events(client, url, ENDLESS))
            await asyncio.sleep(1.0)
            process.terminate()
            started = time.monotonic()
            ended = await asyncio.wait_for(stream, 30)
            assert is_error(ended[-2] if ended[-1] == "[DONE]" else ended[-1])
            await asyncio.to_thread(process.wait, 30)
            assert time.monotonic() - started < 15, "ten on a machine that is not busy: Docker's grace"
