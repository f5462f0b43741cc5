"""RunExtender: progress of a run, and the attempt to extend it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

from max_ray.scheduler.decision import Batch


class RunExtender:
    """A run in progress that may get more steps.

    A run of `num_steps` steps gives each request at most `num_steps` tokens, and covers that many with blocks. While
    every step gives one token, steps and tokens are the same count.

    Attributes:
        requests: Requests of the run.
        num_steps: Steps of the whole run, as the workers know it.
        num_read: Steps whose outputs were delivered.
        is_ragged: Whether a step has given a request several tokens.
        is_tried: Whether an attempt was made that has not brought anything yet; no second one is made before.
    """

    def __init__(self, batch: Batch) -> None:
        self.requests = batch.requests
        self.num_steps = batch.num_steps
        self.num_read = 0
        self.is_ragged = False
        self.is_tried = False
        self._num_generated = [request.context.tokens.generated_length for request in batch.requests]
        self._attempt: asyncio.Task[None] | None = None

    @property
    def tokens_left(self) -> list[int]:
        """Tokens that the run may still give each request."""
        return [
            self.num_steps - (request.context.tokens.generated_length - before)
            for request, before in zip(self.requests, self._num_generated, strict=True)
        ]

    def is_due(self, max_num_steps: int) -> bool:
        """Whether half of the steps, or of some request's tokens, are used up, and the run can still be extended."""
        if self.is_tried:
            return False
        steps_left = self.num_steps - self.num_read
        if self.is_ragged:
            live = zip(self.requests, self.tokens_left, strict=True)
            steps_left = min([steps_left, *(left for request, left in live if not request.context.is_done)])
        return 0 < steps_left <= max_num_steps // 2

    def start(self, attempt: Coroutine[None, None, None]) -> None:
        """Starts an attempt to extend the run; the run continues meanwhile."""
        self.is_tried = True
        self._attempt = asyncio.create_task(attempt)

    async def settle(self) -> None:
        """Waits for the last attempt, and raises its error."""
        if self._attempt is not None:
            await self._attempt
