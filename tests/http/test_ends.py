"""Requests that end early: the client hangs up, its time-out passes, a server in front cancels. What is counted, said,
and left running."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from max_ray.interfaces import PipelineTask
from max_ray.scheduler import SchedulerStats
from max_ray.serve.api.metrics import Metrics
from max_ray.serve.api.routes import build_api
from max_ray.tokenization.embeddings_tokenizer import EmbeddingsTokenizer
from max_ray.tokenization.tokenizer import TextTokenizer
from tests.byte_tokenizer import write_byte_level
from tests.http.fake_engine import FakeEngine
from tests.http.test_errors import error_of

COMPLETION: dict[str, Any] = {"prompt": "ab"}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": COMPLETION,
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/embeddings": {"input": "ab"},
}
CASES = [(route, streamed) for route in BODIES for streamed in (False, True) if not (streamed and "embed" in route)]


class SlowEngine(FakeEngine):
    """Says one token and then nothing; embeds for ever, and notes when that is cancelled."""

    def __init__(self, tokenizer: TextTokenizer, embeds: bool) -> None:
        super().__init__(tokenizer, lambda context: "hello")
        self.gate = asyncio.Event()
        self.jobs: list[asyncio.Future[Any]] = []
        if embeds:
            self.task = PipelineTask.EMBEDDINGS_GENERATION

    def embed(self, contexts: Any) -> Any:
        self.jobs.append(asyncio.get_running_loop().create_future())
        return self.jobs[-1]

    @property
    def num_started(self) -> int:
        return len(self.contexts) + len(self.jobs)

    @property
    def num_ended(self) -> int:
        return len(self.cancelled) + sum(job.cancelled() for job in self.jobs)


def slow_engine(route: str, tokenizer: TextTokenizer, embedder: EmbeddingsTokenizer) -> SlowEngine:
    embeds = route == "/v1/embeddings"
    return SlowEngine(embedder if embeds else tokenizer, embeds)


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingsTokenizer:
    return EmbeddingsTokenizer(write_byte_level(tmp_path_factory.mktemp("embedder")), max_length=64)


def scope_of(path: str, *headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"127.0.0.1"), (b"content-type", b"application/json"), *headers],
        "client": ("127.0.0.1", 5),
        "server": ("127.0.0.1", 8000),
    }


def one_body(body: dict[str, Any]) -> Callable[[], Any]:
    """`receive` of a request whose client then waits."""
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await asyncio.Event().wait()

    return receive


async def started(engine: SlowEngine, route: str, streamed: bool, *headers: tuple[bytes, bytes]) -> Any:
    """The task of a request that has begun to generate, and what it has sent."""
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    body = {**BODIES[route], **({"stream": True} if streamed else {})}
    api = build_api(engine)
    task = asyncio.ensure_future(api(scope_of(route, *headers), one_body(body), send))
    async with asyncio.timeout(5):
        while not engine.num_started or (streamed and len(sent) < 2):
            await asyncio.sleep(0.001)
    return task, sent


def counted(metrics: Metrics, status: int, route: str) -> bool:
    return metrics.snapshot(SchedulerStats()).requests == {(route, status): 1}


@pytest.mark.parametrize(("route", "streamed"), CASES)
async def test_a_request_that_is_cancelled_is_a_hang_up(
    tokenizer: TextTokenizer, embedder: EmbeddingsTokenizer, route: str, streamed: bool
) -> None:
    """So Ray Serve's proxy tells of a client that has gone: it cancels the task, and nothing else."""
    engine = slow_engine(route, tokenizer, embedder)
    task, _ = await started(engine, route, streamed)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert counted(engine.metrics, 499, route)
    assert engine.num_ended == 1


async def test_cancelled_while_the_body_comes_is_a_hang_up(engine: FakeEngine) -> None:
    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        raise AssertionError(message)

    task = asyncio.ensure_future(build_api(engine)(scope_of("/v1/completions"), receive, send))
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert counted(engine.metrics, 499, "/v1/completions")


async def test_cancelled_after_the_last_byte_is_what_was_answered(engine: FakeEngine) -> None:
    holding = asyncio.Event()

    async def send(message: Any) -> None:
        if not message.get("more_body", message["type"] == "http.response.start"):
            holding.set()
            await asyncio.Event().wait()

    task = asyncio.ensure_future(build_api(engine)(scope_of("/v1/completions"), one_body(COMPLETION), send))
    await asyncio.wait_for(holding.wait(), 5)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert counted(engine.metrics, 200, "/v1/completions")


@pytest.mark.parametrize(("route", "streamed"), CASES)
async def test_a_time_out_is_a_408(
    tokenizer: TextTokenizer, embedder: EmbeddingsTokenizer, route: str, streamed: bool
) -> None:
    engine = slow_engine(route, tokenizer, embedder)
    transport = httpx.ASGITransport(build_api(engine))
    headers = {"x-request-timeout-seconds": "0.2"}
    body = {**BODIES[route], **({"stream": True} if streamed else {})}
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        reply = await asyncio.wait_for(client.post(route, json=body, headers=headers), 5)
    if streamed:
        assert reply.status_code == 200
        events = reply.text.removesuffix("\n\n").split("\n\n")
        assert len(events) >= 2, "a first token, then the error"
        error = json.loads(events[-1].removeprefix("data: "))["error"]
    else:
        error = error_of(reply, 408)
    assert (error["type"], error["code"]) == ("timeout", "request_timeout")
    assert "0.2 s" in error["message"]
    assert counted(engine.metrics, 408, route)
    assert engine.num_ended == 1


@pytest.mark.parametrize("value", ["-1", "0", "nan", "1e9", "abc", "inf", "1e400", "", "30"])
async def test_other_values_are_no_time_out(client: httpx.AsyncClient, engine: FakeEngine, value: str) -> None:
    reply = await client.post("/v1/completions", json=COMPLETION, headers={"x-request-timeout-seconds": value})
    assert reply.json()["choices"][0]["text"] == "hello"
    assert counted(engine.metrics, 200, "/v1/completions")


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("value", ["-1", "0", "nan", "1e9", "abc", "0.5", None])
async def test_hanging_up_frees_whatever_the_headers_say(
    server_url: str, engine: FakeEngine, value: str | None, streamed: bool
) -> None:
    engine.gate = asyncio.Event()
    headers = {"x-request-disconnect-disabled": "?1"}
    headers |= {} if value is None else {"x-request-timeout-seconds": value}
    async with httpx.AsyncClient(base_url=server_url, headers=headers) as client:
        asking = asyncio.create_task(client.post("/v1/completions", json={**COMPLETION, "stream": streamed}))
        while not engine.contexts:
            await asyncio.sleep(0.001)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    async with asyncio.timeout(5):
        while not engine.cancelled or not engine.metrics.snapshot(SchedulerStats()).requests:
            await asyncio.sleep(0.01)
    assert counted(engine.metrics, 499, "/v1/completions")


async def test_half_closing_is_hanging_up(server_url: str, engine: FakeEngine) -> None:
    engine.gate = asyncio.Event()
    url = httpx.URL(server_url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    body = json.dumps({**COMPLETION, "stream": True})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write((head + body).encode())
    await reader.readuntil(b"data: ")
    writer.write_eof()
    async with asyncio.timeout(5):
        while not engine.cancelled:
            await asyncio.sleep(0.01)
    writer.close()


async def test_serves_own_time_out_is_counted_as_one(tokenizer: TextTokenizer, embedder: EmbeddingsTokenizer) -> None:
    """Where Serve reads the header too, its clock runs out first: it cancels, a little before this one would."""
    engine = slow_engine("/v1/completions", tokenizer, embedder)
    task, _ = await started(engine, "/v1/completions", False, (b"x-request-timeout-seconds", b"0.3"))
    await asyncio.sleep(0.28)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert counted(engine.metrics, 408, "/v1/completions")
