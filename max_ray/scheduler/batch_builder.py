"""BatchBuilder: which running requests take part in the next run, with how many tokens, for how many steps."""

from __future__ import annotations

from collections.abc import Collection

from max_ray.scheduler.block_budget import BlockBudget
from max_ray.scheduler.decision import SchedulerLimits
from max_ray.scheduler.fair_share import FairShare
from max_ray.scheduler.quarantine import Quarantine
from max_ray.scheduler.scheduled_request import ScheduledRequest


class BatchBuilder:
    """Decoding requests first, then prompts within the token limit, in the order of the queue.

    Where several tenants have prompts, a step has prompts of one tenant only: the one whose turn it is. So the first
    token of a tenant does not wait for the prompts of another one.
    """

    def __init__(self, limits: SchedulerLimits, budget: BlockBudget, quarantine: Quarantine, share: FairShare) -> None:
        self._limits = limits
        self._budget = budget
        self._quarantine = quarantine
        self._share = share

    def affordable_steps(self, requests: Collection[ScheduledRequest]) -> int:
        """Steps of the longest run for which blocks are free; 1 if a part of a prompt is left for the next step."""
        if sum(request.num_pending_tokens for request in requests) > self._limits.max_batch_input_tokens:
            return 1
        num_steps = self._limits.max_num_steps
        while num_steps > 1 and self._num_missing(requests, num_steps) > self._budget.num_free_blocks:
            num_steps //= 2
        return num_steps

    def build(self, running: Collection[ScheduledRequest]) -> list[ScheduledRequest]:
        """Requests of the next run. Cuts prompts to the token limit."""
        ready = [r for r in running if self._budget.has_room(r.context) and not r.is_cancelled]
        alone = self._quarantine.first_of(ready)
        ready = ready if alone is None else [alone]
        batch = [request for request in ready if request.num_pending_tokens == 1]
        num_free_tokens = self._limits.max_batch_input_tokens - len(batch)
        is_first = True
        for request in self._prompts(ready):
            num_pending = request.num_pending_tokens
            num_tokens = self._num_tokens(num_pending, num_free_tokens, is_first=is_first)
            if num_tokens <= 0:
                break
            request.context.chunk(num_tokens)
            batch.append(request)
            num_free_tokens -= num_tokens
            is_first = False
        return batch

    def _prompts(self, ready: list[ScheduledRequest]) -> list[ScheduledRequest]:
        """Requests whose prompts may run now, in the order of the queue."""
        prompts = [request for request in ready if request.num_pending_tokens != 1]
        if not prompts or not self._share.is_contended:
            return prompts
        first = min(prompts, key=lambda request: (request.priority, self._share.tag(request.tenant)))
        return [request for request in prompts if request.tenant is first.tenant]

    def covered_steps(self, batch: list[ScheduledRequest], num_steps: int) -> int:
        """Steps, at most `num_steps`, for which every request of the batch has blocks."""
        for request in batch:
            context = request.context
            if self._budget.num_missing(context, num_steps):
                num_steps = len(context.block_table) * self._budget.page_size - context.active_end + 1
        return num_steps

    def _num_missing(self, requests: Collection[ScheduledRequest], num_steps: int) -> int:
        return sum(self._budget.num_missing(request.context, num_steps) for request in requests)

    def _num_tokens(self, num_pending: int, num_free_tokens: int, *, is_first: bool) -> int:
        """Tokens of a prompt that the next step takes."""
        if self._limits.enable_chunked_prefill:
            return min(num_pending, num_free_tokens)
        return num_pending if is_first or num_pending <= num_free_tokens else 0
