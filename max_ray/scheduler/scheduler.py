"""Scheduler: which requests run next. Synchronous; changes nothing but its own tables and the contexts.

A request is in one of three states:

    waiting   by priority, then in order of arrival, each tenant (API key) by itself; holds no block. Preempted requests
              return to the front of their priority. `FairShare` says which tenant's turn it is
    running   by priority, then in order of admission; holds blocks for all tokens that the run in progress can give it,
              its whole prompt included
    ended     its blocks go back with the next message to the KV manager

One decision is `schedule()` (what to ask of the KV manager), one exchange with it, and `apply()` (the batch that the
reply allows). The first running request is never preempted, so at least one always makes progress.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from max_ray.errors import InsufficientBlocksError
from max_ray.interfaces import BlockGrant, CacheReply
from max_ray.kv_cache import insufficient_blocks
from max_ray.scheduler.admission import Admission
from max_ray.scheduler.batch_builder import BatchBuilder
from max_ray.scheduler.block_budget import BlockBudget
from max_ray.scheduler.decision import Batch, ScheduleDecision, SchedulerLimits
from max_ray.scheduler.fair_share import FairShare
from max_ray.scheduler.quarantine import Quarantine
from max_ray.scheduler.request_queues import RequestQueues
from max_ray.scheduler.scheduled_request import ScheduledRequest
from max_ray.scheduler.stats import SchedulerStats


class Scheduler:
    """Admission, preemption and batches.

    Args:
        limits: Limits that hold for every decision.
        page_size: Tokens of a KV block.
        num_blocks: Blocks of the cache.
        stats: Counters, shared with the loop.
        clock: Seconds, monotonic.

    Attributes:
        limits: Limits that hold for every decision.
        stats: Counters, shared with the loop.
        queues: Waiting and running requests.
        budget: Account of the KV manager's blocks.
        quarantine: Requests that may take the workers down.
        admission: Choice of the waiting requests that join.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        page_size: int,
        num_blocks: int,
        stats: SchedulerStats,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits
        self.stats = stats
        self.clock = clock
        self.queues = RequestQueues(FairShare(page_size))
        self.budget = BlockBudget(page_size, num_blocks, stats)
        self.quarantine = Quarantine()
        self.admission = Admission(limits, self.queues, self.budget, self.quarantine)
        self._builder = BatchBuilder(limits, self.budget, self.quarantine, self.queues.share)
        self._must_preempt = False

    # One decision.

    def schedule(self) -> ScheduleDecision:
        """Makes room for the running requests, selects which may join, and writes the message to the KV manager."""
        self._fail_oversized()
        self._make_room()
        self.queues.share.charge(self.clock(), self.queues.running.values())
        selection = self.admission.select()
        for victim in selection.victims:
            self._preempt(victim)
        candidates, speculative = selection.admitted, selection.speculative
        running = self.queues.running.values()
        num_steps = self._builder.affordable_steps([*running, *candidates])
        for request in running:
            self.budget.commit(request.context)
        growing = [request for request in running if self.budget.num_missing(request.context, num_steps)]
        block_requests = [self.budget.block_request(request.context, num_steps, is_new=False) for request in growing]
        block_requests += [self.budget.block_request(request.context, num_steps, is_new=True) for request in candidates]
        if speculative is not None:
            block_requests.append(self.budget.block_request(speculative.context, 1, is_new=True))
            candidates.append(speculative)
        return ScheduleDecision(self.budget.take_update(block_requests), growing, candidates, num_steps)

    def apply(self, decision: ScheduleDecision, reply: CacheReply) -> Batch:
        """Takes in the granted blocks and builds the batch; an empty one if no request can run."""
        grants = self._take_grants(decision, reply)
        self._admit(decision.candidates, grants)
        running = self.queues.running.values()
        batch = self._builder.build(running)
        self._must_preempt = any(not self.budget.has_room(request.context) for request in running)
        if not batch:
            self._resolve_deadlock(decision)
        is_left_over = any(r.context.prompt_in_chunks for r in batch) or len(batch) < len(self.queues.running)
        if is_left_over or self.admission.could_admit():
            return Batch(batch, 1)
        return Batch(batch, self._builder.covered_steps(batch, decision.num_steps))

    def schedule_extension(
        self, batch: list[ScheduledRequest], tokens_left: Sequence[int], num_steps: int
    ) -> ScheduleDecision | None:
        """What a run in progress needs for `num_steps` more steps.

        Args:
            batch: Requests of the run.
            tokens_left: New tokens that the run, as it is, may still give each of them.
            num_steps: Steps, and tokens a request, to be added.

        Returns:
            The decision; None if the run should end: its requests do, another request could join the next run, or
            blocks are missing.
        """
        queues = self.queues
        present = [(r, left) for r, left in zip(batch, tokens_left, strict=True) if queues.is_running(r)]
        if len(present) < len(queues.running) or all(r.context.remaining_new_tokens <= n for r, n in present):
            return None
        is_full = len(queues.running) >= self.limits.max_batch_size
        if queues.waiting and (not is_full or (queues.share.is_contended and self.admission.could_admit())):
            return None
        missing = [self.budget.num_missing(request.context, left + num_steps) for request, left in present]
        if sum(missing) > self.budget.num_free_blocks:
            return None
        for request, _ in present:
            self.budget.commit(request.context)
        growing = [pair for pair, num_blocks in zip(present, missing, strict=True) if num_blocks]
        block_requests = [
            self.budget.block_request(request.context, left + num_steps, is_new=False) for request, left in growing
        ]
        return ScheduleDecision(
            self.budget.take_update(block_requests), [request for request, _ in growing], [], num_steps
        )

    def apply_extension(self, decision: ScheduleDecision, reply: CacheReply) -> bool:
        """Takes in the granted blocks; whether all were granted. Requests may have ended meanwhile."""
        return None not in self._take_grants(decision, reply)

    # Ends.

    def end(self, request: ScheduledRequest) -> None:
        """Removes a request, however it ended. Not during a run, unless the run itself ended the request."""
        self.quarantine.release(request)
        trace = request.context.trace
        trace.ended_at = self.clock()
        trace.num_blocks = max(trace.num_blocks, len(request.context.block_table))
        if trace.admitted_at is not None:
            self.queues.share.note_residence(trace.ended_at - trace.admitted_at)
        if self.queues.remove(request):
            self.budget.give_back(request.context)
            self.admission.under_memory_pressure = False

    def fail(self, request: ScheduledRequest, error: Exception) -> None:
        """Ends a request with an error."""
        self.end(request)
        self.stats.failed += not request.outputs.closed
        request.outputs.fail(error)

    def restart(self) -> None:
        """The workers lost the cache: the running requests return to the front of the queue, in order."""
        self.budget.lose_all()
        for request in reversed(list(self.queues.running.values())):
            self.queues.requeue(request)
        self.admission.under_memory_pressure = self._must_preempt = False

    # Helpers, in the order of use.

    def _fail_oversized(self) -> None:
        """Fails requests that have outgrown the whole cache."""
        for request in [*self.queues.running.values(), *([self.queues.head] if self.queues.head else [])]:
            num_tokens = len(request.context.tokens)
            if self.budget.exceeds_cache(num_tokens):
                self.fail(request, insufficient_blocks(num_tokens, self.budget.page_size, self.budget.num_blocks))

    def _make_room(self) -> None:
        """Preempts the last requests until the next token of every other one probably has a block: those of the
        highest priority number, of these the youngest."""
        running, budget = self.queues.running, self.budget
        num_missing = sum(budget.num_missing(request.context, 1) for request in running.values())
        while len(running) > 1 and (self._must_preempt or num_missing > budget.num_free_blocks):
            last = self.queues.share.last(running.values())
            num_missing -= budget.num_missing(last.context, 1)
            self._preempt(last)
            self.admission.under_memory_pressure = True
            self._must_preempt = False

    def _preempt(self, request: ScheduledRequest) -> None:
        """Takes the blocks of a running request back; it waits again."""
        trace = request.context.trace
        trace.num_preemptions += 1
        trace.num_blocks = max(trace.num_blocks, len(request.context.block_table))
        self.budget.give_back(request.context)
        self.queues.requeue(request)
        self.stats.preemptions += 1

    def _take_grants(self, decision: ScheduleDecision, reply: CacheReply) -> list[BlockGrant | None]:
        """Gives the running requests their blocks. Returns the grants of those, then of the candidates."""
        grants = self.budget.apply_reply(decision.update, reply)
        for request, grant in zip(decision.growing, grants, strict=False):
            if grant is not None and self.queues.is_running(request):
                self.budget.grant(request.context, grant)
        return grants

    def _admit(self, candidates: list[ScheduledRequest], grants: list[BlockGrant | None]) -> None:
        """Moves granted candidates to the running requests. A grant behind a refusal is declined, to keep the order.

        Args:
            candidates: Waiting requests, in order.
            grants: Their grants are the last ones.
        """
        is_open = True
        for request, grant in zip(candidates, grants[len(grants) - len(candidates) :], strict=True):
            if grant is None:
                is_open = is_open and request.is_cancelled
            elif is_open and self.queues.is_waiting(request):
                self.queues.admit(request)
                self.budget.first_grant(request.context, grant)
                self._note_admission(request, grant.cached_tokens)
            else:
                self.budget.decline(request.context)

    def _note_admission(self, request: ScheduledRequest, num_cached_tokens: int) -> None:
        """Counts a request that is admitted for the first time."""
        if not request.was_admitted:
            request.was_admitted = True
            request.context.trace.admitted_at = self.clock()
            request.context.cached_prefix_length = num_cached_tokens
            self.stats.prompt_tokens += request.context.tokens.prompt_length
            self.stats.prefix_hit_tokens += num_cached_tokens

    def _resolve_deadlock(self, decision: ScheduleDecision) -> None:
        """No request can run. If at most one runs, preemption does not help: it, or the first candidate, fails."""
        if len(self.queues.running) > 1:
            return
        for request in [*self.queues.running.values(), *decision.candidates][:1]:
            if not request.is_cancelled:
                self.fail(request, _blocks_held_elsewhere(self.budget.num_free_blocks, self.budget.num_blocks))


def _blocks_held_elsewhere(num_free_blocks: int, num_blocks: int) -> InsufficientBlocksError:
    return InsufficientBlocksError(
        f"Only {num_free_blocks} of {num_blocks} KV cache blocks are free, and no other request of this loop holds "
        f"any: blocks were claimed by other code. Release what was claimed from this cache by hand, or send the "
        f"request again later."
    )
