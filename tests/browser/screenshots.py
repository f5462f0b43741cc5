"""Screenshots for the documentation: `python -m tests.browser.screenshots http://127.0.0.1:8000 docs/images`.

The server answers for real: start one with an instruct model first, with a batch of at least 6. Needs Chromium.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
from PIL import Image

from tests.browser.chromium import Page, chromium, open_page

DESKTOP = (1280, 800)
PHONE = (390, 844)
FIRST = "Write a Python function that adds two numbers, and explain it in a short list."
DONE = "document.querySelector('#stop').hidden && document.querySelector('.message.assistant .speed') !== null"


async def shoot(page: Page, path: Path) -> None:
    """A screenshot with at most 255 colours, so that it stays small."""
    await asyncio.sleep(0.4)
    await page.screenshot(path)
    with Image.open(path) as image:
        image.convert("RGB").quantize(255, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size // 1024} KiB")


async def set_parameter(page: Page, name: str, value: str) -> None:
    await page.run(f"document.querySelector('[data-parameter={name}]').focus()")
    await page.write(value)


async def chat(page: Page, folder: Path) -> None:
    """The chat, in both themes and widths, and the probabilities of its tokens."""
    await page.click("#open-parameters")
    await set_parameter(page, "max_tokens", "220")
    await set_parameter(page, "temperature", "0")
    await page.click("#open-parameters")
    await page.say(FIRST)
    await page.until(DONE, within_s=120)
    await page.run("document.querySelector('#messages').scrollTop = 0")
    await shoot(page, folder / "chat.png")
    await page.resize(*PHONE)
    await page.run("document.querySelector('#messages').scrollTop = 0")
    await shoot(page, folder / "chat-phone.png")
    await page.resize(*DESKTOP, is_dark=True)
    await page.click("#open-parameters")
    await page.click("#logprobs")
    await page.click("#open-parameters")
    await page.say("Write one sentence about the sea.")
    await page.until(f"document.querySelector('.token') !== null && {DONE}", within_s=120)
    await page.click(".tokens .p3, .tokens .p2, .tokens .p4")
    await page.until("!document.querySelector('#probabilities').hidden")
    await shoot(page, folder / "tokens-dark.png")


async def server(page: Page, folder: Path, url: str) -> None:
    """The view of the server while it works on a few long requests."""
    await page.resize(*DESKTOP)
    await page.run("location.hash = '#server'")
    await asyncio.sleep(10)
    async with load(url):
        await asyncio.sleep(40)
        await shoot(page, folder / "server.png")
        await page.resize(*PHONE, is_dark=True)
        await asyncio.sleep(1.2)
        await shoot(page, folder / "server-phone.png")


@asynccontextmanager
async def load(url: str) -> AsyncIterator[None]:
    """Long requests, one after the other, until the block is left."""
    async with aiohttp.ClientSession(url) as session:
        tasks = [asyncio.create_task(one_story(session, number)) for number in range(9)]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def one_story(session: aiohttp.ClientSession, number: int) -> None:
    await asyncio.sleep(2.5 * number)
    prompt = f"The story of number {number}. " + "Once upon a time there was a number. " * (20 + 12 * number)
    body = {"prompt": prompt, "max_tokens": 900, "ignore_eos": True}
    async with session.post("/v1/completions", json=body) as reply:
        await reply.read()


async def main(url: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile, chromium(Path(profile)) as address:
        async with open_page(address) as page:
            await page.resize(*DESKTOP)
            await page.goto(url)
            await page.until("document.querySelector('#model option') !== null")
            await chat(page, folder)
            await server(page, folder, url)
            assert page.problems == [], page.problems


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
