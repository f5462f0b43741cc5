"""Replicas that sleep, die, or break off, behind the front."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from max_ray.errors import WorkerGroupError
from max_ray.serve.api.front.replica_table import ReplicaTable
from max_ray.serve.api.front.served_model import ServedModel
from max_ray.tokenization.tokenizer import TextTokenizer
from tests.http.front_server import Front, running_front

BODY: dict[str, Any] = {"model": "beta", "prompt": "a", "max_tokens": 30}
LATE = {"x-request-timeout-seconds": "0.1"}


@pytest.fixture
async def sleepy(tokenizer: TextTokenizer) -> AsyncIterator[Front]:
    """Beta has no replica until a request wakes it."""
    async with running_front(tokenizer, asleep=("beta",)) as front:
        yield front


@asynccontextmanager
async def broken_server(answer: bytes) -> AsyncIterator[str]:
    """The URL of a server that reads a request, writes these bytes and closes the connection."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_readings_wake_nothing(sleepy: Front) -> None:
    async with httpx.AsyncClient(base_url=sleepy.url) as client:
        for path in ("/health", "/ping", "/metrics", "/v1/models", "/v1/models/beta", "/v1/server", "/", "/docs"):
            assert (await client.get(path)).status_code == 200, path
        for path in ("/api/tags", "/api/ps", "/api/version", "/version", "/openapi.json"):
            assert (await client.get(path)).status_code == 200, path
        assert (await client.get("/v1/server", params={"model": "beta"})).status_code == 503
        assert (await client.get("/v1/models/beta")).json()["state"] == "idle"
        assert [one["name"] for one in (await client.get("/api/ps")).json()["models"]] == ["alpha"]
        assert 'max_ray_replicas{model_name="beta"} 0.0' in (await client.get("/metrics")).text
    assert sleepy.woken == []


async def test_a_cold_start_answers_when_ready_and_is_one_for_all(sleepy: Front) -> None:
    sleepy.may_wake.clear()
    async with httpx.AsyncClient(base_url=sleepy.url, timeout=20) as client:
        tasks = [asyncio.create_task(client.post("/v1/completions", json=BODY)) for _ in range(8)]
        await asyncio.sleep(0.2)
        assert (await client.get("/v1/models/beta")).json()["state"] == "starting"
        assert not any(task.done() for task in tasks)
        sleepy.may_wake.set()
        replies = await asyncio.gather(*tasks)
        assert {reply.json()["choices"][0]["text"] for reply in replies} == {"beta says hello"}
        await client.post("/v1/completions", json=BODY)
        assert (await client.get("/v1/models/beta")).json()["state"] == "ready"
    assert sleepy.woken == ["beta"]


async def test_a_cold_start_that_takes_too_long_is_a_503(sleepy: Front) -> None:
    sleepy.may_wake.clear()
    async with httpx.AsyncClient(base_url=sleepy.url, timeout=20) as client:
        reply = await client.post("/v1/completions", json=BODY, headers=LATE)
        assert (reply.status_code, reply.json()["error"]["code"]) == (408, "request_timeout")
        reply = await client.post("/v1/completions", json=BODY)
        assert reply.status_code == 503
        assert "within 2 s" in reply.json()["error"]["message"]
        reply = await client.post("/v1/completions", json={**BODY, "model": "alpha"})
        assert reply.status_code == 200


async def test_a_client_that_leaves_during_a_cold_start_asks_nothing_of_the_model(sleepy: Front) -> None:
    sleepy.may_wake.clear()
    async with httpx.AsyncClient(base_url=sleepy.url, timeout=20) as client:
        with pytest.raises(httpx.ReadTimeout):
            await client.post("/v1/completions", json=BODY, timeout=0.2)
    sleepy.may_wake.set()
    await asyncio.sleep(0.2)
    assert sleepy.engines["beta"].contexts == []


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nConten"])
async def test_a_replica_that_ends_before_its_answer_is_replaced_by_another(sleepy: Front, answer: bytes) -> None:
    replicas = sleepy.state.replicas
    async with (
        broken_server(answer) as broken,
        httpx.AsyncClient(base_url=sleepy.url, timeout=20) as client,
    ):
        gone = "http://127.0.0.1:9"
        for streamed in (False, True):
            replicas.update("beta", {broken: True, gone: True})
            reply = await client.post("/v1/completions", json={**BODY, "stream": streamed})
            assert reply.status_code == 200, reply.text
    assert sleepy.woken.count("beta") >= 1
    assert len(sleepy.engines["beta"].contexts) == 2


async def test_a_replica_that_ends_within_its_answer(sleepy: Front) -> None:
    """A stream gets an error event; a whole answer is cut off, so that no client takes it for complete."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\n%s\r\n"
    stream = head % (b"text/event-stream; charset=utf-8", b"Transfer-Encoding: chunked\r\n") + b"6\r\ndata: \r\n"
    whole = head % (b"application/json", b"Content-Length: 100\r\n") + b'{"id": '
    async with httpx.AsyncClient(base_url=sleepy.url, timeout=20) as client:
        async with broken_server(stream) as url:
            sleepy.state.replicas.update("beta", {url: True})
            reply = await client.post("/v1/completions", json={**BODY, "stream": True})
            assert '"type": "replica_unavailable"' in reply.text
        async with broken_server(whole) as url:
            sleepy.state.replicas.suspect(sleepy.state.replicas.replicas("beta")[0])
            sleepy.state.replicas.update("beta", {url: True})
            with pytest.raises(httpx.RemoteProtocolError):
                await client.post("/v1/completions", json=BODY)
    assert sleepy.engines["beta"].contexts == []


async def test_a_replica_that_fails_is_an_error_object(sleepy: Front) -> None:
    text = b"HTTP/1.1 500 Internal Server Error\r\nContent-Type: text/plain\r\nContent-Length: 5\r\n\r\nfatal"
    async with broken_server(text) as broken, httpx.AsyncClient(base_url=sleepy.url, timeout=20) as client:
        sleepy.urls["beta"] = broken
        reply = await client.post("/v1/completions", json=BODY)
        assert (reply.status_code, reply.json()["error"]["type"]) == (502, "replica_unavailable")


async def test_nothing_answers_at_all(sleepy: Front) -> None:
    async with (
        broken_server(b"") as broken,
        httpx.AsyncClient(base_url=sleepy.url, timeout=20) as client,
    ):
        sleepy.urls["beta"] = broken
        reply = await client.post("/v1/completions", json=BODY)
        assert (reply.status_code, reply.json()["error"]["type"]) == (502, "replica_unavailable")
        reply = await client.post("/v1/messages", json={**BODY, "messages": []})
        assert (reply.status_code, reply.json()["type"]) == (502, "error")


async def test_health_counts_the_models_that_should_run(sleepy: Front) -> None:
    async with httpx.AsyncClient(base_url=sleepy.url) as client:
        assert (await client.get("/health")).status_code == 200
        (alpha,) = sleepy.state.replicas.replicas("alpha")
        sleepy.state.replicas.update("alpha", {alpha.url: False})
        reply = await client.get("/health")
        assert reply.status_code == 503
        assert "'alpha'" in reply.json()["error"]["message"]


def table() -> ReplicaTable:
    async def wake(model: str) -> str:
        raise WorkerGroupError(model)

    return ReplicaTable(wake)


async def test_requests_are_spread_over_replicas() -> None:
    replicas = table()
    replicas.update("m", {f"http://r{number}": True for number in range(3)})
    chosen = [replicas.choose("m") for _ in range(6)]
    assert sorted(one.url for one in chosen if one) == [
        "http://r0",
        "http://r0",
        "http://r1",
        "http://r1",
        "http://r2",
        "http://r2",
    ]
    (busy, *_) = [one for one in chosen if one]
    with busy.used():
        assert all(one is not None and one.url != busy.url for one in [replicas.choose("m") for _ in range(4)])
    replicas.update("m", {"http://r0": False, "http://r1": True, "http://r2": False})
    assert {one.url for one in [replicas.choose("m") for _ in range(3)] if one} == {"http://r1"}
    assert replicas.choose("m", tried=["http://r0", "http://r1", "http://r2"]) is None


async def test_waiting_for_a_start_that_fails() -> None:
    replicas = table()
    model = ServedModel("m")
    errors = await asyncio.gather(*[replicas.woken(model) for _ in range(3)], return_exceptions=True)
    assert [type(error) for error in errors] == [WorkerGroupError] * 3
    await asyncio.sleep(0)
    assert not replicas.is_waking("m")
