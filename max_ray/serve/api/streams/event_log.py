"""EventLog: the events of one stream, from the first one on, for any number of readers."""

from __future__ import annotations

import asyncio
import zlib
from array import array
from bisect import bisect_right
from collections.abc import AsyncGenerator, Sequence

from max_ray.serve.api.streams.cursor import event_id

PACKED_BYTES = 64 * 1024
"""Older events are compressed in pieces of this size: events are much alike, so a token takes some 20 bytes."""
_END = b"\n\n"


class EventLog:
    """Grows until it ends or fails.

    Args:
        num_choices: Of the stream.
    """

    def __init__(self, num_choices: int) -> None:
        self.num_choices = num_choices
        self._choices = array("B")
        self._packed: list[bytes] = []
        self._starts = [0]  # number of the first event of each packed piece, and of the tail
        self._tail: list[bytes] = []
        self._tail_bytes = 0
        self._grown = asyncio.Event()
        self._is_over = False
        self._error: BaseException | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes in memory."""
        return sum(map(len, self._packed)) + self._tail_bytes + len(self._choices)

    def append(self, choice: int, event: bytes) -> None:
        """Adds an event.

        Args:
            choice: Number of the choice that it is counted for.
            event: The whole block, without an id.
        """
        self._choices.append(choice)
        self._tail.append(event)
        self._tail_bytes += len(event)
        if self._tail_bytes >= PACKED_BYTES:
            self._packed.append(zlib.compress(b"".join(self._tail), level=1))
            self._starts.append(len(self._choices))
            self._tail.clear()
            self._tail_bytes = 0
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
        """Events with ids, many as one piece. Raises the error that the stream ended with.

        Args:
            cursor: Events of each choice that the reader has.
        """
        seen, position = [0] * self.num_choices, 0
        shown = list(cursor)
        while position < len(self._choices) or not self._is_over:
            if position == len(self._choices):
                self._grown.clear()
                await self._grown.wait()
                continue
            piece = bytearray()
            for event in self._events_from(position):
                choice = self._choices[position]
                position += 1
                seen[choice] += 1
                if seen[choice] > shown[choice]:
                    shown[choice] = seen[choice]
                    piece += b"id: %b\n%b" % (event_id(shown).encode(), event)
            if piece:
                yield bytes(piece)
        if self._error is not None:
            raise self._error

    def _events_from(self, position: int) -> list[bytes]:
        """From an event to the end of its piece."""
        number = bisect_right(self._starts, position) - 1
        first = position - self._starts[number]
        if number == len(self._packed):
            return self._tail[first:]
        blocks = zlib.decompress(self._packed[number]).split(_END)[:-1]
        return [block + _END for block in blocks[first:]]
