"""Admission: which waiting requests join the running ones in a decision."""

from __future__ import annotations

from max_ray.kv_cache import lookup_hashes
from max_ray.scheduler.block_budget import BlockBudget
from max_ray.scheduler.decision import SchedulerLimits
from max_ray.scheduler.prefixes import PrefixesInProgress
from max_ray.scheduler.quarantine import Quarantine
from max_ray.scheduler.request_queues import RequestQueues
from max_ray.scheduler.scheduled_request import ScheduledRequest


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
        head, num_running = self._queues.head, len(self._queues.running)
        if head is None or num_running >= self._limits.max_batch_size:
            return False
        num_missing = self._budget.num_missing(head.context, 1)
        return num_running == 0 or num_missing + num_running <= self._budget.num_free_blocks

    def select(self) -> tuple[list[ScheduledRequest], ScheduledRequest | None]:
        """Requests to admit.

        Returns:
            Those that fit, and at most one after them that fits only if enough of its prefix is cached.
        """
        selected: list[ScheduledRequest] = []
        running = self._queues.running
        if self._quarantine.first_of(running.values()) is not None:
            return [], None
        num_free_blocks = self._budget.num_free_blocks
        num_free_tokens = self._limits.max_batch_input_tokens - sum(r.num_pending_tokens for r in running.values())
        in_progress = PrefixesInProgress(self._budget.page_size, self._budget.known_prefixes, running.values())
        for request in self._queues.waiting.values():
            num_running = len(running) + len(selected)
            if self._is_full(num_running, num_free_tokens) or self._must_wait(request, selected):
                break
            if self._limits.enable_prefix_caching and in_progress.has_much_of(request):
                continue
            num_missing = self._budget.num_missing(request.context, 1)
            if num_missing + num_running > num_free_blocks:
                is_refused = num_running and (selected or self.under_memory_pressure)
                return selected, None if is_refused else request
            selected.append(request)
            in_progress.add(request)
            num_free_blocks -= num_missing
            num_free_tokens -= self._num_input_tokens(request)
        return selected, None

    def _is_full(self, num_running: int, num_free_tokens: int) -> bool:
        return num_running >= self._limits.max_batch_size or (num_free_tokens <= 0 and num_running > 0)

    def _must_wait(self, request: ScheduledRequest, selected: list[ScheduledRequest]) -> bool:
        """Whether `request` may not be admitted together with `selected`, because one of them must run alone."""
        return bool(selected) and self._quarantine.first_of((request, selected[-1])) is not None

    def _num_input_tokens(self, request: ScheduledRequest) -> int:
        """Tokens that a waiting request will probably add to the first step."""
        if not self._limits.enable_prefix_caching:
            return request.num_pending_tokens
        hashes = lookup_hashes(request.context, self._budget.page_size)
        num_cached_blocks = self._budget.known_prefixes.num_leading(hashes)
        return request.num_pending_tokens - num_cached_blocks * self._budget.page_size
