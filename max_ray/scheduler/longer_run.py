"""LongerRun: how far a run in progress has come, and the attempt to extend it (see `loop`)."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

from max_ray.scheduler.row import Batch


class LongerRun:
    """A run that may be extended. num_read: steps whose outputs were delivered. num_steps: of the run as the workers
    know it. is_tried: no second attempt before the first has brought something."""

    def __init__(self, batch: Batch) -> None:
        self.rows = batch.rows
        self.num_steps = batch.num_steps
        self.num_read = 0
        self.is_tried = False
        self._attempt: asyncio.Task[None] | None = None

    @property
    def steps_left(self) -> int:
        return self.num_steps - self.num_read

    def is_due(self, max_num_steps: int) -> bool:
        return not self.is_tried and 0 < self.steps_left <= max_num_steps // 2

    def start(self, attempt: Coroutine[None, None, None]) -> None:
        self.is_tried = True
        self._attempt = asyncio.create_task(attempt)

    async def settle(self) -> None:
        """Waits for the last attempt, and raises what it raised."""
        if self._attempt is not None:
            await self._attempt
