"""FairPreemption: room for a request, if need be at the cost of tenants that hold more than their share.

A running request is preempted for one of another tenant if

    its tenant's turn comes later, by virtual time, and
    its tenant holds at least as much as the other one, for its weight, even after the exchange; or the other one runs
    nothing, this one runs two or more, and a place in the batch is all that is missing

So no exchange can be followed by its reverse. A more important request (of a lower priority number) is not preempted
for a less important one, and the first running request in order never is.
"""

from __future__ import annotations

from max_ray.scheduler.block_budget import BlockBudget
from max_ray.scheduler.decision import SchedulerLimits
from max_ray.scheduler.fair_share import Tenant
from max_ray.scheduler.request_queues import RequestQueues
from max_ray.scheduler.scheduled_request import ScheduledRequest


class FairPreemption:
    """The batch and the blocks as one decision changes them; made for one decision.

    Attributes:
        num_running: Requests that run, with those admitted and without those preempted.
    """

    def __init__(self, limits: SchedulerLimits, queues: RequestQueues, budget: BlockBudget) -> None:
        self.num_running = len(queues.running)
        self._limits = limits
        self._queues = queues
        self._budget = budget
        self._share = queues.share
        self._num_free_blocks = budget.num_free_blocks
        self._victims: set[ScheduledRequest] = set()
        self._changes: dict[Tenant, tuple[int, int]] = {}  # requests and blocks, against `tenant.num_...`

    @property
    def is_batch_full(self) -> bool:
        """Whether no more request may run."""
        return self.num_running >= self._limits.max_batch_size

    def room_for(self, request: ScheduledRequest) -> list[ScheduledRequest] | None:
        """Running requests to preempt so that `request` fits; empty if it fits as it is, None if it cannot."""
        num_missing = self._budget.num_missing(request.context, 1)
        if not self.is_batch_full and num_missing + self.num_running <= self._num_free_blocks:
            return []
        if self.num_running == 0 and not self.is_batch_full:
            return None
        return self._victims_for(request, num_missing) if self._share.is_contended else None

    def take(self, request: ScheduledRequest, victims: list[ScheduledRequest]) -> None:
        """`request` is admitted, `victims` are preempted."""
        for victim in victims:
            self._note(victim.tenant, -1, -len(victim.context.block_table))
        self._victims.update(victims)
        num_missing = self._budget.num_missing(request.context, 1)
        self._note(request.tenant, 1, num_missing)

    def _note(self, tenant: Tenant, num_requests: int, num_blocks: int) -> None:
        requests, blocks = self._changes.get(tenant, (0, 0))
        self._changes[tenant] = (requests + num_requests, blocks + num_blocks)
        self.num_running += num_requests
        self._num_free_blocks -= num_blocks

    def _victims_for(self, request: ScheduledRequest, num_missing: int) -> list[ScheduledRequest] | None:
        is_place_enough = num_missing + self.num_running - 1 <= self._num_free_blocks
        if is_place_enough and self._held(request.tenant)[0] == 0:
            victim = self._victim_of(self._tenants_behind(request, num_missing), request.priority)
            return None if victim is None else [victim]
        return self._exchanged(request, num_missing)

    def _exchanged(self, request: ScheduledRequest, num_missing: int) -> list[ScheduledRequest] | None:
        """Victims whose tenants still hold as much as the tenant of `request` will."""
        will_hold = (self._held(request.tenant)[1] + num_missing) / request.tenant.weight
        victims: list[ScheduledRequest] = []
        for tenant in self._tenants_behind(request, num_missing):
            num_blocks = self._held(tenant)[1]
            for victim in self._candidates(tenant, request.priority):
                num_blocks -= len(victim.context.block_table)
                if num_blocks / tenant.weight < will_hold:
                    break
                victims.append(victim)
                if self._is_enough(victims, num_missing):
                    return victims
        return None

    def _is_enough(self, victims: list[ScheduledRequest], num_missing: int) -> bool:
        num_running = self.num_running - len(victims)
        num_free_blocks = self._num_free_blocks + sum(len(victim.context.block_table) for victim in victims)
        return num_running < self._limits.max_batch_size and num_missing + num_running <= num_free_blocks

    def _tenants_behind(self, request: ScheduledRequest, num_missing: int) -> list[Tenant]:
        """Tenants whose turn comes after `request`, the one that holds most for its weight first."""
        tag = self._share.tag(request.tenant, num_missing)
        behind = [t for t in self._share.active if t is not request.tenant and self._share.tag(t) > tag]
        return sorted(behind, key=lambda tenant: -self._held(tenant)[1] / tenant.weight)

    def _victim_of(self, tenants: list[Tenant], priority: int) -> ScheduledRequest | None:
        for tenant in tenants:
            candidates = self._candidates(tenant, priority) if self._held(tenant)[0] > 1 else []
            if candidates:
                return candidates[0]
        return None

    def _candidates(self, tenant: Tenant, priority: int) -> list[ScheduledRequest]:
        """Requests that may be preempted for one of a priority: the least important first, of these those that were
        preempted least often, and of these the youngest."""
        requests = list(self._queues.running.values())[:0:-1]
        own = [r for r in requests if r.tenant is tenant and r not in self._victims and not r.is_cancelled]
        lower = [request for request in own if request.priority >= priority]
        return sorted(lower, key=lambda request: (-request.priority, request.context.trace.num_preemptions))

    def _held(self, tenant: Tenant) -> tuple[int, int]:
        """Requests and blocks of a tenant."""
        requests, blocks = self._changes.get(tenant, (0, 0))
        return tenant.num_running + requests, tenant.num_blocks + blocks
