"""What a scheduling loop is doing at one moment: its limits and its requests, for people to look at."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from max_ray.interfaces import RequestID
from max_ray.scheduler.decision import SchedulerLimits
from max_ray.scheduler.request_queues import RequestQueues
from max_ray.scheduler.scheduled_request import ScheduledRequest

Phase = Literal["queued", "preempted", "prefill", "decode"]


@dataclass(frozen=True, slots=True)
class RequestActivity:
    """One request at one moment.

    Attributes:
        request_id: Identity of the request.
        phase: "queued" before it held blocks, "preempted" while it waits again, "prefill" while known tokens have to
            be computed, "decode" while it generates.
        age_s: Seconds since its arrival.
        prompt_tokens: Length of its prompt.
        cached_tokens: Prompt tokens that came from the prefix cache.
        processed_tokens: Tokens that have keys and values.
        generated_tokens: Tokens generated so far.
        blocks: int32, ids of its KV blocks, in order.
    """

    request_id: RequestID
    phase: Phase
    age_s: float
    prompt_tokens: int
    cached_tokens: int
    processed_tokens: int
    generated_tokens: int
    blocks: npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class LoopActivity:
    """One loop at one moment.

    Attributes:
        limits: Limits that hold for every decision.
        page_size: Tokens of a KV block; 0 without a KV cache.
        num_blocks: KV blocks of the cache; 0 without one.
        requests: Those that run, then those that wait, in order. A loop of embeddings names none.
    """

    limits: SchedulerLimits
    page_size: int = 0
    num_blocks: int = 0
    requests: tuple[RequestActivity, ...] = ()


def request_activities(queues: RequestQueues, now: float) -> tuple[RequestActivity, ...]:
    """The requests of a loop.

    Args:
        queues: Waiting and running requests.
        now: Present time, in monotonic seconds.
    """
    return tuple(_activities(queues.running.values(), now, is_running=True)) + tuple(
        _activities(queues.waiting.values(), now, is_running=False)
    )


def _activities(requests: Iterable[ScheduledRequest], now: float, *, is_running: bool) -> Iterable[RequestActivity]:
    for request in requests:
        context = request.context
        yield RequestActivity(
            request_id=request.request_id,
            phase=_running_phase(request) if is_running else "preempted" if request.was_admitted else "queued",
            age_s=now - request.arrival,
            prompt_tokens=context.tokens.prompt_length,
            cached_tokens=context.cached_prefix_length,
            processed_tokens=context.processed_length,
            generated_tokens=context.tokens.generated_length,
            blocks=context.block_table,
        )


def _running_phase(request: ScheduledRequest) -> Phase:
    """A decoding request has one token to compute; after a preemption all of them are a prompt again."""
    is_decoding = request.context.tokens.generated_length > 0 and request.num_pending_tokens <= 1
    return "decode" if is_decoding else "prefill"
