"""Sends requests that may be no HTTP over a socket of their own, and checks the answers."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from tests.http.malformed import Malformed

ANSWER_WITHIN_S = 60


async def answered(port: int, request: Malformed) -> int:
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
    if status >= 400 and request.has_body_in_answer and not _is_of_a_parser(request, headers, body):
        assert headers.get("content-type", "").startswith("application/json"), (request.note, headers)
        _check_error_object(request, body)
    return status


def _is_of_a_parser(request: Malformed, headers: dict[str, str], body: bytes) -> bool:
    """What is no HTTP never becomes a request: the parser (HAProxy's, or uvicorn's where there is no proxy) answers
    with a text of its own that no setting changes, and closes the connection."""
    kind = headers.get("content-type", "")
    is_haproxys = kind == "text/html" and body.startswith(b"<html><body><h1>4")
    return not request.is_http and (is_haproxys or body == b"Invalid HTTP request received.")


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
