"""Limits of the scheduler, what one decision asks for, and the batch that results from it."""

from __future__ import annotations

from dataclasses import dataclass

from max_ray.errors import ConfigError
from max_ray.interfaces import CacheUpdate
from max_ray.scheduler.scheduled_request import ScheduledRequest


@dataclass(frozen=True)
class SchedulerLimits:
    """Limits that hold for every decision.

    Attributes:
        max_batch_size: Requests that may run at once.
        max_batch_input_tokens: Tokens of a run's first step. Decoding requests count one each and always run.
        max_queued_requests: Requests that may wait, beyond those for which the batch has room.
        max_num_steps: Steps of a run before it is extended, and steps that an extension adds.
        enable_chunked_prefill: Whether a prompt may be cut. If not, it runs whole, over the token limit if it must.
        enable_prefix_caching: Whether the KV manager finds prefixes again, so that waiting for one can pay.
        max_queued_tokens: Prompt tokens that may wait; None: as many as there are. One request may always wait.

    Raises:
        ConfigError: A limit is too small.
    """

    max_batch_size: int
    max_batch_input_tokens: int
    max_queued_requests: int
    max_num_steps: int
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    max_queued_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("max_batch_size", 1),
            ("max_batch_input_tokens", 1),
            ("max_queued_requests", 0),
            ("max_num_steps", 1),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, not {getattr(self, name)}.")
        if self.max_queued_tokens is not None and self.max_queued_tokens < 1:
            raise ConfigError(f"max_queued_tokens must be at least 1, not {self.max_queued_tokens}.")


@dataclass(slots=True)
class ScheduleDecision:
    """What one decision asks of the KV manager.

    Attributes:
        update: The message to the KV manager.
        growing: Running requests for which `update` asks for more blocks.
        candidates: Waiting requests that are admitted, in this order, if their blocks are granted.
        num_steps: Steps of the run that the requested blocks cover.
    """

    update: CacheUpdate
    growing: list[ScheduledRequest]
    candidates: list[ScheduledRequest]
    num_steps: int


@dataclass(slots=True)
class Batch:
    """Requests of one run.

    Attributes:
        requests: Those that take part; empty when none can run before another decision.
        num_steps: Steps of the run, and new tokens that it may give a request.
    """

    requests: list[ScheduledRequest]
    num_steps: int
