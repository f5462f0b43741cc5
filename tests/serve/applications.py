"""Applications of a test's own on the session's cluster, and what they run in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import serve

from max_ray.actors.messages import NAMESPACE
from max_ray.config import ServeConfig
from max_ray.serve import application
from tests.actors.helpers import actors_of
from tests.serve.conftest import Served, settings_for


@asynccontextmanager
async def deployed(model: Path, port: int, app_name: str, **changes: Any) -> AsyncIterator[Served]:
    """The application under the route /APP_NAME, as long as the block lasts."""
    config = ServeConfig(**settings_for(model, port, app_name, **changes))
    built = await asyncio.to_thread(application.build_application, config)
    async with running(built, port, app_name) as served:
        yield served


@asynccontextmanager
async def running(built: serve.Application, port: int, app_name: str) -> AsyncIterator[Served]:
    await asyncio.to_thread(lambda: serve.run(built, name=app_name, route_prefix=f"/{app_name}"))
    try:
        yield Served(port, app_name, "tiny", f"/{app_name}")
    finally:
        await asyncio.to_thread(serve.delete, app_name)


def replica_processes(app_name: str) -> list[psutil.Process]:
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if f"ServeReplica:{app_name}:" in " ".join(process.cmdline()[:1])
    ]


def worker_pids(app_name: str) -> list[int]:
    """One a rank."""
    workers = sorted(name for name in actors_of(app_name) if ":worker_" in name)
    return [ray.get(ray.get_actor(name, namespace=NAMESPACE).describe.remote()).pid for name in workers]


async def text_of(served: Served, prompt: str, max_tokens: int = 20) -> str:
    answer = await served.client().completions.create(model="tiny", prompt=prompt, max_tokens=max_tokens, temperature=0)
    return answer.choices[0].text
