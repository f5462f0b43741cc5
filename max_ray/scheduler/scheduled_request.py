"""ScheduledRequest: one request in the scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field

from max_ray.interfaces import RequestID, TextContext
from max_ray.scheduler.fair_share import Tenant
from max_ray.scheduler.output_queue import OutputQueue


@dataclass(eq=False, slots=True)
class ScheduledRequest:
    """A request, from its arrival to its end.

    Attributes:
        context: State of the request; belongs to the pipeline while a run is in progress.
        arrival: Time of arrival, in monotonic seconds.
        outputs: Outputs that its reader has not read yet.
        request_id: Identity of the request.
        tenant: The API key that sent it; set when it is queued.
        priority: Lower numbers run earlier.
        num_delivered: Generated tokens that its reader has or that were put into `outputs`.
        was_admitted: Whether it has held blocks before.
        is_cancelled: Whether it ends at the next step boundary.
    """

    context: TextContext
    arrival: float
    outputs: OutputQueue = field(default_factory=OutputQueue)
    request_id: RequestID = field(init=False)
    tenant: Tenant = field(init=False)
    priority: int = field(init=False)
    num_delivered: int = field(init=False)
    was_admitted: bool = False
    is_cancelled: bool = False

    def __post_init__(self) -> None:
        self.request_id = self.context.request_id
        self.priority = self.context.priority
        self.num_delivered = self.context.tokens.generated_length  # of a stream that began elsewhere

    @property
    def num_pending_tokens(self) -> int:
        """Known tokens without keys and values: 1 while decoding."""
        return len(self.context.tokens) - self.context.processed_length
