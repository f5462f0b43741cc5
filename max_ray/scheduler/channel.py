"""The way of tokens from the loop to whoever asked: one Channel a request, read through a TokenStream.

The loop pushes one output a step and never waits; the reader is woken once for all that has come, and reads it as one
output: a reader that falls behind catches up. Single event loop, no threads.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable

from max_ray.interfaces import GenerationStatus, TextGenerationOutput


class Channel:
    """Outputs not yet read, then the end: clean, or with an error."""

    __slots__ = ("_error", "_items", "_waiter", "closed")

    def __init__(self) -> None:
        self.closed = False
        self._items: deque[TextGenerationOutput] = deque()
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def push(self, output: TextGenerationOutput) -> None:
        """Adds an output; the last one closes the channel. Nothing happens on a closed channel."""
        if self.closed:
            return
        self._items.append(output)
        self.closed = output.is_done
        self._wake()

    def fail(self, error: Exception) -> None:
        """Closes the channel: the reader gets what was pushed, then `error`."""
        if not self.closed:
            self.closed = True
            self._error = error
            self._wake()

    def discard(self) -> None:
        """Closes the channel for a reader that has gone."""
        self.closed = True
        self._items.clear()
        self._wake()

    async def get(self) -> TextGenerationOutput:
        """What has come since the last call, merged; the error after the last; StopAsyncIteration at the end. A
        cancellation stays apart, so that the tokens before it are read."""
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
        if self._error is not None:
            raise self._error
        raise StopAsyncIteration

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class TokenStream(AsyncIterator[TextGenerationOutput]):
    """What `GenerationLoop.submit` gives: an output a step, or one for several steps where the reader is slower.
    Closing it, dropping it before its end, or cancelling the task that reads it cancels the request."""

    def __init__(self, channel: Channel, cancel: Callable[[], None]) -> None:
        self._channel = channel
        self._cancel = cancel
        self._loop = asyncio.get_running_loop()

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> TextGenerationOutput:
        try:
            return await self._channel.get()
        except asyncio.CancelledError:
            self._give_up()
            raise

    async def aclose(self) -> None:
        """Cancels the request unless it has ended. Idempotent."""
        self._give_up()

    def _give_up(self) -> None:
        if not self._channel.closed:
            self._cancel()
        self._channel.discard()

    def __del__(self) -> None:
        if not self._channel.closed and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._cancel)
