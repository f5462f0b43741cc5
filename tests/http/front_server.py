"""Two fake engines behind the front, each on a server of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import uvicorn
from starlette.types import ASGIApp

from max_ray.serve.api.api_context import ModelDetails
from max_ray.serve.api.engine import ApiOptions
from max_ray.serve.api.front.forwarder import Forwarder
from max_ray.serve.api.front.replica_table import ReplicaTable
from max_ray.serve.api.front.routes import FrontApp
from max_ray.serve.api.front.served_model import ModelTable, ServedModel, served_model
from max_ray.serve.api.front.state import FrontState
from max_ray.serve.api.responses.store import LocalResponseStore
from max_ray.serve.api.routes import build_api
from max_ray.tokenization.tokenizer import TextTokenizer
from tests.http.fake_engine import FakeEngine

NAMES = {"alpha": ("first", "org/alpha"), "beta": ()}


@asynccontextmanager
async def serving(app: ASGIApp) -> AsyncIterator[str]:
    """The URL of the application on a free loopback port."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="off", timeout_keep_alive=75)
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await task


@dataclass
class Front:
    """A running front.

    Args:
        engines: The models' engines, by name.
        urls: Of the models' own servers, by name.
        state: What the front knows.
        forwarder: What passes requests on.
        woken: Names of models that were woken, one a time.
        url: Of the front.
    """

    engines: dict[str, FakeEngine]
    urls: dict[str, str]
    state: FrontState
    forwarder: Forwarder
    woken: list[str] = field(default_factory=list)
    may_wake: asyncio.Event = field(default_factory=asyncio.Event)
    url: str = ""


def engine_of(tokenizer: TextTokenizer, name: str) -> FakeEngine:
    """An engine that says its name."""
    engine = FakeEngine(tokenizer, lambda context: f"{name} says hello")
    engine.model_name, engine.model_aliases = name, NAMES[name]
    engine.metrics.model_name = name
    return engine


def described(engine: FakeEngine, min_replicas: int) -> ServedModel:
    """What the front tells of an engine's model."""
    details = ModelDetails("llama", "gguf", "q4_k", 1000)
    return served_model(engine, details, min_replicas=min_replicas, idle_s=60.0, start_timeout_s=2.0)


@asynccontextmanager
async def running_front(
    tokenizer: TextTokenizer, options: ApiOptions | None = None, *, asleep: tuple[str, ...] = ()
) -> AsyncIterator[Front]:
    """The front and its two models. Those `asleep` have no replica until a request wakes them."""
    store = LocalResponseStore()
    engines = {name: engine_of(tokenizer, name) for name in NAMES}
    async with AsyncExitStack() as stack:
        urls = {
            name: await stack.enter_async_context(serving(build_api(engine, options, store)))
            for name, engine in engines.items()
        }

        async def wake(name: str) -> str:
            front.woken.append(name)
            await front.may_wake.wait()
            return urls[name]

        models = ModelTable([described(engine, int(name not in asleep)) for name, engine in engines.items()])
        replicas = ReplicaTable(wake)
        for name, url in urls.items():
            if name not in asleep:
                replicas.update(name, {url: True})
        state = FrontState(models, replicas)
        forwarder = Forwarder(models, replicas, options or ApiOptions())
        front = Front(engines, urls, state, forwarder)
        front.may_wake.set()
        front.url = await stack.enter_async_context(serving(FrontApp(state, forwarder, options, store)))
        try:
            yield front
        finally:
            await forwarder.close()
