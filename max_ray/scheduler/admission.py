"""Admission: which waiting requests join the running ones in a decision."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from max_ray.interfaces import WaitReason
from max_ray.kv_cache import lookup_hashes
from max_ray.scheduler.block_budget import BlockBudget
from max_ray.scheduler.decision import SchedulerLimits
from max_ray.scheduler.fair_preemption import FairPreemption
from max_ray.scheduler.fair_share import Tenant
from max_ray.scheduler.prefixes import PrefixesInProgress
from max_ray.scheduler.quarantine import Quarantine
from max_ray.scheduler.request_queues import RequestQueues
from max_ray.scheduler.scheduled_request import ScheduledRequest


@dataclass(slots=True)
class Selection:
    """What one decision does to the queue.

    Attributes:
        admitted: Requests to admit, in order.
        speculative: One more, which fits only if enough of its prefix is cached.
        victims: Running requests of other tenants that must make room for them.
    """

    admitted: list[ScheduledRequest] = field(default_factory=list)
    speculative: ScheduledRequest | None = None
    victims: list[ScheduledRequest] = field(default_factory=list)


class Admission:
    """Admits strictly in the order of the queue, with one exception: a request whose prefix another one is computing
    waits for it and lets later ones pass.

    Attributes:
        under_memory_pressure: Whether a request was preempted since one last ended. No request is then admitted in
            the hope of a cached prefix.
    """

    def __init__(
        self, limits: SchedulerLimits, queues: RequestQueues, budget: BlockBudget, quarantine: Quarantine
    ) -> None:
        self.under_memory_pressure = False
        self._limits = limits
        self._queues = queues
        self._budget = budget
        self._quarantine = quarantine

    def could_admit(self) -> bool:
        """Whether a decision made now would probably admit the head of the queue."""
        share, num_running = self._queues.share, len(self._queues.running)
        if share.is_contended:
            share.count_blocks(self._queues.running.values())
        head = self._queues.head
        if head is None:
            return False
        if num_running and share.is_contended and self._quarantine.first_of(self._queues.running.values()) is None:
            return FairPreemption(self._limits, self._queues, self._budget).room_for(head) is not None
        if num_running >= self._limits.max_batch_size:
            return False
        num_missing = self._budget.num_missing(head.context, 1)
        return num_running == 0 or num_missing + num_running <= self._budget.num_free_blocks

    def select(self) -> Selection:
        """Requests to admit, those that fit, and what makes room for them."""
        selection = Selection()
        selected, running = selection.admitted, self._queues.running
        if self._quarantine.first_of(running.values()) is not None:
            return selection
        preemption = FairPreemption(self._limits, self._queues, self._budget)
        tokens = _PromptTokens(self._limits.max_batch_input_tokens, self._queues)
        in_progress = PrefixesInProgress(self._budget.page_size, self._budget.known_prefixes, running.values())
        for request in self._queues.in_order():
            reason = self._wait_reason(request, selected, tokens, preemption)
            if reason is not None:
                request.context.trace.wait_reason = reason
                break
            if self._limits.enable_prefix_caching and in_progress.has_much_of(request):
                request.context.trace.wait_reason = WaitReason.PREFIX
                continue
            victims = preemption.room_for(request)
            if victims is None:
                request.context.trace.wait_reason = WaitReason.KV_BLOCKS
                if preemption.num_running == 0 or not (selected or self.under_memory_pressure):
                    selection.speculative = request
                break
            selected.append(request)
            selection.victims += victims
            preemption.take(request, victims)
            in_progress.add(request)
            tokens.take(request, self._num_input_tokens(request))
        return selection

    def _wait_reason(
        self,
        request: ScheduledRequest,
        selected: list[ScheduledRequest],
        tokens: _PromptTokens,
        preemption: FairPreemption,
    ) -> WaitReason | None:
        """Why neither `request` nor one behind it may be admitted, whatever blocks are free."""
        if preemption.is_batch_full and not preemption.room_for(request):
            return WaitReason.BATCH_FULL
        if preemption.num_running and tokens.num_free(request.tenant) <= 0:
            return WaitReason.PROMPT_TOKENS
        if selected and self._quarantine.first_of((request, selected[-1])) is not None:
            return WaitReason.QUARANTINE
        return None

    def _num_input_tokens(self, request: ScheduledRequest) -> int:
        """Tokens that a waiting request will probably add to the first step."""
        if not self._limits.enable_prefix_caching:
            return request.num_pending_tokens
        hashes = lookup_hashes(request.context, self._budget.page_size)
        num_cached_blocks = self._budget.known_prefixes.num_leading(hashes)
        return request.num_pending_tokens - num_cached_blocks * self._budget.page_size


class _PromptTokens:
    """Tokens that the next step has left. The prompts of a tenant do not wait for those of tenants that got more."""

    def __init__(self, limit: int, queues: RequestQueues) -> None:
        self._num_free = limit
        self._by_tenant: dict[Tenant, int] | None = None
        self._share = queues.share
        if queues.share.is_contended:
            self._by_tenant = {}
            self._count_by_tenant(self._by_tenant, queues.running.values())
        else:
            self._num_free -= sum(request.num_pending_tokens for request in queues.running.values())

    def num_free(self, tenant: Tenant) -> int:
        """Tokens for a further prompt of this tenant."""
        if self._by_tenant is None:
            return self._num_free
        tag = self._share.tag(tenant)
        ahead = (n for other, n in self._by_tenant.items() if other is tenant or self._share.tag(other) <= tag)
        return self._num_free - sum(ahead)

    def take(self, request: ScheduledRequest, num_tokens: int) -> None:
        """A request is admitted."""
        if self._by_tenant is None:
            self._num_free -= num_tokens
        else:
            self._by_tenant[request.tenant] = self._by_tenant.get(request.tenant, 0) + num_tokens

    def _count_by_tenant(self, by_tenant: dict[Tenant, int], running: Iterable[ScheduledRequest]) -> None:
        for request in running:
            num_pending = request.num_pending_tokens
            if num_pending == 1:
                self._num_free -= 1
            else:
                by_tenant[request.tenant] = by_tenant.get(request.tenant, 0) + num_pending
