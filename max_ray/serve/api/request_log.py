"""RequestLog: what happened to the last requests: why each waited, how long each phase took, what it held.

`GET /v1/requests/{id}` tells it, by the id of the answer. Kept in the replica that served the request, and, where an
application may have several replicas, every second also in an actor that all of them ask. The times go into the header
`Server-Timing` too.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Protocol

from max_ray.serve.api.objects.server import ChoiceRecord, RequestObject

if TYPE_CHECKING:
    from max_ray.serve.api.choice import Choice
    from max_ray.serve.api.generation import Generation

MAX_CHOICES = 8192
_CLOCK_OFFSET_S = time.monotonic() - perf_counter()
"""Between the scheduler's clock and that of the routes; nothing on Linux, where both are the same."""
PHASES = ("prepare", "queue", "prefill", "decode")


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request.

    Args:
        owner: Name of the API key that sent it.
        content: The JSON object that is told.
    """

    owner: str
    content: RequestObject

    @property
    def num_choices(self) -> int:
        """Of the request."""
        return len(self.content["choices"])


class SharedRecords(Protocol):
    """Records of all replicas of an application. Both methods raise WorkerGroupError where it does not answer."""

    async def put_records(self, records: list[tuple[str, RequestRecord]]) -> None:
        """Keeps records of requests that have ended.

        Args:
            records: Each with the id of its answer.
        """

    async def find_record(self, answer_id: str) -> RequestRecord | None:
        """The record of a request; None for one that is not kept."""


class LocalSharedRecords:
    """SharedRecords in one process, which is the actor's.

    Args:
        max_choices: Choices of all requests that are kept; the oldest requests are forgotten.
    """

    def __init__(self, max_choices: int = 4 * MAX_CHOICES) -> None:
        self._max_choices = max_choices
        self._num_choices = 0
        self._records: OrderedDict[str, RequestRecord] = OrderedDict()

    async def put_records(self, records: list[tuple[str, RequestRecord]]) -> None:
        for answer_id, record in records:
            before = self._records.pop(answer_id, None)  # a client may name its requests
            self._num_choices += record.num_choices - (0 if before is None else before.num_choices)
            self._records[answer_id] = record
        while self._num_choices > self._max_choices and len(self._records) > 1:
            self._num_choices -= self._records.popitem(last=False)[1].num_choices

    async def find_record(self, answer_id: str) -> RequestRecord | None:
        return self._records.get(answer_id)


class RequestLog:
    """The last requests of one replica, those in progress too.

    Args:
        replica: Its name.
        max_choices: Choices of all requests that are kept; the oldest requests are forgotten.
    """

    def __init__(self, replica: str, max_choices: int = MAX_CHOICES) -> None:
        self._replica = replica
        self._max_choices = max_choices
        self._num_choices = 0
        self._ended: deque[str] = deque(maxlen=max_choices)
        self._records: OrderedDict[str, Generation | RequestRecord] = OrderedDict()

    def begin(self, answer_id: str, generation: Generation) -> None:
        """A request was admitted to the queue.

        Args:
            answer_id: The id of its answer.
            generation: What makes it; is closed when it ends.
        """
        before = self._records.pop(answer_id, None)  # a client may name its requests
        self._num_choices -= 0 if before is None else before.num_choices
        self._records[answer_id] = generation
        self._num_choices += len(generation.choices)
        while self._num_choices > self._max_choices and len(self._records) > 1:
            _, oldest = self._records.popitem(last=False)
            self._num_choices -= oldest.num_choices

    def end(self, answer_id: str, generation: Generation) -> None:
        """A request has ended, however it did: its record will not change any more."""
        if self._records.get(answer_id) is generation:
            self._records[answer_id] = self._record(answer_id, generation)
            self._ended.append(answer_id)

    async def share(self, records: SharedRecords) -> None:
        """Tells of the requests that have ended since the last call. What cannot be told is not told again."""
        ended = list(self._ended)
        self._ended.clear()
        found = [(answer_id, self._records.get(answer_id)) for answer_id in ended]
        news = [(answer_id, record) for answer_id, record in found if isinstance(record, RequestRecord)]
        if news:
            await records.put_records(news)

    def find(self, answer_id: str) -> RequestRecord | None:
        """The record of a request; None for one that is not known here."""
        found = self._records.get(answer_id)
        return found if found is None or isinstance(found, RequestRecord) else self._record(answer_id, found)

    def _record(self, answer_id: str, generation: Generation) -> RequestRecord:
        now = perf_counter()
        content: RequestObject = {
            "id": answer_id,
            "object": "request",
            "status": "done" if generation.is_closed else "in_progress",
            "key": generation.owner or None,
            "replica": self._replica,
            "created": round(time.time() - (now - generation.arrival), 3),
            "total_ms": _ms(now - generation.arrival),
            "usage": generation.usage.as_dict(),
            "choices": [_choice_record(choice, generation.arrival) for choice in generation.choices],
        }
        return RequestRecord(generation.owner, content)


def server_timing(generation: Generation) -> str:
    """The value of a header `Server-Timing`: the phases that are over, each as long as for the slowest choice."""
    phases = [phase_seconds(choice, generation.arrival) for choice in generation.choices]
    over = {name: [s for s in (phase[name] for phase in phases) if s is not None] for name in PHASES}
    return ", ".join(f"{name};dur={_ms(max(seconds))}" for name, seconds in over.items() if seconds)


def phase_seconds(choice: Choice, arrival: float) -> dict[str, float | None]:
    """How long each phase of a choice took; None: it is not over.

    Args:
        choice: Of a request.
        arrival: perf_counter() when the request came.
    """
    trace = choice.context.trace
    times = [
        arrival,
        _on_perf_counter(trace.submitted_at),
        _on_perf_counter(trace.admitted_at),
        choice.first_token_time or None,
        _on_perf_counter(trace.ended_at) if choice.first_token_time else None,
    ]
    return {
        name: None if begin is None or end is None else max(0.0, end - begin)
        for name, begin, end in zip(PHASES, times, times[1:], strict=False)
    }


def _choice_record(choice: Choice, arrival: float) -> ChoiceRecord:
    trace = choice.context.trace
    seconds = phase_seconds(choice, arrival)
    return {
        "index": choice.index,
        "finish_reason": choice.finish_reason,
        "completion_tokens": choice.num_tokens,
        "cached_tokens": choice.num_cached_tokens,
        "wait_reason": None if trace.wait_reason is None else trace.wait_reason.value,
        "preemptions": trace.num_preemptions,
        "kv_blocks": max(trace.num_blocks, len(choice.context.block_table)),
        "prepare_ms": _ms_of(seconds["prepare"]),
        "queue_ms": _ms_of(seconds["queue"]),
        "prefill_ms": _ms_of(seconds["prefill"]),
        "decode_ms": _ms_of(seconds["decode"]),
    }


def _on_perf_counter(monotonic: float | None) -> float | None:
    """A time of the scheduler's clock on that of the routes."""
    return None if monotonic is None else monotonic - _CLOCK_OFFSET_S


def _ms_of(seconds: float | None) -> float | None:
    return None if seconds is None else _ms(seconds)


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
