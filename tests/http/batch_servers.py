"""Servers with a store of files and batches, without Ray and without a socket."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai

from max_ray.serve.api.batches.runner import BatchRunner
from max_ray.serve.api.batches.store import BatchStore, LocalBatchStore
from max_ray.serve.api.engine import ApiOptions
from max_ray.serve.api.files.directory import FileDirectory
from max_ray.serve.api.routes import build_api, build_line_api
from tests.http.fake_engine import FakeEngine


class Clock:
    """Unix time that a test moves."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def opened_store(folder: Path, clock: Clock | None = None, **limits: Any) -> AsyncIterator[LocalBatchStore]:
    """A store over a folder; it leaves the folder as a process does that dies."""
    options = {"max_bytes": 2**30, **({"clock": clock} if clock else {}), **limits}
    store = LocalBatchStore(FileDirectory(folder, **options))
    await store.open()
    try:
        yield store
    finally:
        await store.close()


class Server:
    """One replica: a runner and an application over a store that others may share."""

    def __init__(self, engine: FakeEngine, store: BatchStore, name: str = "r0", concurrency: int = 8) -> None:
        self.runner = BatchRunner(name, build_line_api(engine), store, lambda: engine.num_waiting, concurrency)
        self.api = build_api(engine, ApiOptions(), batches=self.runner)

    def http(self) -> httpx.AsyncClient:
        """A client of the routes."""
        transport = httpx.ASGITransport(self.api, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://test")

    def client(self) -> openai.AsyncOpenAI:
        """The official client."""
        return openai.AsyncOpenAI(api_key="k", base_url="http://test/v1", http_client=self.http(), max_retries=0)


def line(custom_id: str, body: Any, url: str = "/v1/chat/completions", **changes: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body, **changes}


def chat(custom_id: str, text: str = "hi", **fields: Any) -> dict[str, Any]:
    return line(custom_id, {"model": "fake", "messages": [{"role": "user", "content": text}], **fields})


def jsonl(lines: Sequence[Any]) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in lines)


def parsed(content: bytes) -> list[dict[str, Any]]:
    return [json.loads(one) for one in content.splitlines()]
