"""The journal of resumable streams: what each was asked, and its tokens so far, so that another replica can go on.

Written in batches, behind the stream: tokens that a dead replica has sent and not written are generated again, and
are the same ones. Bounded in bytes: a stream's most bytes are taken from the limit when it begins.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Protocol

from max_ray.errors import InputError, QueueFullError, quoted
from max_ray.serve.api.streams.choice_log import ChoiceLog, ChoiceNews

MAX_BYTES = 256 * 2**20
LIVING_S = 2.5
"""A replica that was heard so recently is asked for its last tokens before its stream goes elsewhere."""
HAND_OVER_S = 2.0
SILENT_KEPT_S = 120.0
"""A stream whose replica is silent is kept for so long, which is longer than a successor takes to start."""


class StreamState(Enum):
    """What a replica says of a stream."""

    RUNNING = "running"
    ENDED = "ended"
    RELEASED = "released"
    """It stopped here, and may go on elsewhere."""
    CLOSED = "closed"
    """It cannot be resumed any more."""


class Order(Enum):
    """What a replica has to do about a stream."""

    HAND_OVER = "hand_over"
    """Another replica waits for it: stop, and say the last tokens."""
    STOP = "stop"
    """Another replica has it."""
    BEGIN_AGAIN = "begin_again"
    """The journal does not know it: it was started anew."""


@dataclass(frozen=True, slots=True)
class StreamStart:
    """A stream at its beginning.

    Args:
        stream_id: Id of its answer.
        owner: Name of the API key that asked for it.
        epoch: How often it has gone to another replica.
        request: What `streams.snapshot` makes of the request, pickled.
        num_choices: Of the request.
        num_bytes: Most bytes of memory that it takes in the journal.
    """

    stream_id: str
    owner: str
    epoch: int
    request: bytes
    num_choices: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class StreamNews:
    """What a stream gained.

    Args:
        stream_id: Its id.
        epoch: As the replica has it.
        choices: What each choice gained; empty where nothing was.
        state: What became of it.
    """

    stream_id: str
    epoch: int
    choices: list[ChoiceNews]
    state: StreamState


@dataclass(frozen=True, slots=True)
class KeptStream:
    """A stream as the journal has it.

    Args:
        start: Its beginning, with the epoch of who asks now.
        choices: Tokens of each choice.
        is_ended: Whether nothing is left to generate.
    """

    start: StreamStart
    choices: list[ChoiceLog]
    is_ended: bool


class StreamJournal(Protocol):
    """Every method may raise WorkerGroupError where the journal is elsewhere and does not answer."""

    async def register(self, replica: str, start: StreamStart) -> None:
        """A stream begins. Raises InputError for an id in use or a stream too large, QueueFullError without room."""

    async def update(self, replica: str, news: list[StreamNews]) -> dict[str, Order]:
        """Takes what streams gained. Also says that the replica lives.

        Returns:
            What to do about streams with which not all is in order.
        """

    async def owner_of(self, stream_id: str) -> str | None:
        """Name of the API key of a stream; None for one that is not kept."""

    async def claim(self, replica: str, stream_id: str) -> KeptStream | None:
        """Gives a stream to a replica. Where nothing is left to generate it stays where it is.

        Returns:
            The stream; None for one that is not kept.
        """


@dataclass(slots=True, eq=False)
class _Entry:
    start: StreamStart
    replica: str | None
    heard_at: float
    choices: list[ChoiceLog]
    is_ended: bool = False
    num_waiting: int = 0
    released: asyncio.Event = field(default_factory=asyncio.Event)


class LocalStreamJournal:
    """A StreamJournal in this process, which is the actor's where there are replicas.

    Args:
        max_bytes: Of all streams together.
        clock: Monotonic seconds.
    """

    def __init__(self, max_bytes: int = MAX_BYTES, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes = max_bytes
        self._clock = clock
        self._entries: dict[str, _Entry] = {}
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Most bytes that the kept streams take."""
        return self._num_bytes

    async def register(self, replica: str, start: StreamStart) -> None:
        """See StreamJournal."""
        self._forget_silent()
        before = self._entries.get(start.stream_id)
        if before is not None and before.start.epoch >= start.epoch:
            raise InputError(
                f"There is a stream of the id {quoted(start.stream_id)} already: read it on at /v1/streams, or give "
                "another id.",
                param="request_id",
            )
        self._check_room(start)
        if before is not None:
            self._forget(start.stream_id)
        choices = [ChoiceLog() for _ in range(start.num_choices)]
        self._entries[start.stream_id] = _Entry(start, replica, self._clock(), choices)
        self._num_bytes += start.num_bytes

    async def update(self, replica: str, news: list[StreamNews]) -> dict[str, Order]:
        """See StreamJournal."""
        self._forget_silent()
        orders = {one.stream_id: self._taken(replica, one) for one in news}
        return {stream_id: order for stream_id, order in orders.items() if order is not None}

    async def owner_of(self, stream_id: str) -> str | None:
        """See StreamJournal."""
        self._forget_silent()
        entry = self._entries.get(stream_id)
        return None if entry is None else entry.start.owner

    async def claim(self, replica: str, stream_id: str) -> KeptStream | None:
        """See StreamJournal."""
        entry = self._entries.get(stream_id)
        if entry is None:
            return None
        if not entry.is_ended:
            await self._hand_over(entry)
            if self._entries.get(stream_id) is not entry:
                return None
        if not entry.is_ended:
            entry.start = replace(entry.start, epoch=entry.start.epoch + 1)
            entry.replica, entry.heard_at = replica, self._clock()
        return KeptStream(entry.start, [log.copy() for log in entry.choices], entry.is_ended)

    async def _hand_over(self, entry: _Entry) -> None:
        """Waits for the last tokens of a replica that lives."""
        if entry.replica is None or self._clock() - entry.heard_at > LIVING_S:
            return
        entry.released.clear()
        entry.num_waiting += 1
        try:
            async with asyncio.timeout(HAND_OVER_S):
                await entry.released.wait()
        except TimeoutError:
            return
        finally:
            entry.num_waiting -= 1

    def _taken(self, replica: str, news: StreamNews) -> Order | None:
        entry = self._entries.get(news.stream_id)
        if entry is None:
            return None if news.state is StreamState.CLOSED else Order.BEGIN_AGAIN
        if entry.replica != replica or entry.start.epoch != news.epoch:
            return Order.STOP
        entry.heard_at = self._clock()
        for log, gained in zip(entry.choices, news.choices, strict=False):
            log.apply(gained)
        if news.state is StreamState.CLOSED:
            self._forget(news.stream_id)
        elif news.state is StreamState.ENDED:
            entry.is_ended = True
            entry.released.set()
        elif news.state is StreamState.RELEASED:
            entry.replica = None
            entry.released.set()
        return Order.HAND_OVER if entry.num_waiting and news.state is StreamState.RUNNING else None

    def _check_room(self, start: StreamStart) -> None:
        if start.num_bytes > self._max_bytes:
            raise InputError(
                f"A resumable stream may take {self._max_bytes:,} bytes in the journal, and this one might need "
                f"{start.num_bytes:,}: give a smaller max_tokens, fewer log probabilities, or leave resumable out.",
                param="stream_options.resumable",
            )
        if self._num_bytes + start.num_bytes > self._max_bytes:
            raise QueueFullError(
                "The journal has no room for another resumable stream now. Try again, or leave resumable out.",
                retry_after=5.0,
            )

    def _forget_silent(self) -> None:
        oldest = self._clock() - SILENT_KEPT_S
        for stream_id in [name for name, entry in self._entries.items() if entry.heard_at < oldest]:
            self._forget(stream_id)

    def _forget(self, stream_id: str) -> None:
        entry = self._entries.pop(stream_id)
        self._num_bytes -= entry.start.num_bytes
        entry.released.set()
