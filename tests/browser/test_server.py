"""The view of the running server, and images, in Chromium over a real loop with a tiny model that sees images."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from max_ray.interfaces import RequestID
from max_ray.kv_cache import LocalKVCacheClient, PagedKVCacheManager
from max_ray.scheduler import GenerationLoop, RequestActivity, SchedulerLimits
from tests.browser.chromium import Page, open_page
from tests.browser.conftest import served
from tests.http.fake_engine import FakeEngine
from tests.http.test_images import NUM_BLOCKS, WIDE, LoopEngine, ServedModel, encoded

TILES = "[...document.querySelectorAll('.tile')].map((tile) => tile.innerText)"


def activity(phase: str, blocks: range, **fields: int) -> RequestActivity:
    counts = {"prompt_tokens": 100, "cached_tokens": 0, "processed_tokens": 60, "generated_tokens": 5, **fields}
    table = np.array(blocks, dtype=np.int32)
    return RequestActivity(RequestID(), phase, age_s=2.0, blocks=table, **counts)  # type: ignore[arg-type]


async def test_numbers_requests_and_replicas(page: Page, engine: FakeEngine) -> None:
    engine.listed = (
        activity("decode", range(0, 10), cached_tokens=16),
        activity("prefill", range(8, 20), generated_tokens=0),
        activity("queued", range(0)),
    )
    await page.click(".tabs a[data-view=server]")
    await page.until("document.querySelector('.phases') !== null")
    batch, queue, cache = (await page.run(TILES))[2:]
    assert "3\n" in batch
    assert "of 16" in batch
    assert "2\n" in queue
    assert "3.9 %" in cache  # 5 of 128 blocks: the fake engine's numbers
    phases = await page.run("[...document.querySelectorAll('.chip')].map((chip) => chip.innerText)")
    assert phases == ["decode", "prefill", "waits", "healthy", "healthy"]
    assert "60 of 100" in await page.text("#server-view")
    assert await page.run("document.querySelector('canvas').getAttribute('aria-label')") == (
        "20 of 64 blocks are held by 3 requests"
    )
    assert "share (2)" in await page.text("#server-view")
    assert "requests of replica r0" in await page.text("#server-view")


async def test_the_picture_has_a_colour_for_each_request(page: Page, engine: FakeEngine) -> None:
    engine.listed = (activity("decode", range(0, 20)), activity("decode", range(20, 40)))
    await page.run("location.hash = '#server'")
    await page.until("document.querySelector('canvas')?.width > 0 && document.querySelector('.phases') !== null")
    colours = await page.run(
        """(() => {
          const { canvas } = document.querySelector('canvas').getContext('2d');
          const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
          const seen = new Map();
          for (let i = 0; i < data.length; i += 4) {
            const name = `${data[i]},${data[i + 1]},${data[i + 2]},${data[i + 3]}`;
            seen.set(name, (seen.get(name) ?? 0) + 1);
          }
          return [...seen].filter(([name]) => !name.endsWith(',0')).sort((a, b) => b[1] - a[1]).slice(0, 3);
        })()"""
    )
    free, one, two = sorted(count for _, count in colours)[::-1]
    assert abs(one - two) < 0.05 * one, "20 blocks each"
    assert 1.1 < free / one < 1.3, "24 blocks are free"


async def test_the_view_polls_while_it_is_seen(page: Page) -> None:
    def polls() -> int:
        return sum(url.endswith("/v1/server") for url in page.requested)

    await page.run("location.hash = '#server'")
    await page.until("document.querySelector('.spark') !== null")
    before = polls()
    await asyncio.sleep(2.5)
    assert 2 <= polls() - before <= 3
    await page.run("location.hash = '#chat'")
    await asyncio.sleep(0.3)
    before = polls()
    await asyncio.sleep(1.5)
    assert polls() == before


async def test_a_server_that_went_away_is_said_and_found_again(page: Page) -> None:
    await page.run("location.hash = '#server'")
    await page.until("document.querySelector('.spark') !== null")
    offline = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    await page.send("Network.emulateNetworkConditions", offline=True, **offline)
    await page.until("document.querySelector('[role=alert]') !== null")
    assert "The server does not answer." in await page.text("[role=alert]")
    await page.send("Network.emulateNetworkConditions", offline=False, **offline)
    await page.until("document.querySelector('[role=alert]') === null")
    page.problems.clear()  # the browser's own notes of failed requests


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return ServedModel(tmp_path_factory.mktemp("vision") / "model", tmp_path_factory.mktemp("pictures"))


@pytest.fixture
async def vision(model: ServedModel) -> AsyncIterator[LoopEngine]:
    manager = PagedKVCacheManager(model.pipeline.kv_manager.params, NUM_BLOCKS)
    loop = GenerationLoop(model.pipeline, LocalKVCacheClient(manager), SchedulerLimits(4, 12, 20, 8))
    task = asyncio.create_task(loop.run())
    yield LoopEngine(model.tokenizer, loop)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def attach(page: Page, *paths: Path) -> None:
    document = await page.send("DOM.getDocument")
    node = await page.send("DOM.querySelector", nodeId=document["root"]["nodeId"], selector="#files")
    await page.send("DOM.setFileInputFiles", nodeId=node["nodeId"], files=[str(path) for path in paths])


async def test_images_reach_the_model(devtools: str, vision: LoopEngine, tmp_path: Path) -> None:
    path = tmp_path / "wide.png"
    path.write_bytes(encoded(WIDE))
    async with served(vision) as url, open_page(devtools) as page:
        await page.goto(url)
        await page.until("document.querySelector('#attach').checkVisibility()")
        await attach(page, path)
        await page.until("document.querySelector('#attached img') !== null")
        await page.say("What is this?")
        await page.until("document.querySelector('.message.assistant .speed')?.innerText.includes('tokens')")
        (context,) = vision.contexts
        assert len(context.images) == 1
        shown = await page.run("document.querySelector('.message.user img').src")
        assert base64.b64decode(shown.partition(",")[2]) == path.read_bytes()
        await page.run("location.hash = '#server'")
        await page.until("document.querySelector('.panel dd') !== null")
        assert f"{NUM_BLOCKS} blocks" in (await page.run(TILES))[4]
        assert page.problems == []


async def test_images_are_dropped_in_and_pasted_text_is_not_one(
    devtools: str, vision: LoopEngine, tmp_path: Path
) -> None:
    drop = """(() => {
      const data = new DataTransfer();
      data.items.add(new File([Uint8Array.from(atob(%r), (c) => c.charCodeAt(0))], 'a.png', { type: 'image/png' }));
      data.items.add(new File(['text'], 'notes.txt', { type: 'text/plain' }));
      const drop = new DragEvent('drop', { dataTransfer: data, bubbles: true, cancelable: true });
      document.querySelector('#messages').dispatchEvent(drop);
    })()"""
    async with served(vision) as url, open_page(devtools) as page:
        await page.goto(url)
        await page.until("document.querySelector('#attach').checkVisibility()")
        await page.run(drop % base64.b64encode(encoded(WIDE)).decode())
        await page.until("document.querySelectorAll('#attached img').length === 1")
        await page.until("document.querySelector('#hint').innerText === 'notes.txt is no image.'")
        await page.click("#attached [aria-label='Remove image 1']")
        assert await page.run("document.querySelectorAll('#attached img').length") == 0


async def test_a_model_without_eyes_takes_no_images(page: Page) -> None:
    assert not await page.run("document.querySelector('#attach').checkVisibility()")
