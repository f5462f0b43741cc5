"""Thousands of malformed and borderline requests to a server in this process: bodies, paths, headers, broken HTTP.

    python -m pytest -m slow -s tests/http/test_malformed_sockets.py

`tests/serve/test_malformed_requests.py` sends the same ones through Ray Serve and its proxy.
"""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import uvicorn

from max_ray.serve.api.route_table import ROUTES
from tests.http.batch_servers import Server, opened_store
from tests.http.fake_engine import FakeEngine
from tests.http.malformed import GET_ROUTES, POST_ROUTES, Generator
from tests.http.raw_requests import answered

NUM_REQUESTS = 20_000
NUM_SETTLED = 4_000
MAX_GROWTH = 8 << 20
CLIENTS = 8


@pytest.fixture
async def port(engine: FakeEngine, tmp_path: Path) -> AsyncIterator[int]:
    """Of a server with every route, files and batches included."""
    engine.model_name = "tiny"
    async with opened_store(tmp_path) as store:
        api = Server(engine, store).api
        config = uvicorn.Config(api, host="127.0.0.1", port=0, log_level="critical", lifespan="off")
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
        server.should_exit = True
        await serving


async def send(port: int, generator: Generator, number: int, statuses: Counter[int]) -> int:
    """The resident bytes of this process after so many more requests."""
    left = iter(range(number))

    async def client() -> None:
        for _ in left:
            statuses[await answered(port, generator.next())] += 1

    await asyncio.gather(*[client() for _ in range(CLIENTS)])
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def test_the_generator_knows_every_route() -> None:
    asked = [path.split("/") for path in (*POST_ROUTES, *GET_ROUTES)]
    for route in ROUTES:
        parts = route.path.split("/")
        is_asked = any(
            len(path) == len(parts) and all(b.startswith("{") or a == b for a, b in zip(path, parts, strict=True))
            for path in asked
        )
        assert is_asked, route.path


async def test_malformed_requests(port: int) -> None:
    statuses: Counter[int] = Counter()
    await send(port, Generator(3, {}), 400, statuses)
    assert statuses[200] > 20
    assert statuses[400] > 100


@pytest.mark.slow
@pytest.mark.timeout(3600)
async def test_twenty_thousand_malformed_requests(port: int) -> None:
    """No status of 500 and above, an error object with each of 400 and above, and no memory kept."""
    generator, statuses = Generator(7, {}), Counter[int]()
    settled = await send(port, generator, NUM_SETTLED, statuses)
    final = await send(port, generator, NUM_REQUESTS - NUM_SETTLED, statuses)
    print(f"statuses {sorted(statuses.items())}; memory {settled >> 20} MiB, then {final >> 20} MiB")
    assert statuses[200] > 1000, "some are valid"
    assert final - settled <= MAX_GROWTH
