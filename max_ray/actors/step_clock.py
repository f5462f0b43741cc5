"""StepClock: tells workers that hang from workers that are slow because the machine is busy."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from max_ray.actors.messages import ActorHandle
from max_ray.actors.ray_errors import answer
from max_ray.errors import WorkerGroupError

_ASK_AFTER = 0.25
"""Share of the limit after which the workers are asked. A step is seldom that long, so none is asked as a rule."""
_LONGEST = 8
"""Limits that a step may take in all, whatever the machine does."""


class StepTimeoutError(WorkerGroupError):
    """The workers have not finished a step in the time that it may take."""


class StepClock:
    """Time of a step, without that in which the slowest worker waited for a processor. On one event loop.

    Args:
        workers: The group's workers, which answer `scheduling_delay`.
        limit_s: Seconds that a step may take.
        clock: Seconds, for tests.
    """

    def __init__(
        self, workers: Sequence[ActorHandle], limit_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._workers = workers
        self._limit_s = limit_s
        self._clock = clock
        self._started_at = clock()
        self._asked_for: float | None = None  # the step's start, for which there is a baseline
        self._baseline: list[float] = []
        self._delay_s = 0.0
        self._asking: asyncio.Task[None] | None = None

    def restart(self) -> None:
        """A step begins, or has ended."""
        self._started_at = self._clock()

    def check(self) -> StepTimeoutError | None:
        """To be called about once a second while a step runs; the error when the step has taken too long."""
        elapsed_s = self._clock() - self._started_at
        if elapsed_s < self._limit_s * _ASK_AFTER:
            return None
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask(self._started_at))
        delay_s = self._delay_s if self._asked_for == self._started_at else 0.0
        if elapsed_s - delay_s <= self._limit_s and elapsed_s <= self._limit_s * _LONGEST:
            return None
        return StepTimeoutError(
            f"The workers have not finished a step for {elapsed_s:.0f} s, in which they waited {delay_s:.0f} s for a "
            f"processor. A step may take {self._limit_s:.0f} s: collective_timeout_s governs it."
        )

    async def _ask(self, started_at: float) -> None:
        """A worker that does not answer is reported by the lease's keeper."""
        try:
            delays = await asyncio.gather(*[answer(worker.scheduling_delay.remote()) for worker in self._workers])
        except WorkerGroupError:
            return
        if self._asked_for != started_at:
            self._asked_for, self._baseline, self._delay_s = started_at, delays, 0.0
        self._delay_s = max(now - before for now, before in zip(delays, self._baseline, strict=True))
