"""RequestQueues: the waiting and the running requests, each by priority and then in order of arrival."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from itertools import islice, takewhile

from max_ray.interfaces import RequestID
from max_ray.scheduler.fair_share import FairShare
from max_ray.scheduler.scheduled_request import ScheduledRequest


class RequestQueues:
    """Two ordered tables: lower priority numbers first, and the older one first where they are equal.

    Of the requests of one priority and one tenant, every running one is older than all waiting ones.

    Args:
        share: Whose turn it is. It hears of every change.

    Attributes:
        waiting: Requests that hold no block. Preempted ones return to the front of their priority.
        running: Requests that hold blocks.
        num_waiting_tokens: Tokens that the waiting requests have to compute.
    """

    def __init__(self, share: FairShare) -> None:
        self.share = share
        self.num_waiting_tokens = 0
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
        """The waiting request whose turn it is."""
        return next(iter(self.in_order()), None)

    def in_order(self) -> Iterable[ScheduledRequest]:
        """The waiting requests in the order in which they may join."""
        return self.share.in_order() if self.share.is_contended else self.waiting.values()

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
        request.tenant = self.share.tenant_of(request.context)
        self.share.note_arrival(request.tenant)
        _append(self.waiting, request)
        _append(request.tenant.waiting, request)
        self.num_waiting_tokens += len(request.context.tokens)

    def admit(self, request: ScheduledRequest) -> None:
        """Moves a waiting request to the running ones, behind those of its priority."""
        self._leave(request)
        _append(self.running, request)
        request.tenant.num_running += 1

    def requeue(self, request: ScheduledRequest) -> None:
        """Moves a running request before the waiting ones of its priority. All its tokens become a new prompt."""
        if self.running.pop(request.request_id, None) is not None:
            request.tenant.num_running -= 1
        request.context.reset()
        _prepend(self.waiting, request)
        _prepend(request.tenant.waiting, request)
        self.num_waiting_tokens += len(request.context.tokens)

    def remove(self, request: ScheduledRequest) -> bool:
        """Removes a request; whether it was running."""
        was_running = self.running.pop(request.request_id, None) is not None
        if was_running:
            request.tenant.num_running -= 1
        elif request.request_id in self.waiting:
            self._leave(request)
        self.share.note_change(request.tenant)
        return was_running

    def _leave(self, request: ScheduledRequest) -> None:
        del self.waiting[request.request_id]
        del request.tenant.waiting[request.request_id]
        self.num_waiting_tokens -= len(request.context.tokens)


def _append(table: OrderedDict[RequestID, ScheduledRequest], request: ScheduledRequest) -> None:
    """Inserts a request behind those of its priority and of lower numbers. Costs nothing where it is the last."""
    later = list(takewhile(lambda r: r.priority > request.priority, reversed(table.values())))
    table[request.request_id] = request
    for other in reversed(later):
        table.move_to_end(other.request_id)


def _prepend(table: OrderedDict[RequestID, ScheduledRequest], request: ScheduledRequest) -> None:
    """Inserts a request before those of its priority and of higher numbers."""
    table[request.request_id] = request
    table.move_to_end(request.request_id, last=False)
    ahead = list(takewhile(lambda r: r.priority < request.priority, islice(table.values(), 1, None)))
    for other in reversed(ahead):
        table.move_to_end(other.request_id, last=False)
