"""The page in a real browser, over the real routes and a fake engine. Skipped where there is no Chromium."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from max_ray.serve.api.engine import ApiOptions
from max_ray.serve.api.routes import build_api
from max_ray.serve.api.structured_output_fields import close_checker
from max_ray.tokenization.tokenizer import TextTokenizer
from tests.browser.chromium import CHROMIUM, Page, chromium, open_page
from tests.byte_tokenizer import write_byte_level
from tests.http.fake_engine import FakeEngine

NO_CHROMIUM = "no Chromium on this machine: `apt-get install chromium` makes the tests of the page run"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents and CHROMIUM is None:
            item.add_marker(pytest.mark.skip(reason=NO_CHROMIUM))


@pytest.fixture(scope="session")
def devtools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with chromium(tmp_path_factory.mktemp("chromium")) as address:
        yield address


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer(write_byte_level(tmp_path_factory.mktemp("page-tokenizer")), max_length=4000)


@pytest.fixture(scope="module", autouse=True)
def _no_process_is_left() -> Iterator[None]:
    yield
    close_checker()


@pytest.fixture
def engine(tokenizer: TextTokenizer) -> FakeEngine:
    return FakeEngine(tokenizer, lambda context: "hello")


@asynccontextmanager
async def served(engine: FakeEngine, options: ApiOptions | None = None, prefix: str = "") -> AsyncIterator[str]:
    """The page's address, on a free port and so with an empty storage."""
    api = build_api(engine, options)

    async def below_prefix(scope: Scope, receive: Receive, send: Send) -> None:
        await api({**scope, "root_path": prefix}, receive, send)  # as Ray Serve does

    config = uvicorn.Config(below_prefix, host="127.0.0.1", port=0, log_level="warning", lifespan="off")
    config.timeout_graceful_shutdown = 1
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}{prefix}"
    server.should_exit = True
    await serving


@pytest.fixture
async def page(devtools: str, engine: FakeEngine) -> AsyncIterator[Page]:
    """The page, loaded. At its end there may be no error of a script and of the policy, and no foreign request."""
    async with served(engine) as url, open_page(devtools) as page:
        await page.goto(url)
        await page.until("document.querySelector('#model option') !== null")
        yield page
        assert page.problems == []
        assert {address.split("/")[2] for address in page.requested if address.startswith("http")} == {url[7:]}
