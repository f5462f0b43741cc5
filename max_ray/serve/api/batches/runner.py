"""Runs lines of batches on a replica, behind the requests that clients wait for.

At most `concurrency` choices of lines are under way at a time, and none begins while another request waits in the
replica's queue. A line goes through the same routes as a request over HTTP. Where the queue is full all the same, or
the workers are being replaced, the line is tried again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from starlette.types import ASGIApp

from max_ray.errors import MaxRayError
from max_ray.serve.api.access.caller import ROUTE
from max_ray.serve.api.batches.in_process import Reply, post
from max_ray.serve.api.batches.lines import LineRequest, response_line
from max_ray.serve.api.batches.state import LineKey
from max_ray.serve.api.batches.store import BatchStore, ClaimedLine
from max_ray.serve.api.files.directory import new_id

logger = logging.getLogger(__name__)
ASK_EVERY_S = 1.0
PRIORITY = 1000
"""Of a line that gives none: behind every request that gives none."""
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "/v1/chat/completions": {"priority": PRIORITY},
    "/v1/completions": {"priority": PRIORITY},
    "/v1/responses": {"store": False},
}
_BUSY = (429, 503)
_LONGEST_WAIT_S = 30.0
MAX_FAILURES = 10
"""Answers of 503 after which a line has failed."""
MAX_RETRIES = 5
"""Times that the store is told of a result before the line is left to another runner."""


class LineRunner:
    """Answers one line.

    Args:
        app: The application with the routes.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def run(self, request: LineRequest) -> tuple[bool, bytes]:
        """Whether the line succeeded, and its line in the output or the error file."""
        ROUTE.set("/v1/batches")
        reply = await self._answered(request.url, {**_DEFAULTS.get(request.url, {}), **request.body})
        return reply.status == 200, response_line(request.custom_id, reply.status, new_id("req_"), reply.body)

    async def _answered(self, path: str, body: Mapping[str, Any]) -> Reply:
        num_failures, wait_s = 0, 0.5
        while True:
            reply = await post(self._app, path, body)
            num_failures += reply.status == 503
            if reply.status not in _BUSY or num_failures >= MAX_FAILURES:
                return reply
            await asyncio.sleep(min(_LONGEST_WAIT_S, max(wait_s, float(reply.headers.get("retry-after", 0)))))
            wait_s *= 2


class BatchRunner:
    """The lines that one replica runs. `start` it, and `close` it.

    Args:
        name: Names the replica.
        app: The application with the routes.
        store: Where lines come from.
        num_waiting: How many requests wait in the replica's queue.
        concurrency: Most choices of lines at a time; a line with more choices runs alone.
    """

    def __init__(
        self, name: str, app: ASGIApp, store: BatchStore, num_waiting: Callable[[], int], concurrency: int
    ) -> None:
        self._name = name
        self._lines = LineRunner(app)
        self._store = store
        self._num_waiting = num_waiting
        self._concurrency = concurrency
        self._running: dict[LineKey, asyncio.Task[None]] = {}
        self._held: dict[LineKey, tuple[ClaimedLine, int]] = {}  # claimed, not begun; with their number of choices
        self._costs: dict[LineKey, int] = {}
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def store(self) -> BatchStore:
        """Where lines come from."""
        return self._store

    def start(self) -> None:
        """Begins to ask for lines."""
        self._task = self._task or asyncio.create_task(self._ask())

    def wake(self) -> None:
        """Asks for lines at once."""
        self._wake.set()

    async def close(self) -> None:
        """Ends what is running and gives its lines back."""
        tasks = [task for task in (self._task, *self._running.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            await self._store.give_back(self._name)
        except MaxRayError as error:
            logger.warning("lines of batches were not given back: %s", error)

    async def _ask(self) -> None:
        while True:
            try:
                await self._exchange()
            except MaxRayError as error:
                logger.warning("lines of batches were not asked for: %s", error)
            self._begin_held()
            try:
                async with asyncio.timeout(ASK_EVERY_S):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()

    async def _exchange(self) -> None:
        """Tells the store what is here, and takes as many lines as there is room for."""
        is_free = not self._held and self._num_waiting() == 0
        most = max(0, self._concurrency - sum(self._costs.values())) if is_free else 0
        claims = await self._store.claim(self._name, most, [*self._running, *self._held])
        for key in claims.unwanted:
            self._held.pop(key, None)
            if key in self._running:
                self._running[key].cancel()
        for line in claims.lines:
            self._held[line.key] = (line, _num_choices(line))

    def _begin_held(self) -> None:
        """Begins lines, in order, while they fit and no request waits."""
        for key, (line, cost) in list(self._held.items()):
            in_use = sum(self._costs.values())
            if self._num_waiting() or (in_use and in_use + cost > self._concurrency):
                return
            del self._held[key]
            self._costs[key] = cost
            task = self._running[key] = asyncio.create_task(self._run(line))
            task.add_done_callback(partial(self._ended, key))

    def _ended(self, key: LineKey, _: object) -> None:
        self._running.pop(key, None)
        self._costs.pop(key, None)
        self._wake.set()

    async def _run(self, line: ClaimedLine) -> None:
        await self._told(line.key, *await self._lines.run(line.request))

    async def _told(self, key: LineKey, is_success: bool, result: bytes) -> None:
        for number in range(MAX_RETRIES):
            try:
                await self._store.finish(self._name, key, is_success, result)
                return
            except MaxRayError as error:
                logger.warning("a result of %s was not kept: %s", key[0], error)
                await asyncio.sleep(2.0**number)


def _num_choices(line: ClaimedLine) -> int:
    """Choices that a line's request has: of all prompts of a completion."""
    body = line.request.body
    n, prompt = body.get("n"), body.get("prompt")
    num_prompts = len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1
    return num_prompts * (n if type(n) is int and n > 0 else 1)
