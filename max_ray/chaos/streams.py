"""Streams that run all the time, each compared with the text of the undisturbed server."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

from max_ray.benchmark.client import Client, Failure, Recording
from max_ray.benchmark.stream import parse
from max_ray.chaos.resuming import post_resumable
from max_ray.errors import MaxRayError

_PAUSE_AFTER_FAILURE_S = 0.05
_SEEDS = 3


@dataclass(frozen=True)
class Stream:
    """One stream that ended.

    Args:
        start: When it was sent, in seconds of `perf_counter`.
        end: When it ended.
        failure: Why it did not end well.
        is_equal: Whether its text is the undisturbed one, or begins it where the stream failed.
        events_at: When pieces of text came.
        is_resumable: Whether it may be read on over another connection.
        num_resumed: How often it was.
    """

    start: float
    end: float
    failure: Failure | None
    is_equal: bool
    events_at: tuple[float, ...] = ()
    is_resumable: bool = False
    num_resumed: int = 0


class Load:
    """Keeps a number of streams open: greedy ones and, by turns, seeded ones at temperature 1. Of four, two are
    resumable.

    Args:
        client: An open client.
        model: Model to ask for.
        num_streams: Streams at a time.
        max_tokens: Tokens of each.
    """

    def __init__(self, client: Client, model: str, num_streams: int, max_tokens: int) -> None:
        self.streams: list[Stream] = []
        self._client = client
        self._model = model
        self._max_tokens = max_tokens
        self._expected: list[str] = []
        self._bodies = [self._body(number) for number in range(num_streams)]
        self._is_over = False

    async def learn(self) -> None:
        """Runs every stream twice, undisturbed. Raises MaxRayError when one fails or the two texts differ."""
        numbers = range(len(self._bodies))
        plain = [self._client.post("completions", body, perf_counter()) for body in self._bodies]
        first = _texts(await asyncio.gather(*plain))
        second = _texts([recording for recording, _ in await asyncio.gather(*map(self._sent, numbers))])
        if first != second:
            raise MaxRayError("The undisturbed server gives other texts each time: nothing can be compared with them.")
        self._expected = first

    async def run(self) -> None:
        """Until `stop`, and the end of the streams that are open then."""
        await asyncio.gather(*[self._repeat(number) for number in range(len(self._bodies))])

    def stop(self) -> None:
        self._is_over = True

    async def _repeat(self, number: int) -> None:
        while not self._is_over:
            recording, num_resumed = await self._sent(number)
            failure = parse(recording).failure
            partial = parse(replace(recording, failure=None))
            expected = self._expected[number]
            is_equal = partial.text == expected if failure is None else expected.startswith(partial.text)
            events = tuple(recording.times)
            times = (recording.start, recording.end)
            self.streams.append(Stream(*times, failure, is_equal, events, _is_resumable(number), num_resumed))
            if failure is not None:
                await asyncio.sleep(_PAUSE_AFTER_FAILURE_S)

    async def _sent(self, number: int) -> tuple[Recording, int]:
        """A stream of a slot, and how often it was resumed."""
        body = self._bodies[number]
        if not _is_resumable(number):
            return await self._client.post("completions", body, perf_counter()), 0
        name = secrets.token_hex(8)
        options = {**body["stream_options"], "resumable": True}
        asked = {**body, "request_id": name, "stream_options": options}
        return await post_resumable(self._client, asked, f"cmpl-{name}")

    def _body(self, number: int) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": f"{number} and then",
            "max_tokens": self._max_tokens,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return body if number % 2 == 0 else body | {"temperature": 1.0, "seed": number % _SEEDS}


def _texts(recordings: Sequence[Recording]) -> list[str]:
    results = [parse(recording) for recording in recordings]
    failed = next((result.failure for result in results if result.failure is not None), None)
    if failed is not None:
        raise MaxRayError(f"A stream of the undisturbed server failed ({failed.kind}): {failed.message}")
    return [result.text for result in results]


def _is_resumable(number: int) -> bool:
    """By the number of the slot."""
    return number % 4 >= 2


def longest_gap(streams: Sequence[Stream], begin: float, end: float) -> float:
    """Longest time without a piece of text, in seconds, of any stream that was open in the interval."""
    gaps = [
        later - earlier
        for stream in streams
        for earlier, later in zip((stream.start, *stream.events_at), stream.events_at, strict=False)
        if later >= begin and earlier <= end
    ]
    return max(gaps, default=0.0)
