"""GroupLine: the replica's end of the direct lines to all ranks of its group (see `line`)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections import deque
from collections.abc import AsyncGenerator
from typing import Any

from max_ray.actors.line import FrameReader, encode_frame, listening, until_called
from max_ray.actors.messages import GroupInfo
from max_ray.actors.ray_errors import outcome
from max_ray.errors import MaxRayError, WorkerGroupError
from max_ray.interfaces import RunExtension, RunRequest, StepOutput

_LOOK_S = 1.0
"""How often the clock of a run in progress is looked at."""


class _Call(asyncio.Protocol):
    """One rank's connection."""

    def __init__(self, line: GroupLine) -> None:
        self._line = line
        self._reader = FrameReader()
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        fileno = transport.get_extra_info("socket").fileno()
        self._sock = socket.socket(fileno=os.dup(fileno))  # our own: event loops do not show theirs once it is closed

    def data_received(self, data: bytes) -> None:
        for message in self._reader.feed(data):
            self._line.receive(self, message)

    def connection_lost(self, exc: Exception | None) -> None:
        self._sock.close()

    def send(self, frame: bytes) -> None:
        """Not to a worker that has hung up, for which uvloop raises: the end of its actor call tells why."""
        if not self.transport.is_closing():
            self.transport.write(frame)

    def hang_up(self) -> None:
        """At once: the worker must not wait for a turn of this event loop. Idempotent."""
        with contextlib.suppress(OSError):  # closed already: the worker was first, or is dead
            self._sock.shutdown(socket.SHUT_RDWR)
        self.transport.abort()


class _Steps:
    """Outputs of one run that have come and not been read."""

    __slots__ = ("outputs", "waiter")

    def __init__(self) -> None:
        self.outputs: deque[StepOutput] = deque()
        self.waiter: asyncio.Future[None] | None = None

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


class GroupLine:
    """Open lines to all ranks. Made by `open`; one event loop.

    Runs are answered in the order of their messages, and the next may be sent before the last has ended. After any
    rank's failure every run raises WorkerGroupError (StaleLeaseError when the lease has passed on).
    """

    def __init__(self, info: GroupInfo, step_timeout_s: float) -> None:
        self._info = info
        self._step_timeout_s = step_timeout_s
        self._calls: dict[int, _Call] = {}
        self._runs: dict[int, _Steps] = {}
        self._heard_at = time.monotonic()
        self._all_called = asyncio.Event()
        self._error: MaxRayError | None = None
        self._watch: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, info: GroupInfo, step_timeout_s: float) -> GroupLine | None:
        """Asks all ranks to call; None when one of them cannot reach this process. Raises what `run` raises."""
        await asyncio.gather(*[outcome(worker.check_lease.remote(info.epoch)) for worker in info.workers])
        line = cls(info, step_timeout_s)
        is_complete = False
        try:
            async with listening(lambda: _Call(line)) as path:
                serving = [asyncio.ensure_future(outcome(rank.serve.remote(path, info.epoch))) for rank in info.workers]
                line._watch = asyncio.create_task(line._watch_over(serving))
                await until_called(line._all_called, serving)
                await asyncio.sleep(0)
            is_complete = line.is_open
        finally:
            if not is_complete:
                line.close()
        if is_complete:
            return line
        await asyncio.gather(*serving)
        return None

    @property
    def is_open(self) -> bool:
        return self._error is None

    async def run(self, request: RunRequest) -> AsyncGenerator[StepOutput]:
        """Sends the run at the first step asked for, and gives its steps."""
        steps = self._runs[request.run_id] = _Steps()
        self._heard_at = time.monotonic()
        self._send(request)
        is_over = False
        try:
            while not is_over:
                output = await self._next(steps)
                is_over = output.last
                yield output
        finally:
            del self._runs[request.run_id]
            if not is_over:
                self.interrupt(request.run_id)

    def interrupt(self, run_id: int) -> None:
        self._send(run_id, ranks=1)

    def extend(self, extension: RunExtension) -> None:
        self._send(extension)

    def close(self, error: MaxRayError | None = None) -> None:
        """Hangs up; the workers' calls end, and runs in progress raise `error`. Idempotent."""
        self._fail(error or WorkerGroupError("The line to the workers was closed."))
        for call in self._calls.values():
            call.hang_up()

    def receive(self, call: _Call, message: Any) -> None:
        """A frame from a worker."""
        if isinstance(message, int):
            self._calls[message] = call
            if self._error is not None:
                call.hang_up()
            if len(self._calls) == len(self._info.workers):
                self._all_called.set()
            return
        run_id, output = message
        self._heard_at = time.monotonic()
        steps = self._runs.get(run_id)
        if steps is not None:  # else its reader has gone
            steps.outputs.append(output)
            steps.wake()

    async def _next(self, steps: _Steps) -> StepOutput:
        while not steps.outputs:
            if self._error is not None:
                raise self._error
            steps.waiter = asyncio.get_running_loop().create_future()
            await steps.waiter
        return steps.outputs.popleft()

    def _send(self, message: Any, ranks: int | None = None) -> None:
        frame = encode_frame(message)
        for rank in range(len(self._info.workers) if ranks is None else ranks):
            if rank in self._calls:
                self._calls[rank].send(frame)

    async def _watch_over(self, serving: list[asyncio.Task[None]]) -> None:
        """Until a rank's call ends, for whatever reason, or a step takes too long."""
        done: set[asyncio.Task[None]] = set()
        while not done:
            done, _ = await asyncio.wait(serving, timeout=_LOOK_S, return_when=asyncio.FIRST_COMPLETED)
            if self._runs and time.monotonic() - self._heard_at > self._step_timeout_s:
                self._fail(WorkerGroupError(f"The workers have not finished a step for {self._step_timeout_s:.0f} s."))
        error = next(iter(done)).exception()
        self._fail(error if isinstance(error, MaxRayError) else WorkerGroupError("A worker hung up."))
        await asyncio.gather(*serving, return_exceptions=True)

    def _fail(self, error: MaxRayError) -> None:
        self._error = self._error or error
        for steps in self._runs.values():
            steps.wake()
