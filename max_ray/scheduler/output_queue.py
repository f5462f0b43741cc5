"""OutputQueue: per-request queue between the scheduling loop and the reader of a TokenStream.

The loop puts one output a step and never waits. The reader is woken once for all outputs that have arrived and reads
them as one, so a slow reader catches up. One event loop, no threads.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable

from max_ray.interfaces import GenerationStatus, TextGenerationOutput


class OutputQueue:
    """Outputs that were not read yet, then the end of the stream: clean, or an error.

    Attributes:
        closed: No output follows.
        error: What the reader gets at the end.
    """

    __slots__ = ("_items", "_waiter", "closed", "error")

    def __init__(self) -> None:
        self.closed = False
        self.error: Exception | None = None
        self._items: deque[TextGenerationOutput] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, output: TextGenerationOutput) -> None:
        """Adds an output; the last one closes the queue. A closed queue ignores it."""
        if self.closed:
            return
        self._items.append(output)
        self.closed = output.is_done
        self._wake()

    def fail(self, error: Exception) -> None:
        """Closes the queue: the reader gets what was put, then `error`."""
        if not self.closed:
            self.closed = True
            self.error = error
            self._wake()

    def discard(self) -> None:
        """Closes the queue and drops what is in it: its reader is gone."""
        self.closed = True
        self._items.clear()
        self._wake()

    async def get(self) -> TextGenerationOutput:
        """Waits for outputs and merges all that have arrived.

        A cancellation is not merged, so that the tokens before it are read.

        Raises:
            StopAsyncIteration: The stream has ended.
            Exception: The error that the stream ended with.
        """
        while not self._items and not self.closed:
            assert self._waiter is None, "two readers of one stream"
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        items = self._items
        if items:
            output = items.popleft()
            while items and items[0].final_status is not GenerationStatus.CANCELLED:
                output.merge(items.popleft())
            return output
        if self.error is not None:
            raise self.error
        raise StopAsyncIteration

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class TokenStream(AsyncIterator[TextGenerationOutput]):
    """Outputs of one request: one a step, or one for several steps if the reader is slower.

    Closing the stream, dropping it before its end, or cancelling the task that reads it cancels the request.

    Args:
        outputs: The queue to read.
        cancel: Cancels the request.
    """

    def __init__(self, outputs: OutputQueue, cancel: Callable[[], None]) -> None:
        self._outputs = outputs
        self._cancel = cancel
        self._loop = asyncio.get_running_loop()

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> TextGenerationOutput:
        try:
            return await self._outputs.get()
        except asyncio.CancelledError:
            self._give_up()
            raise

    async def aclose(self) -> None:
        """Cancels the request unless it has ended. Idempotent."""
        self._give_up()

    def _give_up(self) -> None:
        if not self._outputs.closed:
            self._cancel()
        self._outputs.discard()

    def __del__(self) -> None:
        if not self._outputs.closed and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._cancel)
