"""Servers for schemathesis: every route, API keys, and things that the paths of `/openapi.json` can name."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import uvicorn

from max_ray.serve.api.batches.runner import BatchRunner
from max_ray.serve.api.engine import ApiOptions
from max_ray.serve.api.routes import build_api, build_line_api
from max_ray.tokenization.tokenizer import TextTokenizer
from tests.byte_tokenizer import write_byte_level
from tests.http.batch_servers import chat, jsonl, opened_store
from tests.http.fake_engine import FakeEngine

KEY = "key-of-schemathesis"


@dataclass(frozen=True)
class Described:
    """A running server.

    Args:
        url: Its address.
        ids: What its paths can name, by the path's parameter.
    """

    url: str
    ids: dict[str, str]

    def client(self) -> httpx.Client:
        """A client with the key."""
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=30)


@contextmanager
def described_server(folder: Path) -> Iterator[Described]:
    """A server in a thread of its own, over a fake engine that generates text."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    stop = asyncio.Event()
    started: list[str] = []
    serving = asyncio.run_coroutine_threadsafe(_serve(folder, stop, started), loop)
    try:
        while not started and not serving.done():
            threading.Event().wait(0.01)
        if not started:
            serving.result()
        yield Described(started[0], _made(Described(started[0], {})))
    finally:
        loop.call_soon_threadsafe(stop.set)
        serving.result(timeout=30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _serve(folder: Path, stop: asyncio.Event, started: list[str]) -> None:
    tokenizer = TextTokenizer(write_byte_level(folder), max_length=1000)
    engine = FakeEngine(tokenizer, lambda context: "hello")
    async with opened_store(folder / "files") as store:
        runner = BatchRunner("r0", build_line_api(engine), store, lambda: engine.num_waiting, 8)
        api = build_api(engine, ApiOptions(api_keys=(KEY,)), batches=runner)
        server = uvicorn.Server(uvicorn.Config(api, port=0, log_level="critical", lifespan="off"))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        started.append(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}")
        await stop.wait()
        server.should_exit = True
        await serving


def _made(server: Described) -> dict[str, str]:
    """Things that answers are about: a response, a request, a file, a batch."""
    with server.client() as client:
        response = client.post("/v1/responses", json={"input": "hi", "background": True}).json()["id"]
        completion = client.post("/v1/completions", json={"prompt": "hi"}).json()["id"]
        upload = {"file": ("in.jsonl", jsonl([chat("a")]))}
        file = client.post("/v1/files", files=upload, data={"purpose": "batch"}).json()["id"]
        body = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        batch = client.post("/v1/batches", json=body).json()["id"]
    found = {"response_id": response, "answer_id": completion, "file_id": file, "batch_id": batch}
    return {**found, "name": "chat.js", "model": "fake"}
