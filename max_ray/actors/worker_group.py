"""GroupExecutor: a leased worker group behind the contract that pipelines know.

Runs and steps travel on connections to all ranks (`group_connection`), which are opened with the first run.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

from max_ray.actors.group_connection import GroupConnection
from max_ray.actors.member_client import MemberClient
from max_ray.actors.messages import GroupInfo
from max_ray.actors.step_clock import StepTimeoutError
from max_ray.interfaces import RunExtension, RunRequest, StepOutput

_MOST_DOUBLINGS = 3


class GroupExecutor(MemberClient[GroupConnection]):
    """An Executor over a leased group.

    Raises WorkerGroupError when a worker dies, fails, cannot be reached, or is silent for longer than `step_timeout_s`;
    StaleLeaseError when the lease has passed on.

    Args:
        info: The leased group.
        step_timeout_s: By default 10 s more than the group's collective timeout. After each step that took too long the
            next workers get twice the time, up to eight times of it, until a run has ended well.
    """

    def __init__(self, info: GroupInfo, *, step_timeout_s: float | None = None) -> None:
        super().__init__(info)
        self._step_timeout_s = step_timeout_s or info.spec.collective_timeout_s + 10
        self._num_timeouts = 0
        self._stop_through = 0  # runs that were interrupted before there was a connection

    @property
    def info(self) -> GroupInfo:
        return self._info

    async def stream(self, request: RunRequest) -> AsyncIterator[StepOutput]:
        """See Executor."""
        connection = await self._connected()
        try:
            async with aclosing(connection.run(request)) as steps:
                async for output in steps:
                    yield output
        except StepTimeoutError:
            self._num_timeouts += 1
            raise
        self._num_timeouts = 0

    def interrupt(self, run_id: int) -> None:
        """See Executor."""
        if self._connection is not None:
            self._connection.interrupt(run_id)
        else:
            self._stop_through = max(self._stop_through, run_id)

    @property
    def step_timeout_s(self) -> float:
        """Seconds that a step of the next connection may take."""
        return self._step_timeout_s * 2.0 ** min(self._num_timeouts, _MOST_DOUBLINGS)

    @property
    def can_extend(self) -> bool:
        """Always: a run in progress has a connection."""
        return True

    def extend(self, extension: RunExtension) -> None:
        """See Executor."""
        if self._connection is not None:
            self._connection.extend(extension)

    async def _connect(self) -> GroupConnection:
        connection = await GroupConnection.connect(self._info, self.step_timeout_s)
        if self._stop_through:
            connection.interrupt(self._stop_through)
        return connection
