"""When which request goes out, and what it says.

Open loop: conversations begin at the times of a Poisson process (exponential gaps), whether or not earlier ones are
done. Closed loop: a fixed number are under way until none is left. Turns of one conversation follow one another.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isinf
from random import Random
from time import perf_counter
from typing import Any

from max_ray.benchmark.client import Client, Failure, Recording
from max_ray.benchmark.datasets import Conversation, Turn
from max_ray.benchmark.stream import Result, parse
from max_ray.errors import ConfigError


@dataclass(frozen=True)
class RequestSettings:
    """What all requests have in common. `seed` is sent, one more for each conversation, when draws are random."""

    endpoint: str
    model: str
    temperature: float = 0.0
    ignore_eos: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Pace:
    """Exactly one of: conversations a second (inf: all at once), or how many at a time."""

    request_rate: float | None = None
    max_concurrency: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.request_rate is None) == (self.max_concurrency is None):
            raise ConfigError("Give exactly one of --request-rate and --max-concurrency.")
        if self.request_rate is not None and not self.request_rate > 0:
            raise ConfigError(f"--request-rate must be more than 0, not {self.request_rate}.")
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise ConfigError(f"--max-concurrency must be at least 1, not {self.max_concurrency}.")

    def arrivals(self, num_conversations: int) -> list[float]:
        """Seconds after the start at which conversations begin; the first at 0. Needs a request rate."""
        assert self.request_rate is not None
        random = Random(f"arrivals-{self.seed}")
        times = [0.0]
        while len(times) < num_conversations:
            gap = 0.0 if isinf(self.request_rate) else random.expovariate(self.request_rate)
            times.append(times[-1] + gap)
        return times[:num_conversations]


OnDone = Callable[[Recording], None]


class Load:
    """Sends conversations through a client; `on_done` hears of each request that ended."""

    def __init__(self, client: Client, settings: RequestSettings, on_done: OnDone = lambda recording: None) -> None:
        self._client = client
        self._settings = settings
        self._on_done = on_done

    async def run(self, conversations: Sequence[Conversation], pace: Pace) -> list[Recording]:
        """All requests, in the order of the conversations. Turns that a failure kept from being sent are in it too."""
        kept: list[list[Recording]] = [[] for _ in conversations]
        runner = self._open_loop if pace.request_rate is not None else self._closed_loop
        await runner(conversations, pace, kept)
        return [recording for recordings in kept for recording in recordings]

    async def _open_loop(self, conversations: Sequence[Conversation], pace: Pace, kept: list[list[Recording]]) -> None:
        begin = perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for index, after in enumerate(pace.arrivals(len(conversations))):
                due = begin + after
                await asyncio.sleep(max(0.0, due - perf_counter()))
                tasks.create_task(self._converse(index, conversations[index], due, kept[index]))

    async def _closed_loop(
        self, conversations: Sequence[Conversation], pace: Pace, kept: list[list[Recording]]
    ) -> None:
        waiting = iter(enumerate(conversations))

        async def work() -> None:
            for index, conversation in waiting:
                await self._converse(index, conversation, perf_counter(), kept[index])

        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(pace.max_concurrency or 1, len(conversations))):
                tasks.create_task(work())

    async def _converse(self, index: int, conversation: Conversation, due: float, kept: list[Recording]) -> None:
        replies: list[str] = []
        for number in range(len(conversation)):
            body = self._body(index, conversation[: number + 1], replies)
            recording = await self._client.post(self._settings.endpoint, body, due)
            kept.append(recording)
            self._on_done(recording)
            if number + 1 == len(conversation):
                return
            result = parse(recording)  # the only parsing during a run: the next turn needs this one's text
            if result.failure is not None:
                kept.extend(_not_sent(conversation[number + 1 :], result))
                return
            replies.append(result.text)
            due = perf_counter()

    def _body(self, index: int, turns: Sequence[Turn], replies: Sequence[str]) -> dict[str, Any]:
        settings = self._settings
        body: dict[str, Any] = {
            "model": settings.model,
            "max_tokens": turns[-1].output_len,
            "temperature": settings.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if settings.ignore_eos:
            body["ignore_eos"] = True
        if settings.temperature > 0:
            body["seed"] = settings.seed + index
        if settings.endpoint == "chat":
            return body | {"messages": _messages(turns, replies)}
        return body | {"prompt": _prompt(turns, replies)}


def _messages(turns: Sequence[Turn], replies: Sequence[str]) -> list[dict[str, str]]:
    messages: list[dict[str, str]] = []
    for turn, reply in zip(turns, replies, strict=False):
        messages += [{"role": "user", "content": turn.text}, {"role": "assistant", "content": reply}]
    return [*messages, {"role": "user", "content": turns[-1].text}]


def _prompt(turns: Sequence[Turn], replies: Sequence[str]) -> str:
    past = "".join(f"{turn.text}{reply} " for turn, reply in zip(turns, replies, strict=False))
    return past + turns[-1].text


def _not_sent(turns: Sequence[Turn], after: Result) -> list[Recording]:
    failure = Failure("not_sent", "An earlier turn of the conversation failed.")
    return [Recording(after.end, turn.output_len, after.end, after.end, failure=failure) for turn in turns]
