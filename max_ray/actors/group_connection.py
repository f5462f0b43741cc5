"""GroupConnection: a replica's connections to all ranks of its group: runs go out, steps come back."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator

from max_ray.actors.member_connections import MemberConnections
from max_ray.actors.messages import GroupInfo
from max_ray.actors.step_clock import StepClock
from max_ray.interfaces import RunExtension, RunRequest, StepOutput
from max_ray.transport.codec import decode_step, encode_extension, encode_number
from max_ray.transport.frames import FROM_WORKER, MessageType
from max_ray.transport.handshake import WORKER, Member
from max_ray.transport.run_codec import encode_run


class _Steps:
    """Outputs of one run that have come and not been read."""

    __slots__ = ("outputs", "waiter")

    def __init__(self) -> None:
        self.outputs: deque[StepOutput] = deque()
        self.waiter: asyncio.Future[None] | None = None

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


class GroupConnection(MemberConnections):
    """Open connections to all ranks. Made by `connect`; one event loop.

    Runs are answered in the order of their messages, and the next may be sent before the last has ended. After any
    rank's failure every run raises `error`.
    """

    def __init__(self, info: GroupInfo, step_timeout_s: float) -> None:
        super().__init__(info)
        self._runs: dict[int, _Steps] = {}
        self._clock = StepClock(info.workers, step_timeout_s)

    @classmethod
    async def connect(cls, info: GroupInfo, step_timeout_s: float) -> GroupConnection:
        """Asks all ranks to connect. Raises WorkerGroupError, or StaleLeaseError when the lease has passed on."""
        connection = cls(info, step_timeout_s)
        await connection.open({Member(WORKER, rank): actor for rank, actor in enumerate(info.workers)}, FROM_WORKER)
        return connection

    @property
    def is_busy(self) -> bool:
        return bool(self._runs)

    async def run(self, request: RunRequest) -> AsyncGenerator[StepOutput]:
        """Sends the run at the first step asked for, and gives its steps."""
        steps = self._runs[request.run_id] = _Steps()
        self._clock.restart()
        is_over = False
        try:
            self.send(MessageType.EXECUTE, encode_run(request))
            while not is_over:
                output = await self._next(steps)
                is_over = output.last
                yield output
        finally:
            del self._runs[request.run_id]
            if not is_over:
                self.interrupt(request.run_id)

    def interrupt(self, run_id: int) -> None:
        """Ends the run, and older ones, at the next step boundary: rank 0 tells the others."""
        self.send(MessageType.INTERRUPT, encode_number(run_id), num_members=1)

    def extend(self, extension: RunExtension) -> None:
        """More steps for a run in progress."""
        self.send(MessageType.EXTEND, encode_extension(extension))

    def on_message(self, kind: int, payload: bytes) -> None:
        run_id, output = decode_step(payload)
        self._clock.restart()
        steps = self._runs.get(run_id)
        if steps is not None:  # else its reader has gone
            steps.outputs.append(output)
            steps.wake()

    def on_failure(self) -> None:
        for steps in self._runs.values():
            steps.wake()

    def check_clock(self) -> None:
        late = self._clock.check() if self._runs else None
        if late is not None:
            self.close(late)

    async def _next(self, steps: _Steps) -> StepOutput:
        while not steps.outputs:
            if self.error is not None:
                raise self.error
            steps.waiter = asyncio.get_running_loop().create_future()
            await steps.waiter
        return steps.outputs.popleft()
