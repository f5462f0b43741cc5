"""RequestQueues: the waiting and the running requests, each in order of arrival."""

from __future__ import annotations

from collections import OrderedDict

from max_ray.interfaces import RequestID
from max_ray.scheduler.scheduled_request import ScheduledRequest


class RequestQueues:
    """Two ordered tables. Every running request is older than all waiting ones.

    Attributes:
        waiting: Requests that hold no block. Preempted ones return to the front.
        running: Requests that hold blocks.
    """

    def __init__(self) -> None:
        self.waiting: OrderedDict[RequestID, ScheduledRequest] = OrderedDict()
        self.running: OrderedDict[RequestID, ScheduledRequest] = OrderedDict()

    def __contains__(self, request_id: RequestID) -> bool:
        return request_id in self.waiting or request_id in self.running

    @property
    def is_empty(self) -> bool:
        """Whether no request waits or runs."""
        return not self.waiting and not self.running

    @property
    def head(self) -> ScheduledRequest | None:
        """The oldest waiting request."""
        return next(iter(self.waiting.values()), None)

    def get(self, request_id: RequestID) -> ScheduledRequest | None:
        """The request of this id, if it waits or runs."""
        return self.waiting.get(request_id) or self.running.get(request_id)

    def all(self) -> list[ScheduledRequest]:
        """All requests, the oldest first."""
        return [*self.running.values(), *self.waiting.values()]

    def is_waiting(self, request: ScheduledRequest) -> bool:
        """Whether this very request waits, and not another one that has the same id."""
        return self.waiting.get(request.request_id) is request

    def is_running(self, request: ScheduledRequest) -> bool:
        """Whether this very request runs."""
        return self.running.get(request.request_id) is request

    def add(self, request: ScheduledRequest) -> None:
        """Appends an arrival to the waiting requests."""
        self.waiting[request.request_id] = request

    def admit(self, request: ScheduledRequest) -> None:
        """Moves a waiting request to the running ones."""
        del self.waiting[request.request_id]
        self.running[request.request_id] = request

    def requeue(self, request: ScheduledRequest) -> None:
        """Moves a running request to the front of the waiting ones. All its tokens become a new prompt."""
        self.running.pop(request.request_id, None)
        request.context.reset()
        self.waiting[request.request_id] = request
        self.waiting.move_to_end(request.request_id, last=False)

    def remove(self, request: ScheduledRequest) -> bool:
        """Removes a request; whether it was running."""
        self.waiting.pop(request.request_id, None)
        return self.running.pop(request.request_id, None) is not None
