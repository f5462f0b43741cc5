"""EventLog: the events of one stream, from the first one on, for any number of readers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from max_ray.serve.api.streams.cursor import event_id


class EventLog:
    """Grows until it ends or fails.

    Args:
        num_choices: Of the stream.
    """

    def __init__(self, num_choices: int) -> None:
        self.num_choices = num_choices
        self._events: list[bytes] = []
        self._choices: list[int] = []
        self._grown = asyncio.Event()
        self._is_over = False
        self._error: BaseException | None = None

    @property
    def is_over(self) -> bool:
        """Whether no event follows."""
        return self._is_over

    def append(self, choice: int, event: bytes) -> None:
        """Adds an event.

        Args:
            choice: Number of the choice that it is counted for.
            event: The whole block, without an id.
        """
        self._choices.append(choice)
        self._events.append(event)
        self._grown.set()

    def end(self, error: BaseException | None = None) -> None:
        """No event follows. The first call counts.

        Args:
            error: What readers get at the end; None: the stream is complete.
        """
        if not self._is_over:
            self._is_over, self._error = True, error
            self._grown.set()

    async def read(self, cursor: Sequence[int]) -> AsyncGenerator[bytes]:
        """Events with ids, all that are there as one piece. Raises the error that the stream ended with.

        Args:
            cursor: Events of each choice that the reader has.
        """
        seen, position = [0] * self.num_choices, 0
        shown = list(cursor)
        while True:
            piece = bytearray()
            for choice, event in zip(self._choices[position:], self._events[position:], strict=True):
                seen[choice] += 1
                if seen[choice] > shown[choice]:
                    shown[choice] = seen[choice]
                    piece += b"id: %b\n%b" % (event_id(shown).encode(), event)
            position = len(self._events)
            if piece:
                yield bytes(piece)
            if position == len(self._events) and self._is_over:
                break
            if position == len(self._events):
                self._grown.clear()
                await self._grown.wait()
        if self._error is not None:
            raise self._error
