"""FairShare: whose turn it is when several tenants (API keys) want the same worker group.

Weighted fair queueing in KV-block-seconds. Each tenant has a virtual time: the block-seconds that its requests held
while a request of any tenant waited, over its weight. The tenant with the earliest tag goes next:

    tag = virtual time + blocks that it holds now * mean residence of a request / weight

The second term is what its running requests will probably cost. Without it one decision could give a whole batch to the
tenant that is a little behind. A tenant whose queue was empty starts at the virtual time of those that wait: credit is
not saved up. Time with an empty queue costs nothing, for it was taken from no one. With one tenant nothing is counted,
and the order is that of arrival.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from max_ray.interfaces import RequestID, TextContext

if TYPE_CHECKING:
    from max_ray.scheduler.scheduled_request import ScheduledRequest

_FIRST_RESIDENCE_S = 1.0
_RESIDENCE_MEMORY = 0.1


@dataclass(eq=False, slots=True)
class Tenant:
    """One of those that share the worker group: an API key.

    Attributes:
        name: The name of the key; "" without keys.
        weight: Its share, in proportion to the other tenants' weights.
        virtual_time: Block-seconds over weight.
        num_running: Requests that hold blocks.
        num_blocks: KV blocks that they held at the last decision.
        waiting: Its waiting requests in order.
    """

    name: str
    weight: float = 1.0
    virtual_time: float = 0.0
    num_running: int = 0
    num_blocks: int = 0
    waiting: OrderedDict[RequestID, ScheduledRequest] = field(default_factory=OrderedDict)

    @property
    def is_active(self) -> bool:
        """Whether it has requests."""
        return bool(self.num_running or self.waiting)


class FairShare:
    """The tenants of one scheduler.

    Args:
        page_size: Tokens of a KV block.

    Attributes:
        residence_s: Seconds that a request holds blocks, lately.
    """

    def __init__(self, page_size: int) -> None:
        self.residence_s = _FIRST_RESIDENCE_S
        self._page_size = page_size
        self._tenants: dict[str, Tenant] = {}
        self._active: dict[Tenant, None] = {}
        self._floor = 0.0
        self._counted_at: float | None = None

    @property
    def is_contended(self) -> bool:
        """Whether requests of several tenants are here."""
        return len(self._active) > 1

    @property
    def active(self) -> Iterable[Tenant]:
        """Tenants that have requests."""
        return self._active.keys()

    def tenant_of(self, context: TextContext) -> Tenant:
        """The tenant that sent a request, with the weight that it has now."""
        tenant = self._tenants.get(context.tenant)
        if tenant is None:
            tenant = self._tenants[context.tenant] = Tenant(context.tenant)
        tenant.weight = context.tenant_weight
        return tenant

    # What the queues report.

    def note_arrival(self, tenant: Tenant) -> None:
        """A request is about to wait. A tenant whose queue was empty gets no credit for the time before."""
        if not tenant.waiting:
            waiting = [other.virtual_time for other in self._active if other.waiting]
            tenant.virtual_time = max(tenant.virtual_time, min(waiting, default=self._floor))
        self._active[tenant] = None

    def note_change(self, tenant: Tenant) -> None:
        """A request of this tenant was admitted, put back or removed."""
        if tenant.is_active:
            self._active[tenant] = None
        else:
            tenant.num_blocks = 0
            self._active.pop(tenant, None)

    def note_residence(self, seconds: float) -> None:
        """A request ended that had held blocks for so long."""
        self.residence_s += _RESIDENCE_MEMORY * (seconds - self.residence_s)

    def charge(self, now: float, running: Iterable[ScheduledRequest]) -> None:
        """Charges each tenant for the time since the last call, and counts its blocks anew.

        Args:
            now: Seconds, monotonic.
            running: All running requests.
        """
        if not self.is_contended:
            self._counted_at = None
            return
        elapsed = 0.0 if self._counted_at is None else now - self._counted_at
        waiting = [tenant for tenant in self._active if tenant.waiting]
        for tenant in self._active:
            if waiting:
                tenant.virtual_time += tenant.num_blocks * elapsed / tenant.weight
        self.count_blocks(running)
        self._floor = max(self._floor, min((tenant.virtual_time for tenant in waiting), default=self._floor))
        self._counted_at = now

    def count_blocks(self, running: Iterable[ScheduledRequest]) -> None:
        """Counts what each tenant holds now. `running`: all running requests."""
        for tenant in self._active:
            tenant.num_blocks = 0
        for request in running:
            request.tenant.num_blocks += len(request.context.block_table)

    # Whose turn it is.

    def tag(self, tenant: Tenant, num_more_blocks: int = 0) -> float:
        """The virtual time of a tenant once its running requests have ended, and `num_more_blocks` more."""
        return tenant.virtual_time + (tenant.num_blocks + num_more_blocks) * self.residence_s / tenant.weight

    def in_order(self) -> Iterator[ScheduledRequest]:
        """The waiting requests of all tenants, as if each one that is given were admitted: by priority, then by tenant,
        then in order of arrival."""
        heap = []
        for number, tenant in enumerate(self._active):
            if tenant.waiting:
                requests = iter(tenant.waiting.values())
                first = next(requests)
                heap.append((first.priority, self.tag(tenant), first.arrival, number, first, 0, requests))
        heapq.heapify(heap)
        while heap:
            *_, number, request, num_blocks, requests = heap[0]
            yield request
            num_blocks += self.num_blocks_of(request)
            following = next(requests, None)
            if following is None:
                heapq.heappop(heap)
            else:
                tag = self.tag(following.tenant, num_blocks)
                key = (following.priority, tag, following.arrival, number)
                heapq.heapreplace(heap, (*key, following, num_blocks, requests))

    def num_blocks_of(self, request: ScheduledRequest) -> int:
        """Blocks that a waiting request takes when it is admitted."""
        return len(request.context.tokens) // self._page_size + 1

    def share_of(self, tenant: Tenant) -> float:
        """The part of the server that is this tenant's while those that have requests now have them: 0 to 1."""
        others = sum(other.weight for other in self._active if other is not tenant)
        return tenant.weight / (tenant.weight + others)

    # Preemption.

    def last(self, running: Iterable[ScheduledRequest]) -> ScheduledRequest:
        """The request to preempt for want of blocks: of those with the highest priority number, the youngest one of the
        tenant that holds most for its weight.

        Args:
            running: All running requests, at least two, in order. The first one is never preempted.
        """
        requests = list(running)
        if not self.is_contended:
            return requests[-1]
        blocks: dict[Tenant, int] = {}
        for request in requests:
            blocks[request.tenant] = blocks.get(request.tenant, 0) + len(request.context.block_table)
        priority = requests[-1].priority
        by_tenant = {request.tenant: request for request in requests[1:] if request.priority == priority}
        return max(by_tenant.values(), key=lambda request: blocks[request.tenant] / request.tenant.weight)
