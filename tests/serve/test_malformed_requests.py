"""Thousands of malformed and borderline requests to a served application: nothing but answers and our error objects."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import psutil
import pytest

from tests.http.malformed import Generator, Malformed
from tests.serve.applications import replica_processes, text_of
from tests.serve.conftest import Served

pytestmark = [pytest.mark.ray, pytest.mark.slow]
NUM_REQUESTS = 20_000
NUM_SETTLED = 4_000
MAX_GROWTH = 8 << 20
CLIENTS = 8
ANSWER_WITHIN_S = 60


async def test_twenty_thousand_malformed_requests(served: Served) -> None:
    """No status of 500 and above, an error object with each of 400 and above, and no memory kept."""
    (replica,) = replica_processes(served.app_name)
    before = await text_of(served, "x")
    generator = Generator(7, served.headers)
    statuses: Counter[int] = Counter()
    settled = await _memory_after(served, generator, replica, NUM_SETTLED, statuses)
    final = await _memory_after(served, generator, replica, NUM_REQUESTS - NUM_SETTLED, statuses)
    print(f"statuses {sorted(statuses.items())}; memory {settled >> 20} MiB, then {final >> 20} MiB")
    assert await text_of(served, "x") == before
    assert statuses[200] > 1000, "some are valid"
    assert final - settled <= MAX_GROWTH


async def _memory_after(
    served: Served, generator: Generator, replica: psutil.Process, number: int, statuses: Counter[int]
) -> int:
    """The replica's resident bytes after so many more requests."""
    requests = iter([generator.next() for _ in range(number)])

    async def client() -> None:
        for request in requests:
            statuses[await _answered(served.port, request)] += 1

    await asyncio.gather(*[client() for _ in range(CLIENTS)])
    await asyncio.sleep(2)
    return int(replica.memory_info().rss)


async def _answered(port: int, request: Malformed) -> int:
    """The status of the answer, which is checked; 0 where the connection was closed without one."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request.data)
        async with asyncio.timeout(ANSWER_WITHIN_S):
            status, headers, body = await _read_answer(reader, request)
    except (ConnectionResetError, BrokenPipeError, asyncio.IncompleteReadError):
        return 0
    except TimeoutError:
        raise AssertionError(f"no answer to {request.note}: {request.data[:300]!r}") from None
    finally:
        writer.close()
    assert status < 500, (request.note, status, body[:500])
    if status >= 400 and request.has_body_in_answer and not _is_of_haproxys_parser(request, headers, body):
        assert headers.get("content-type", "").startswith("application/json"), (request.note, headers)
        _check_error_object(request, body)
    return status


def _is_of_haproxys_parser(request: Malformed, headers: dict[str, str], body: bytes) -> bool:
    """What is no HTTP never becomes a request: HAProxy's parser answers with a text of its own that no setting changes,
    and closes the connection."""
    return not request.is_http and headers.get("content-type") == "text/html" and body.startswith(b"<html><body><h1>4")


async def _read_answer(reader: asyncio.StreamReader, request: Malformed) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the answer; an informational one before it is passed over."""
    status = 100
    while status < 200:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.strip().split("\r\n")
        assert first.startswith("HTTP/1."), (request.note, first)
        status = int(first.split(" ")[1])
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if not request.has_body_in_answer or status in (204, 304):
        return status, headers, b""
    if "content-length" in headers:
        return status, headers, await reader.readexactly(int(headers["content-length"]))
    if headers.get("transfer-encoding") == "chunked":
        return status, headers, await _read_chunks(reader)
    return status, headers, await reader.read()


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    whole = b""
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        whole += await reader.readexactly(size)
        await reader.readexactly(2)
    await reader.readexactly(2)
    return whole


def _check_error_object(request: Malformed, body: bytes) -> None:
    try:
        error: Any = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        raise AssertionError(f"{request.note}: {body[:300]!r} is not an error object") from None
    if isinstance(error, str):  # Ollama's
        assert error, request.note
        return
    shapes = ({"message", "type", "param", "code"}, {"message", "type"})  # the second one is Anthropic's
    assert set(error) in shapes, request.note
    assert error["message"], request.note
