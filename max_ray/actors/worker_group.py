"""GroupExecutor and ActorKVLedger: a leased worker group behind the contracts that the pipeline and the loop know.

On one node runs and steps travel on a direct line (`group_line`), which is opened with the first run. Where workers are
on another node, a run is one Ray call a rank, however many steps it has: rank 0 streams a message a step, the others
answer at the end.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError

from max_ray.actors.group_line import GroupLine
from max_ray.actors.ledger_line import LedgerLine
from max_ray.actors.messages import GroupInfo
from max_ray.actors.ray_errors import typed
from max_ray.errors import MaxRayError, WorkerGroupError
from max_ray.interfaces import LeaseReply, LeaseRequest, RunExtension, RunRequest, StepOutput

ResultT = TypeVar("ResultT")
_LOOK_S = 1.0
"""How often a waiting consumer looks after the followers and the clock."""


class Failure:
    """What ended a group for those who use it, until it is rebuilt; and a way out for whoever waits for it."""

    def __init__(self) -> None:
        self._error: MaxRayError | None = None
        self._waiters: set[asyncio.Future[None]] = set()

    def set(self, error: MaxRayError) -> None:
        self._error = error
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    def clear(self) -> None:
        self._error = None

    async def guard(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        """The result of `work`; raises the error instead as soon as there is one, and cancels `work`."""
        task = asyncio.ensure_future(work)
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            if self._error is None:
                await asyncio.wait([task, waiter], return_when=asyncio.FIRST_COMPLETED)
            if self._error is not None:
                raise self._error
            return task.result()
        finally:
            self._waiters.discard(waiter)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


class GroupExecutor:
    """An Executor over a leased group. Raises WorkerGroupError when a worker dies, fails, or is silent for longer than
    `step_timeout_s`; StaleLeaseError when the lease has passed on."""

    def __init__(self, info: GroupInfo, *, step_timeout_s: float | None = None) -> None:
        self._info = info
        self._step_timeout_s = step_timeout_s or info.spec.collective_timeout_s + 10
        self._line: GroupLine | None = None
        self._is_line_possible = True
        self._failure = Failure()

    @property
    def info(self) -> GroupInfo:
        return self._info

    def adopt(self, info: GroupInfo) -> None:
        """Goes on with a rebuilt group."""
        self.hang_up()
        self._failure.clear()
        self._info = info

    def fail(self, error: MaxRayError) -> None:
        """The group was found dead, silent or taken: what waits for it, and each call until `adopt`, raises `error`."""
        self._failure.set(error)
        if self._line is not None:
            self._line.close(error)

    def hang_up(self) -> None:
        """Closes the direct line; the next run opens one again. Idempotent."""
        if self._line is not None:
            self._line.close()
        self._line = None
        self._is_line_possible = True

    async def stream(self, request: RunRequest) -> AsyncIterator[StepOutput]:
        line = self._line
        if line is None or not line.is_open:
            line = await self._failure.guard(self._open_line())
        if line is None:
            steps = self._stream_by_calls(request)
        else:
            steps = line.run(request)
        async with aclosing(steps):
            async for output in steps:
                yield output

    def interrupt(self, run_id: int) -> None:
        if self._line is not None:
            self._line.interrupt(run_id)
        else:
            self._info.workers[0].interrupt.remote(run_id, self._info.epoch)

    @property
    def can_extend(self) -> bool:
        """Over a direct line only."""
        return self._line is not None and self._line.is_open

    def extend(self, extension: RunExtension) -> None:
        assert self._line is not None, "a run without a line cannot be extended"
        self._line.extend(extension)

    async def _open_line(self) -> GroupLine | None:
        """A line; None where the workers cannot reach this process, which is found out once."""
        if self._line is not None:
            self.hang_up()
        if self._is_line_possible:
            self._line = await GroupLine.open(self._info, self._step_timeout_s)
            self._is_line_possible = self._line is not None
        return self._line

    async def _stream_by_calls(self, request: RunRequest) -> AsyncGenerator[StepOutput]:
        run = _GroupRun(self._info, request, self._step_timeout_s)
        try:
            while (output := await run.next()) is not None:
                yield output
        finally:
            if not run.is_over:
                self.interrupt(request.run_id)


class _GroupRun:
    """One run in progress: rank 0's stream and the followers' answers."""

    def __init__(self, info: GroupInfo, request: RunRequest, step_timeout_s: float) -> None:
        first, *others = info.workers
        self._followers = [worker.follow.remote(request, info.epoch) for worker in others]
        self._stream = first.run.options(num_returns="streaming").remote(request, info.epoch)
        self._step_timeout_s = step_timeout_s
        self.is_over = False

    async def next(self) -> StepOutput | None:
        """The next step's output; None after the last one."""
        if self.is_over:
            return None
        try:
            waiting = asyncio.ensure_future(self._receive())
            deadline = time.monotonic() + self._step_timeout_s
            while not (await asyncio.wait([waiting], timeout=_LOOK_S))[0]:
                self._look_around(deadline)
            output = waiting.result()
        except RayError as error:
            raise typed(error) from error
        finally:
            waiting.cancel()
        self.is_over = output.last
        return output

    async def _receive(self) -> StepOutput:
        output: StepOutput = await (await self._stream.__anext__())
        return output

    def _look_around(self, deadline: float) -> None:
        """Raises when a follower has died (rank 0 may hang in a collective then) or the step takes too long."""
        done, _ = (
            ray.wait(self._followers, num_returns=len(self._followers), timeout=0) if self._followers else ([], [])
        )
        ray.get(done)
        if time.monotonic() > deadline:
            raise WorkerGroupError(f"The workers have not finished a step for {self._step_timeout_s:.0f} s.")


class ActorKVLedger:
    """A KVLedger over the group's KV manager actor; one exchange at a time."""

    def __init__(self, info: GroupInfo) -> None:
        self._info = info
        self._line: LedgerLine | None = None
        self._is_line_possible = True
        self._failure = Failure()

    def adopt(self, info: GroupInfo) -> None:
        """Goes on with a rebuilt group, whose ledger is empty."""
        self.hang_up()
        self._failure.clear()
        self._info = info

    def fail(self, error: MaxRayError) -> None:
        """The group was found dead, silent or taken: what waits for it, and each call until `adopt`, raises `error`."""
        self._failure.set(error)
        if self._line is not None:
            self._line.close(error)

    def hang_up(self) -> None:
        """Closes the direct line; the next exchange opens one again. Idempotent."""
        if self._line is not None:
            self._line.close()
        self._line = None
        self._is_line_possible = True

    @property
    def page_size(self) -> int:
        return self._info.spec.plan.kv_params.page_size

    @property
    def total_blocks(self) -> int:
        return self._info.num_blocks

    async def exchange(self, request: LeaseRequest) -> LeaseReply:
        """Raises StaleLeaseError when the lease has passed on, WorkerGroupError when the manager is dead."""
        line = self._line
        if line is not None and line.is_open:
            return await line.exchange(request)
        return await self._failure.guard(self._exchange_anew(request))

    async def _exchange_anew(self, request: LeaseRequest) -> LeaseReply:
        """Over a new line; by a Ray call where the manager cannot reach this process, which is found out once."""
        if self._line is not None:
            self.hang_up()
        if self._is_line_possible:
            self._line = await LedgerLine.open(self._info)
            self._is_line_possible = self._line is not None
        if self._line is not None:
            return await self._line.exchange(request)
        try:
            reply: LeaseReply = await self._info.kv_manager.exchange.remote(self._info.epoch, request)
        except RayError as error:
            raise typed(error) from error
        return reply
