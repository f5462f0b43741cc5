"""LedgerLine: the replica's end of a direct line to its KV manager (see `line`): a Ray call costs some milliseconds, as
much as a whole decode step, and the workers wait for each scheduling decision's exchange."""

from __future__ import annotations

import asyncio
from typing import Any

from max_ray.actors.line import FrameReader, encode_frame, listening, until_called
from max_ray.actors.messages import GroupInfo
from max_ray.actors.ray_errors import outcome
from max_ray.errors import MaxRayError, WorkerGroupError
from max_ray.interfaces import CacheReply, CacheUpdate


class LedgerLine(asyncio.Protocol):
    """An open line. Made by `open`; one event loop; one exchange at a time.

    After the KV manager's failure every exchange raises WorkerGroupError, or StaleLeaseError when the lease has passed
    on.
    """

    def __init__(self) -> None:
        self._reader = FrameReader()
        self._transport: Any = None
        self._called = asyncio.Event()
        self._number = 0
        self._answer: asyncio.Future[CacheReply] | None = None
        self._error: MaxRayError | None = None
        self._watch: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, info: GroupInfo) -> LedgerLine | None:
        """Asks the KV manager to call; None when it cannot reach this process. Raises what `exchange` raises."""
        line = cls()
        async with listening(lambda: line) as path:
            serving = asyncio.ensure_future(outcome(info.kv_manager.serve.remote(path, info.epoch)))
            await until_called(line._called, [serving])
        if line._transport is None:
            await serving
            return None
        line._watch = asyncio.create_task(line._watch_over(serving))
        return line

    @property
    def is_open(self) -> bool:
        return self._error is None

    async def update(self, request: CacheUpdate) -> CacheReply:
        assert self._answer is None, "two exchanges at a time"
        if self._error is not None:
            raise self._error
        self._number += 1
        self._answer = asyncio.get_running_loop().create_future()
        if not self._transport.is_closing():  # else uvloop raises; the end of the actor's call tells why
            self._transport.write(encode_frame((self._number, request)))
        try:
            return await self._answer
        finally:
            self._answer = None

    def close(self, error: MaxRayError | None = None) -> None:
        """Hangs up; the KV manager's call ends, and an exchange in progress raises `error`. Idempotent."""
        self._fail(error or WorkerGroupError("The line to the KV manager was closed."))
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._called.set()

    def data_received(self, data: bytes) -> None:
        for number, reply in self._reader.feed(data):
            if number == self._number and self._answer is not None and not self._answer.done():
                self._answer.set_result(reply)  # else whoever asked has given up

    async def _watch_over(self, serving: asyncio.Future[None]) -> None:
        """Until the KV manager's call ends, for whatever reason."""
        await asyncio.wait([serving])
        error = serving.exception()
        self._fail(error if isinstance(error, MaxRayError) else WorkerGroupError("The KV manager hung up."))

    def _fail(self, error: MaxRayError) -> None:
        self._error = self._error or error
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(self._error)
