"""Twenty and more of the worst requests at once: they are refused, and nobody else waits for them or lacks memory.

The server is a process of its own, so that what the clients compute does not count.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from max_ray.errors import InputError
from max_ray.serve.api.json_body import MAX_WIDE_CHARACTERS, decode_object
from tests.http.worst_bodies import WORST
from tests.source_tree import ROOT

MAX_LATE_S = 0.25
MAX_RAISED = 64 * 2**20
MIB = 2**20


@asynccontextmanager
async def worst_server(folder: Path) -> AsyncIterator[str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.http.worst_server", str(folder)),
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        port = int(await process.stdout.readline())
        yield f"http://127.0.0.1:{port}"
    finally:
        process.stdin.close()
        try:
            async with asyncio.timeout(10):
                await process.wait()
        except TimeoutError:
            process.kill()


async def post_all(url: str, requests: list[tuple[str, bytes]]) -> list[httpx.Response]:
    headers = {"Content-Type": "application/json"}
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=None)) as client:
        return await asyncio.gather(*[client.post(path, content=body, headers=headers) for path, body in requests])


async def clocks(url: str) -> dict[str, float]:
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        return dict((await client.get("/clocks")).json())


async def one_round(url: str, requests: list[tuple[str, bytes]]) -> dict[str, float]:
    await clocks(url)
    replies = await post_all(url, requests)
    for (path, body), reply in zip(requests, replies, strict=True):
        assert reply.status_code == 400, (path, body[:40], reply.text[:200])
        assert reply.json()["error"]["type"] == "invalid_request_error"
        assert len(reply.content) < 2000, "a message does not repeat a request"
    return await clocks(url)


def worst_requests(size: int) -> list[tuple[str, bytes]]:
    return [(path, body(size)) for path, body in WORST.values()]


def check(rounds: list[dict[str, float]]) -> None:
    text = json.dumps(rounds)
    assert statistics.median(one["thread_late"] for one in rounds) < MAX_LATE_S, text
    assert statistics.median(one["loop_late"] for one in rounds) < MAX_LATE_S, text
    assert max(one["raised"] for one in rounds) < MAX_RAISED, text


async def test_bodies_of_one_mebibyte_at_once(tmp_path: Path) -> None:
    async with worst_server(tmp_path) as url:
        await post_all(url, [("/v1/completions", b'{"prompt":"a"}')])
        check([await one_round(url, worst_requests(MIB)) for _ in range(3)])


@pytest.mark.slow
async def test_bodies_of_eight_mebibytes_at_once(tmp_path: Path) -> None:
    async with worst_server(tmp_path) as url:
        await post_all(url, [("/v1/completions", b'{"prompt":"a"}')])
        check([await one_round(url, worst_requests(8 * MIB)) for _ in range(5)])


@pytest.mark.slow
@pytest.mark.parametrize("name", WORST)
async def test_twenty_bodies_of_one_kind(tmp_path: Path, name: str) -> None:
    path, body = WORST[name]
    requests = [(path, body(8 * MIB))] * 20
    async with worst_server(tmp_path) as url:
        await post_all(url, [("/v1/completions", b'{"prompt":"a"}')])
        check([await one_round(url, requests) for _ in range(5)])


@pytest.mark.parametrize("wide", ["\U0001f600", "\\ud83d\\ude00"])
def test_a_text_of_wide_characters_is_bounded_alone(wide: str) -> None:
    """One byte too many is refused. As many in two texts, or without a wide character, pass."""
    narrow = "a" * (MAX_WIDE_CHARACTERS - 2 - len(wide.encode()))
    fits = f'{{"a":"{narrow}{wide}"}}'.encode()
    assert len(decode_object(fits)["a"]) == len(narrow) + 1
    with pytest.raises(InputError, match="U\\+FFFF"):
        decode_object(f'{{"a":"{narrow}a{wide}"}}'.encode())
    assert decode_object(f'{{"a":"{narrow}{wide}","b":"{narrow}"}}'.encode())
    assert decode_object(f'{{"a":"{narrow}{"a" * 100}"}}'.encode())
