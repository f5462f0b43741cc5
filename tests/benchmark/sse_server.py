"""A scripted server: what it answers, and when, is written down in advance. HTTP/1.1 on bare asyncio streams.

A script maps a request's body to its answer, so that tests know every delay and every fault. It notes what came.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from max_ray.benchmark.client import ENDPOINTS


@dataclass
class Answer:
    """One answer. Status 0 says nothing at all, 1 writes `extra` in place of HTTP, 200 streams, all others are errors.

    A stream: wait `ttft`, then the texts with `gap` between them (seconds), then finish, usage, [DONE].

    stop_after: end the connection after so many texts; `reset` sends RST, else the stream just ends (`clean`: with a
    proper last chunk). split: bytes a write, to cut events anywhere.
    """

    texts: list[str] = field(default_factory=lambda: ["a", " b", " c"])
    ttft: float = 0.0
    gap: float = 0.0
    status: int = 200
    usage: dict[str, int] | None = None
    finish_reason: str | None = "length"
    done: bool = True
    stop_after: int | None = None
    reset: bool = False
    clean: bool = False
    split: int | None = None
    extra: list[bytes] = field(default_factory=list)

    @property
    def counted(self) -> dict[str, int] | None:
        usage = {"prompt_tokens": 7, "completion_tokens": len(self.texts)} if self.usage is None else self.usage
        return usage or None


@dataclass
class Seen:
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    time: float


Script = Callable[[dict[str, Any]], Answer]


class ScriptedServer:
    def __init__(self, script: Script) -> None:
        self.script = script
        self.seen: list[Seen] = []
        self.running = 0
        self.most_running = 0
        self.url = ""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await self._answer(reader, writer)
        except ConnectionError:
            pass
        finally:
            self.running -= 1
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in head[1:]) if k}
        raw = await reader.readexactly(int(headers.get("content-length", 0)))
        path = head[0].split()[1]
        body = json.loads(raw) if raw else {}
        self.seen.append(Seen(path, headers, body, perf_counter()))
        if path == "/v1/models":
            return await _send_json(writer, 200, {"data": [{"id": "served"}]})
        answer = self.script(body)
        if answer.status == 0:
            return await _break(writer, answer)
        if answer.status == 1:
            return writer.writelines(answer.extra)
        if answer.status != 200:
            return await _send_json(writer, answer.status, {"error": {"message": "scripted"}})
        await _stream(writer, answer, is_chat=path == ENDPOINTS["chat"])


async def _send_json(writer: asyncio.StreamWriter, status: int, body: dict[str, Any]) -> None:
    data = json.dumps(body).encode()
    writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(data), data))
    await writer.drain()


async def _stream(writer: asyncio.StreamWriter, answer: Answer, *, is_chat: bool) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    await writer.drain()
    if is_chat:
        await _event(writer, answer, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
    await asyncio.sleep(answer.ttft)
    for number, text in enumerate(answer.texts):
        if number == answer.stop_after:
            return await _break(writer, answer)
        if number:
            await asyncio.sleep(answer.gap)
        await _event(writer, answer, {"choices": [{"delta": {"content": text}} if is_chat else {"text": text}]})
    for data in answer.extra:
        await _write(writer, answer, data)
    if answer.finish_reason:
        await _event(writer, answer, {"choices": [{"text": "", "finish_reason": answer.finish_reason}], "usage": None})
    if answer.counted:
        await _event(writer, answer, {"choices": [], "usage": answer.counted})
    if answer.done:
        await _write(writer, answer, b"data: [DONE]\n\n")
    writer.write(b"0\r\n\r\n")
    await writer.drain()


async def _break(writer: asyncio.StreamWriter, answer: Answer) -> None:
    if answer.clean:
        writer.write(b"0\r\n\r\n")
        await writer.drain()
    if answer.reset:
        await asyncio.sleep(0.02)  # let the client read what came before
        linger_no_time = struct.pack("ii", 1, 0)  # closing sends RST instead of FIN
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_no_time)
        writer.transport.abort()


async def _event(writer: asyncio.StreamWriter, answer: Answer, event: dict[str, Any]) -> None:
    await _write(writer, answer, b"data: %s\n\n" % json.dumps(event).encode())


async def _write(writer: asyncio.StreamWriter, answer: Answer, data: bytes) -> None:
    size = answer.split or len(data)
    for start in range(0, len(data), size):
        piece = data[start : start + size]
        writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        await writer.drain()
        if answer.split:
            await asyncio.sleep(0.0005)


@asynccontextmanager
async def scripted_server(script: Script = lambda body: Answer()) -> AsyncIterator[ScriptedServer]:
    """Listens on a free port of loopback while the block runs."""
    scripted = ScriptedServer(script)
    server = await asyncio.start_server(scripted.handle, "127.0.0.1", 0)
    scripted.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        yield scripted
