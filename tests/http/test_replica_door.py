"""The outermost layer of a replica's HTTP server, around an application that stands for Ray Serve's part."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from max_ray.serve.api.routes import build_api
from max_ray.serve.replica_door import REPLICA_DOOR, middlewares
from tests.http.fake_engine import FakeEngine
from tests.http.test_errors import error_of
from tests.http.test_protocol import exchange, post


class Serve:
    """What Serve does around an application: refuses in plain text, and keeps the headers that it was sent."""

    def __init__(self, engine: FakeEngine) -> None:
        self.headers: dict[str, str] = {}
        self._api = build_api(engine)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.headers = {name.decode(): value.decode() for name, value in scope["headers"]}

        async def send_message(message: Any) -> None:
            await send(message)

        path = scope["path"]
        if path in ("/-/healthz", "/-/routes"):
            await _plain(200, "success", send)
        elif path == "/busy":
            await _plain(503, "Request dropped due to backpressure", send)
        else:
            await self._api(scope, receive, send_message)


async def _plain(status: int, text: str, send: Send) -> None:
    headers = [[b"content-type", b"text/plain; charset=utf-8"], [b"retry-after", b"1"]]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})


@pytest.fixture
def behind(engine: FakeEngine) -> Serve:
    return Serve(engine)


@pytest.fixture
async def door_url(behind: Serve) -> AsyncIterator[str]:
    (door,) = middlewares()
    app = door.cls(behind, *door.args, **door.kwargs)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="off"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    await serving


def test_serve_finds_the_door_by_its_name() -> None:
    from ray._common.utils import import_attr

    (path,) = REPLICA_DOOR.values()
    assert import_attr(path) is middlewares


async def test_serve_does_not_see_the_headers_that_it_obeys(door_url: str, behind: Serve, engine: FakeEngine) -> None:
    engine.gate = asyncio.Event()
    headers = {"x-request-timeout-seconds": "0.1", "x-request-disconnect-disabled": "?0", "x-request-id": "mine"}
    async with httpx.AsyncClient(base_url=door_url) as client:
        reply = await client.post("/v1/completions", json={"prompt": "ab"}, headers=headers)
    assert error_of(reply, 408)["code"] == "request_timeout"
    assert "x-request-timeout-seconds" not in behind.headers
    assert behind.headers["x-request-disconnect-disabled"] == "?1"
    assert behind.headers["x-request-id"] == "mine"


async def test_headers_that_serve_could_not_read_are_left_out(door_url: str, behind: Serve) -> None:
    names = ("x-request-id", "serve_multiplexed_model_id", "x-session-id")
    headers: Any = {name.encode(): b"\xff" for name in names}
    async with httpx.AsyncClient(base_url=door_url) as client:
        assert (await client.get("/v1/models", headers=headers)).status_code == 200
    assert not set(names) & set(behind.headers)


async def test_plain_refusals_become_error_objects(door_url: str) -> None:
    async with httpx.AsyncClient(base_url=door_url) as client:
        reply = await client.get("/busy")
        error = error_of(reply, 503)
        assert (error["type"], error["message"]) == ("replica_unavailable", "Request dropped due to backpressure")
        assert (reply.headers["content-type"], reply.headers["retry-after"]) == ("application/json", "1")
        assert (await client.get("/metrics")).headers["content-type"].startswith("text/plain")


async def test_what_serve_answers_itself(door_url: str) -> None:
    async with httpx.AsyncClient(base_url=door_url) as client:
        for path in ("/-/routes", "/%2d/routes", "/-/routes/"):
            assert error_of(await client.get(path), 404)["code"] == "route_not_found"
        for host in ("127.0.0.1:30000", "localhost", "10.2.3.4:30000", "[fd00::1]"):
            assert (await client.get("/-/healthz", headers={"Host": host})).status_code == 200
        for headers in ({"Host": "evil.example"}, {"Origin": "http://x"}, {"Sec-Fetch-Site": "same-origin"}):
            error_of(await client.get("/-/healthz", headers=headers), 403)
    head, _ = await exchange(door_url, "GET /-/healthz HTTP/1.0\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")


async def test_a_stream_to_http_1_0(door_url: str) -> None:
    head, body = await exchange(door_url, post("1.0", json.dumps({"prompt": "ab", "stream": True})))
    assert b"transfer-encoding" not in head.lower()
    assert body.startswith(b"data: ")
    assert body.endswith(b"data: [DONE]\n\n")
