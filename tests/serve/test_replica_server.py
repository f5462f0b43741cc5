"""The HTTP server of a model's replica behind a front, without Ray."""

from __future__ import annotations

import asyncio

import httpx
from starlette.types import Receive, Scope, Send

from max_ray.serve.replica_server import ReplicaServer


async def test_it_counts_answers_and_waits_at_its_end() -> None:
    begun, gate = asyncio.Event(), asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
        begun.set()
        await gate.wait()
        await send({"type": "http.response.body", "body": b"done"})

    server = await ReplicaServer.start(app, "127.0.0.1")
    async with httpx.AsyncClient() as client:
        asking = asyncio.create_task(client.get(server.url))
        await begun.wait()
        assert server.num_open == 1
        closing = asyncio.create_task(server.close(5.0))
        await asyncio.sleep(0.3)
        assert not closing.done(), "a request is under way"
        gate.set()
        assert (await asking).text == "done"
        await closing
        assert server.num_open == 0
        try:
            await client.get(server.url)
        except httpx.ConnectError:
            return
    raise AssertionError("it takes connections after its end")


async def test_what_takes_too_long_is_cut_off() -> None:
    begun = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        begun.set()
        await asyncio.sleep(60)

    server = await ReplicaServer.start(app, "127.0.0.1")
    async with httpx.AsyncClient() as client:
        asking = asyncio.create_task(client.get(server.url))
        await begun.wait()
        async with asyncio.timeout(5):
            await server.close(0.2)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
