"""Where responses are kept: the contract, and a store in this process.

A server of several replicas keeps them in an actor that all of them reach (`max_ray.serve.response_store`), which has
the same class inside. What is kept is JSON text: its size is known, and nothing of it is decoded to pass it on.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

MAX_RESPONSES = 10_000
MAX_BYTES = 256 * 2**20
MAX_AGE_S = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """One response.

    Args:
        response: The response object.
        items: The input items of its request, as a JSON list.
        is_done: Whether it will not change any more.
        silence_s: Seconds since the replica that makes it was heard of.
        owner: Name of the API key that asked for it.
    """

    response: bytes
    items: bytes
    is_done: bool
    silence_s: float
    owner: str = ""


class ResponseStore(Protocol):
    """Keeps responses by id. Bounded in number, bytes and age: the oldest ones go first.

    Every method may raise WorkerGroupError where the store is elsewhere and does not answer.
    """

    async def put(
        self,
        response_id: str,
        response: bytes,
        items: bytes,
        output: bytes,
        parent: str | None,
        is_done: bool,
        owner: str = "",
    ) -> None:
        """Keeps a new response.

        Args:
            response_id: Its id.
            response: The response object as JSON.
            items: The input items of its request, as a JSON list.
            output: Its output items, as a JSON list.
            parent: The id of the response that it continues.
            is_done: Whether it is complete; else `finish` will complete it.
            owner: Name of the API key that asked for it.
        """

    async def finish(self, response_id: str, response: bytes, output: bytes) -> bool:
        """Completes a response that is not done.

        Args:
            response_id: Its id.
            response: The final response object.
            output: Its output items, as a JSON list.

        Returns:
            False where it was done before (cancelled), or is not kept any more.
        """

    async def find(self, response_id: str) -> StoredResponse | None:
        """The response; None for one that is not kept."""

    async def history(self, response_id: str) -> list[bytes] | None:
        """Items of the conversation up to a response and with its output: JSON lists, in order.

        None for a response that is not kept or not done. Previous responses count even when they were deleted.
        """

    async def delete(self, response_id: str) -> bool:
        """Forgets a response. Returns whether it was kept."""

    async def heartbeat(self, response_ids: list[str]) -> list[str]:
        """Notes that these responses are being made. Returns those that are not wanted any more."""


class _Turn:
    """What one request and its response add to a conversation. Later turns keep it alive."""

    __slots__ = ("__weakref__", "items", "output", "parent")

    def __init__(self, items: bytes, output: bytes, parent: _Turn | None) -> None:
        self.items = items
        self.output = output
        self.parent = parent


@dataclass(slots=True)
class _Record:
    response: bytes
    turn: _Turn
    is_done: bool
    made_at: float
    heard_at: float
    owner: str


class LocalResponseStore:
    """The store in this process: for the API without Ray, and inside the actor.

    Args:
        max_responses: How many are kept.
        max_bytes: Of JSON in all, with turns that later responses need.
        max_age_s: A response is forgotten after so many seconds.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        *,
        max_responses: int = MAX_RESPONSES,
        max_bytes: int = MAX_BYTES,
        max_age_s: float = MAX_AGE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._clock = clock
        self._records: dict[str, _Record] = {}  # the oldest first
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._records)

    async def put(
        self,
        response_id: str,
        response: bytes,
        items: bytes,
        output: bytes,
        parent: str | None,
        is_done: bool,
        owner: str = "",
    ) -> None:
        before = self._records.get(parent) if parent is not None else None
        turn = self._turn(items, output, before.turn if before else None)
        self.num_bytes += len(response)
        now = self._clock()
        self._records[response_id] = _Record(response, turn, is_done, now, now, owner)
        self._evict()

    async def finish(self, response_id: str, response: bytes, output: bytes) -> bool:
        record = self._records.get(response_id)
        if record is None or record.is_done:
            return False
        self.num_bytes += len(response) - len(record.response)
        record.response, record.is_done = response, True
        record.turn = self._turn(record.turn.items, output, record.turn.parent)
        self._evict()
        return True

    async def find(self, response_id: str) -> StoredResponse | None:
        self._evict()
        record = self._records.get(response_id)
        if record is None:
            return None
        silence_s = self._clock() - record.heard_at
        return StoredResponse(record.response, record.turn.items, record.is_done, silence_s, record.owner)

    async def history(self, response_id: str) -> list[bytes] | None:
        self._evict()
        record = self._records.get(response_id)
        if record is None or not record.is_done:
            return None
        lists: list[bytes] = []
        turn: _Turn | None = record.turn
        while turn is not None:
            lists += [turn.output, turn.items]
            turn = turn.parent
        return lists[::-1]

    async def delete(self, response_id: str) -> bool:
        return self._forget(response_id)

    async def heartbeat(self, response_ids: list[str]) -> list[str]:
        unwanted = []
        for response_id in response_ids:
            record = self._records.get(response_id)
            if record is None or record.is_done:
                unwanted.append(response_id)
            else:
                record.heard_at = self._clock()
        return unwanted

    def _turn(self, items: bytes, output: bytes, parent: _Turn | None) -> _Turn:
        turn, size = _Turn(items, output, parent), len(items) + len(output)
        self.num_bytes += size
        weakref.finalize(turn, self._release, size).atexit = False
        return turn

    def _release(self, size: int) -> None:
        self.num_bytes -= size

    def _evict(self) -> None:
        oldest_allowed = self._clock() - self._max_age_s
        for response_id in self._oldest():
            is_over = len(self._records) > self._max_responses or self.num_bytes > self._max_bytes
            if not is_over and self._records[response_id].made_at > oldest_allowed:
                return
            self._forget(response_id)

    def _oldest(self) -> Iterable[str]:
        while self._records:
            yield next(iter(self._records))

    def _forget(self, response_id: str) -> bool:
        record = self._records.pop(response_id, None)
        if record is None:
            return False
        self.num_bytes -= len(record.response)
        return True
