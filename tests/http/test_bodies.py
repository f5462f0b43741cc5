"""Bodies as bytes: what is JSON, what is taken and in which time, and how large ones wait for one another."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import uvicorn

from max_ray.serve.api.engine import ApiOptions
from max_ray.serve.api.routes import build_api
from tests.http.fake_engine import FakeEngine
from tests.http.test_errors import error_of

COMPLETIONS = "/v1/completions"
LONG = b" " * 70_000
"""Space that makes a body too long to be parsed at once."""


async def post(client: httpx.AsyncClient, body: bytes, **headers: str) -> httpx.Response:
    return await client.post(COMPLETIONS, content=body, headers={"Content-Type": "application/json", **headers})


@pytest.mark.parametrize("end", [b"", LONG])
async def test_a_byte_order_mark_is_passed_over(client: httpx.AsyncClient, end: bytes) -> None:
    assert (await post(client, b'\xef\xbb\xbf{"prompt": "a"}' + end)).status_code == 200


@pytest.mark.parametrize("end", [b"", LONG])
@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "\xff"}',
        '{"prompt": "a"}'.encode("utf-16"),
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"prompt": "a"} {}',
        b'{"prompt": "a",}',
        b"",
    ],
)
async def test_what_is_not_json(client: httpx.AsyncClient, body: bytes, end: bytes) -> None:
    error = error_of(await post(client, body + end), 400)
    assert "JSON" in error["message"]
    assert "sys." not in error["message"]


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
async def test_what_is_no_number_is_named(client: httpx.AsyncClient, constant: str) -> None:
    error = error_of(await post(client, f'{{"prompt": "a", "temperature": {constant}}}'.encode()), 400)
    assert error["param"] == "temperature"
    assert constant in error["message"]
    error = error_of(await post(client, f'{{"prompt": [1, {constant}]}}'.encode()), 400)
    assert error["param"] == "prompt[1]"
    error_of(await post(client, f'{{"prompt": "a", "temperature": {constant}}}'.encode() + LONG), 400)


@pytest.mark.parametrize("end", [b"", LONG])
@pytest.mark.parametrize(
    ("body", "name"),
    [(b'{"prompt": "a", "seed": 1, "prompt": "b"}', "prompt"), (b'{"prompt": "a", "metadata": {"k":"","k":""}}', "k")],
)
async def test_a_key_that_is_given_twice(client: httpx.AsyncClient, body: bytes, name: str, end: bytes) -> None:
    error = error_of(await post(client, body + end), 400)
    assert name in error["message"]
    assert error["param"] in (name, None)


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "gzip, identity", "x"])
async def test_compressed_bodies_are_not_taken(client: httpx.AsyncClient, engine: FakeEngine, encoding: str) -> None:
    reply = await post(client, b'{"prompt": "a"}', **{"Content-Encoding": encoding})
    assert "uncompressed" in error_of(reply, 415)["message"]
    assert (await post(client, b'{"prompt": "a"}', **{"Content-Encoding": "identity"})).status_code == 200


async def test_many_mistakes_are_three_sentences(client: httpx.AsyncClient) -> None:
    for end in (b"", LONG):
        fields = {f"field{number}": number for number in range(4000)}
        error = error_of(await post(client, json.dumps({"prompt": "a", **fields}).encode() + end), 400)
        assert error["message"] == "Unknown field 'field0'. Unknown field 'field1'. Unknown field 'field2'."


async def test_a_long_name_is_cut(client: httpx.AsyncClient) -> None:
    for body in ({"prompt": "a", "k" * 60_000: 1}, {"prompt": "a", "model": "m" * 60_000}):
        reply = await client.post(COMPLETIONS, json=body)
        assert error_of(reply, 400)
        assert len(reply.content) < 500


async def test_long_requests_get_what_short_ones_get(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    answers = []
    for end in (b"", LONG):
        answers.append((await post(client, b'{"prompt": "a", "stop": ["l"]}' + end)).json()["choices"])
        error = error_of(await post(client, b'{"prompt": "a", "temperature": "x"}' + end), 400)
        assert error["param"] == "temperature"
    assert answers[0] == answers[1]


@pytest.mark.parametrize("chat", [False, True])
async def test_what_cannot_fit_is_refused_at_once(client: httpx.AsyncClient, engine: FakeEngine, chat: bool) -> None:
    """Without the chat template: its text would be made first."""
    many = [{"role": "user", "content": ""}] * 2000
    body = {"messages": many} if chat else {"prompt": [[7], [7] * 2000]}
    reply = await client.post("/v1/chat/completions" if chat else COMPLETIONS, json=body)
    error = error_of(reply, 400)
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == ("messages" if chat else "prompt")
    assert "at least 2000 tokens" in error["message"]


# How they arrive.


@asynccontextmanager
async def served(engine: FakeEngine, **options: Any) -> AsyncIterator[int]:
    api = build_api(engine, ApiOptions(**options))
    server = uvicorn.Server(uvicorn.Config(api, host="127.0.0.1", port=0, log_level="warning", lifespan="off"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await serving


async def begin(port: int, announced: int, sent: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {announced}\r\n\r\n".encode() + sent)
    await writer.drain()
    return reader, writer


@pytest.mark.parametrize("announced", [1000, 100_000])
async def test_a_body_that_does_not_come_is_given_up(engine: FakeEngine, announced: int) -> None:
    async with served(engine, body_timeout_s=0.3) as port:
        reader, writer = await begin(port, announced, b'{"prompt": ')
        async with asyncio.timeout(5):
            reply = await reader.read()
        writer.close()
    head, _, body = reply.partition(b"\r\n\r\n")
    assert b" 408 " in head.split(b"\r\n")[0]
    assert json.loads(body)["error"]["code"] == "request_timeout"


async def test_slow_bodies_do_not_hold_others_up(engine: FakeEngine) -> None:
    """They took no more memory than they sent, so there is room for others."""
    async with served(engine) as port:
        slow = [await begin(port, 8_000_000, b'{"prompt": "' + b"a" * 1000) for _ in range(30)]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            async with asyncio.timeout(20):
                replies = await asyncio.gather(*[post(client, b'{"prompt": "a"}' + b" " * 4_000_000) for _ in range(8)])
        for _, writer in slow:
            writer.close()
    assert [reply.status_code for reply in replies] == [200] * 8


async def test_bodies_that_stopped_in_the_middle_do_not_hold_others_up(engine: FakeEngine) -> None:
    """They fill the memory that there is: while others wait for it, they are given up after a second."""
    async with served(engine) as port:
        sent = b'{"prompt": "' + b"a" * 1_000_000
        slow = [asyncio.create_task(begin(port, 8_000_000, sent)) for _ in range(4)]
        await asyncio.wait(slow, timeout=0.5)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=25) as client:
            reply = await post(client, b'{"prompt": "a"}' + b" " * 4_000_000)
        for task in slow:
            task.cancel()
        for ended in await asyncio.gather(*slow, return_exceptions=True):
            if not isinstance(ended, BaseException):
                ended[1].close()
    assert reply.status_code == 200


async def test_many_large_bodies_are_all_answered(engine: FakeEngine) -> None:
    async with served(engine) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        async with asyncio.timeout(60):
            sizes = [100, 100_000, 1_000_000, 8_000_000] * 5
            replies = await asyncio.gather(*[post(client, b'{"prompt": "a"}' + b" " * size) for size in sizes])
    assert [reply.status_code for reply in replies] == [200] * 20


async def test_serves_own_reader_does_not_run_ahead(engine: FakeEngine) -> None:
    """Under Serve a body comes through a queue that Serve fills as fast as the client sends."""
    http_util = pytest.importorskip("ray.serve._private.direct_ingress_http_util")
    loop = asyncio.get_running_loop()
    pieces = [b'{"prompt": "a"}', *[b" " * 100_000] * 50]
    sent: list[int] = []

    async def receive() -> dict[str, Any]:
        if len(sent) == len(pieces):
            await asyncio.sleep(3600)
        sent.append(1)
        return {"type": "http.request", "body": pieces[len(sent) - 1], "more_body": len(sent) < len(pieces)}

    scope = {
        **{"type": "http", "method": "POST", "path": COMPLETIONS, "raw_path": COMPLETIONS.encode(), "root_path": ""},
        **{"query_string": b"", "scheme": "http", "http_version": "1.1", "server": ("127.0.0.1", 8000)},
        "headers": [(b"content-type", b"application/json"), (b"host", b"localhost"), (b"content-length", b"5000015")],
    }
    proxy = http_util.ASGIDIReceiveProxy(scope, receive, loop)
    fetching = proxy.fetch_until_disconnect_task()
    statuses: list[int] = []

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    lead: list[int] = []

    async def consume() -> dict[str, Any]:
        message: dict[str, Any] = await proxy()
        lead.append(len(sent) - len(lead) - 1)
        await asyncio.sleep(0.001)
        return message

    consume.queue = proxy.queue  # type: ignore[attr-defined]
    await build_api(engine)(scope, consume, send)  # type: ignore[arg-type]
    fetching.cancel()
    assert statuses == [200]
    assert max(lead) <= 4, "messages read and not taken yet"
