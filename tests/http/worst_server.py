"""A server process for the worst requests: the real routes over a fake engine, and clocks that are held up with it.

    python -m tests.http.worst_server FOLDER       prints its port; serves until its standard input ends

`GET /clocks` gives what was seen since the last time: how long a thread and a task that wake every millisecond were
late at most, in seconds, and how far the resident memory rose, in bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import threading
import time
from pathlib import Path

import psutil
import uvicorn
import uvloop
from starlette.types import ASGIApp, Receive, Scope, Send

from max_ray.serve.api.routes import build_api
from max_ray.tokenization.tokenizer import TextTokenizer
from tests.byte_tokenizer import write_byte_level
from tests.http.fake_engine import FakeEngine

TICK_S = 0.001
MAX_LENGTH = 4096


class Clocks:
    """A thread and a task that note how late they wake, and a thread that notes the resident memory."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self.reset()
        threading.Thread(target=self._tick, daemon=True).start()
        threading.Thread(target=self._watch_memory, daemon=True).start()

    def reset(self) -> None:
        self.thread_late = self.loop_late = 0.0
        self.memory = self.highest = self._process.memory_info().rss

    def read(self) -> dict[str, float]:
        return {
            "thread_late": self.thread_late,
            "loop_late": self.loop_late,
            "raised": float(self.highest - self.memory),
        }

    async def tick(self) -> None:
        while True:
            begin = time.perf_counter()
            await asyncio.sleep(TICK_S)
            self.loop_late = max(self.loop_late, time.perf_counter() - begin - TICK_S)

    def _tick(self) -> None:
        while True:
            begin = time.perf_counter()
            time.sleep(TICK_S)
            self.thread_late = max(self.thread_late, time.perf_counter() - begin - TICK_S)

    def _watch_memory(self) -> None:
        while True:
            self.highest = max(self.highest, self._process.memory_info().rss)
            time.sleep(2 * TICK_S)


class WithClocks:
    """ASGI middleware that answers /clocks."""

    def __init__(self, app: ASGIApp, clocks: Clocks) -> None:
        self._app, self._clocks = app, clocks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != "/clocks":
            await self._app(scope, receive, send)
            return
        body = json.dumps(self._clocks.read()).encode()
        self._clocks.reset()
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


async def serve(folder: Path) -> None:
    tokenizer = TextTokenizer(write_byte_level(folder), max_length=MAX_LENGTH)
    clocks = Clocks()
    api = build_api(FakeEngine(tokenizer, lambda context: "hello"))
    config = uvicorn.Config(WithClocks(api, clocks), host="127.0.0.1", port=0, log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    ticking = asyncio.create_task(clocks.tick())
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    print(server.servers[0].sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    server.should_exit = True
    await serving
    ticking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await ticking


if __name__ == "__main__":
    uvloop.run(serve(Path(sys.argv[1])))
