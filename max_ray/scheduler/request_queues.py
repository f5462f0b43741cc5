"""RequestQueues: the waiting and the running requests, each by priority and then in order of arrival."""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice, takewhile

from max_ray.interfaces import RequestID
from max_ray.scheduler.scheduled_request import ScheduledRequest


class RequestQueues:
    """Two ordered tables: lower priority numbers first, and the older one first where they are equal.

    Of the requests of one priority, every running one is older than all waiting ones.

    Attributes:
        waiting: Requests that hold no block. Preempted ones return to the front of their priority.
        running: Requests that hold blocks. The last one is preempted first.
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
        """The waiting request that is admitted next."""
        return next(iter(self.waiting.values()), None)

    def get(self, request_id: RequestID) -> ScheduledRequest | None:
        """The request of this id, if it waits or runs."""
        return self.waiting.get(request_id) or self.running.get(request_id)

    def all(self) -> list[ScheduledRequest]:
        """All requests: the running ones first, each part in order."""
        return [*self.running.values(), *self.waiting.values()]

    @property
    def oldest_arrival(self) -> float | None:
        """When the oldest waiting request arrived, in monotonic seconds."""
        return min((request.arrival for request in self.waiting.values()), default=None)

    def is_waiting(self, request: ScheduledRequest) -> bool:
        """Whether this very request waits, and not another one that has the same id."""
        return self.waiting.get(request.request_id) is request

    def is_running(self, request: ScheduledRequest) -> bool:
        """Whether this very request runs."""
        return self.running.get(request.request_id) is request

    def add(self, request: ScheduledRequest) -> None:
        """Puts an arrival behind the waiting requests of its priority."""
        _append(self.waiting, request)

    def admit(self, request: ScheduledRequest) -> None:
        """Moves a waiting request to the running ones, behind those of its priority."""
        del self.waiting[request.request_id]
        _append(self.running, request)

    def requeue(self, request: ScheduledRequest) -> None:
        """Moves a running request before the waiting ones of its priority. All its tokens become a new prompt."""
        self.running.pop(request.request_id, None)
        request.context.reset()
        self.waiting[request.request_id] = request
        self.waiting.move_to_end(request.request_id, last=False)
        ahead = list(takewhile(lambda r: r.priority < request.priority, islice(self.waiting.values(), 1, None)))
        for other in reversed(ahead):
            self.waiting.move_to_end(other.request_id, last=False)

    def remove(self, request: ScheduledRequest) -> bool:
        """Removes a request; whether it was running."""
        self.waiting.pop(request.request_id, None)
        return self.running.pop(request.request_id, None) is not None


def _append(table: OrderedDict[RequestID, ScheduledRequest], request: ScheduledRequest) -> None:
    """Inserts a request behind those of its priority and of lower numbers. Costs nothing where it is the last."""
    later = list(takewhile(lambda r: r.priority > request.priority, reversed(table.values())))
    table[request.request_id] = request
    for other in reversed(later):
        table.move_to_end(other.request_id)
