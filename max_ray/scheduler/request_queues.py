"""RequestQueues: the waiting and the running requests, each in order of arrival."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from max_ray.interfaces import RequestID
from max_ray.scheduler.fair_share import FairShare
from max_ray.scheduler.scheduled_request import ScheduledRequest


class RequestQueues:
    """Two ordered tables. Every running request of a tenant is older than all waiting ones of that tenant.

    Args:
        share: Whose turn it is. It hears of every change.

    Attributes:
        waiting: Requests that hold no block. Preempted ones return to the front.
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

    @property
    def oldest(self) -> ScheduledRequest | None:
        """The waiting request at the front of the queue, in its turn or not."""
        return next(iter(self.waiting.values()), None)

    def in_order(self) -> Iterable[ScheduledRequest]:
        """The waiting requests in the order in which they may join."""
        return self.share.in_order() if self.share.is_contended else self.waiting.values()

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
        request.tenant = self.share.tenant_of(request.context)
        self.share.note_arrival(request.tenant)
        self.waiting[request.request_id] = request
        request.tenant.waiting[request.request_id] = request
        self.num_waiting_tokens += len(request.context.tokens)

    def admit(self, request: ScheduledRequest) -> None:
        """Moves a waiting request to the running ones."""
        self._leave(request)
        self.running[request.request_id] = request
        request.tenant.num_running += 1

    def requeue(self, request: ScheduledRequest) -> None:
        """Moves a running request to the front of the waiting ones. All its tokens become a new prompt."""
        if self.running.pop(request.request_id, None) is not None:
            request.tenant.num_running -= 1
        request.context.reset()
        for waiting in (self.waiting, request.tenant.waiting):
            waiting[request.request_id] = request
            waiting.move_to_end(request.request_id, last=False)
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
