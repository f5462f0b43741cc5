"""A fake engine behind the real routes, called without a socket (`client`) or over one (`server_url`)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
import uvicorn

from max_ray.serve.api.engine import ApiOptions
from max_ray.serve.api.routes import build_api
from max_ray.serve.api.structured_output_fields import close_checker
from max_ray.tokenization.tokenizer import TextTokenizer
from tests.byte_tokenizer import write_byte_level
from tests.http.fake_engine import FakeEngine


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer(write_byte_level(tmp_path_factory.mktemp("http-tokenizer")), max_length=200)


@pytest.fixture(scope="module", autouse=True)
def _no_process_is_left() -> Iterator[None]:
    yield
    close_checker()


@pytest.fixture
def engine(tokenizer: TextTokenizer) -> FakeEngine:
    return FakeEngine(tokenizer, lambda context: "hello")


@pytest.fixture
async def client(engine: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(build_api(engine), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.fixture
async def guarded(engine: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    """The same with API keys and a small body limit."""
    api = build_api(engine, ApiOptions(api_keys=("key-one", "key-two"), max_body_bytes=1000))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://test") as client:
        yield client


@pytest.fixture
async def server_url(engine: FakeEngine) -> AsyncIterator[str]:
    """A real server on a free loopback port, on this test's event loop."""
    config = uvicorn.Config(build_api(engine), host="127.0.0.1", port=0, log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    await serving
