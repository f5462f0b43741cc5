"""The words of scheduling: the limits, a request in the scheduler (Row), a decision, and the batch that comes of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from max_ray.errors import ConfigError
from max_ray.interfaces import CacheUpdate, TextContext
from max_ray.scheduler.channel import Channel


@dataclass(frozen=True)
class SchedulerLimits:
    """max_batch_size: rows that may run at once. max_batch_input_tokens: tokens of a run's first step (decode rows
    count one each and always run). max_queued_requests: requests that may wait beyond the free rows. max_num_steps:
    longest run. Without chunked prefill a prompt runs whole, over the budget if it must. enable_prefix_caching: whether
    the ledger finds prefixes again, so that waiting for one can pay."""

    max_batch_size: int
    max_batch_input_tokens: int
    max_queued_requests: int
    max_num_steps: int
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        for name, least in (
            ("max_batch_size", 1),
            ("max_batch_input_tokens", 1),
            ("max_queued_requests", 0),
            ("max_num_steps", 1),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, not {getattr(self, name)}.")


@dataclass(eq=False, slots=True)
class Row:
    """A request in the scheduler. arrival: monotonic seconds. num_committed: leading blocks offered as a prefix;
    num_delivered: generated tokens handed to the stream. num_failures: runs with this row that took the workers down
    since it last got a token."""

    context: TextContext
    arrival: float
    channel: Channel = field(default_factory=Channel)
    num_committed: int = 0
    num_delivered: int = 0
    num_failures: int = 0
    was_admitted: bool = False
    is_cancelled: bool = False

    @property
    def key(self) -> str:
        return self.context.request_id.value

    @property
    def is_suspect(self) -> bool:
        """Whether it may be this row that takes the workers down: it runs alone until it gets a token."""
        return self.num_failures >= 2

    @property
    def is_guilty(self) -> bool:
        """Two failures in company, and at least two alone."""
        return self.num_failures >= 4

    @property
    def pending(self) -> int:
        """Known tokens without keys and values: 1 for a decode row."""
        return len(self.context.tokens) - self.context.processed_length


@dataclass(slots=True)
class Decision:
    """What one decision asks of the ledger, and for how long a run. candidates: waiting rows that come in if their
    wants are granted, in order."""

    leases: CacheUpdate
    candidates: list[Row]
    num_steps: int


@dataclass(slots=True)
class Batch:
    rows: list[Row]
    num_steps: int
