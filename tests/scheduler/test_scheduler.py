"""Scheduler, one decision at a time and without a loop: the answers of the ledger are real ones, or written by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from max_ray.errors import InsufficientBlocksError
from max_ray.interfaces import CacheUpdate, KVCacheParams, TextContext
from max_ray.kv_cache import PagedKVCacheManager
from max_ray.scheduler import Batch, ScheduleDecision, ScheduledRequest, Scheduler, SchedulerLimits, SchedulerStats
from tests.scheduler.fakes import make_context


class Books:
    """A scheduler and a KV manager, stepped by hand."""

    def __init__(self, num_blocks: int = 16, batch_size: int = 4, budget: int = 16, max_num_steps: int = 8) -> None:
        params = KVCacheParams(dtype="float32", num_layers=1, num_kv_heads=1, head_dim=8, page_size=4)
        self.manager = PagedKVCacheManager(params, num_blocks)
        self.stats = SchedulerStats()
        limits = SchedulerLimits(batch_size, budget, 99, max_num_steps)
        self.scheduler = Scheduler(limits, 4, num_blocks, self.stats)

    def add(self, name: str, length: int, start: int = 0, max_new_tokens: int = 100) -> ScheduledRequest:
        request = ScheduledRequest(make_context(name, range(start, start + length), max_new_tokens), arrival=0.0)
        self.scheduler.queues.add(request)
        return request

    def schedule(self, *refuse: str) -> tuple[ScheduleDecision, Batch]:
        """One decision; the block requests of `refuse` are refused whatever the manager says."""
        decision = self.scheduler.schedule()
        asked, decision.update.requests = decision.update.requests, []
        kept = [want for want in asked if want.request_id not in refuse]
        decision.update.requests = kept
        reply = self.manager.update(decision.update)
        decision.update.requests = asked
        grants = {**reply.grants, **dict.fromkeys(refuse)}
        batch = self.scheduler.apply(decision, replace(reply, grants=grants))
        self.manager.assert_invariants()
        return decision, batch

    def run(self, batch: Batch, num_steps: int | None = None) -> None:
        for step in range(num_steps or batch.num_steps):
            for request in batch.requests:
                _advance(request.context, is_first=step == 0)


def _advance(context: TextContext, *, is_first: bool) -> None:
    if context.prompt_in_chunks and is_first:
        context.advance()
    elif is_first or context.active_length == 1:
        context.update(1)


def keys(batch: Batch) -> list[str]:
    return [request.request_id.value for request in batch.requests]


def waiting(books: Books) -> list[str]:
    return [request_id.value for request_id in books.scheduler.queues.waiting]


def running(books: Books) -> list[str]:
    return [request_id.value for request_id in books.scheduler.queues.running]


def wanted(decision: ScheduleDecision) -> dict[str, int]:
    return {want.request_id: want.num_tokens for want in decision.update.requests}


def test_decode_requests_come_before_prompts_and_blocks_are_requested_in_bulk() -> None:
    books = Books(budget=10)
    books.add("a", 3)
    decision, batch = books.schedule()
    assert wanted(decision) == {"a": 3 + 8 - 1}
    books.run(batch)
    books.add("b", 20, start=50)
    decision, batch = books.schedule()
    assert wanted(decision) == {"b": 20}, "a has room for the one step to come"
    assert (keys(batch), batch.num_steps) == (["a", "b"], 1)
    assert [request.context.active_length for request in batch.requests] == [1, 9]
    books.run(batch)
    _, batch = books.schedule()
    assert [request.context.active_length for request in batch.requests] == [1, 9]
    books.run(batch)
    _, batch = books.schedule()
    assert [request.context.active_length for request in batch.requests] == [1, 2]
    assert batch.num_steps == 8, "the prompt ends in this step: the run may go on"


def test_a_refused_decode_request_makes_the_next_decision_preempt() -> None:
    """The estimate was too good (blocks that are shared do not come back): the ledger has the last word."""
    books = Books(max_num_steps=1)
    first, second = books.add("a", 4), books.add("b", 4, start=20)
    _, batch = books.schedule()
    books.run(batch)
    _, batch = books.schedule("a")
    assert keys(batch) == ["b"]
    books.run(batch)
    decision, batch = books.schedule()
    assert decision.update.releases == ["b"]
    assert keys(batch)[0] == "a"
    assert books.stats.preemptions == 1
    assert second.context.tokens.generated_length == 2, "preemption keeps the tokens"
    assert not first.context.is_done


def test_a_refused_request_with_room_for_some_steps_takes_those() -> None:
    books = Books(max_num_steps=2)
    books.add("a", 3)
    _, batch = books.schedule()
    books.run(batch, num_steps=1)
    _, batch = books.schedule("a")
    assert (keys(batch), batch.num_steps) == (["a"], 1)
    assert books.stats.preemptions == 0


def test_speculative_admission_is_for_the_head_of_the_queue_and_does_not_shorten_runs() -> None:
    books = Books(num_blocks=6, max_num_steps=8)
    books.add("a", 8)
    _, batch = books.schedule()
    books.run(batch)
    books.add("b", 16, start=50)
    books.add("c", 4, start=90)
    decision, batch = books.schedule()
    assert list(wanted(decision))[-1] == "b"
    assert "c" not in wanted(decision)
    assert (keys(batch), batch.num_steps) == (["a"], 8), "b waits for blocks, so the run is as long as ever"
    books.scheduler.admission.under_memory_pressure = True
    assert "b" not in wanted(books.scheduler.schedule())


def test_preemption_makes_the_cache_tight_and_an_end_relaxes_it() -> None:
    books = Books(num_blocks=4, batch_size=2, max_num_steps=1)
    first, second = books.add("a", 4), books.add("b", 4, start=20)
    while not books.stats.preemptions:
        _, batch = books.schedule()
        books.run(batch)
    assert running(books) == ["a"]
    assert waiting(books) == ["b"]
    assert "b" not in wanted(books.schedule()[0])
    books.scheduler.end(first)
    decision, batch = books.schedule()
    assert keys(batch) == ["b"]
    assert second.context.processed_length > 0, "its own blocks were still cached"
    assert "a" in decision.update.releases


def test_when_a_request_ends_the_head_of_the_queue_is_admitted_speculatively_again() -> None:
    books = Books(num_blocks=6, max_num_steps=1)
    first, _ = books.add("a", 4), books.add("b", 8, start=20)
    _, batch = books.schedule()
    books.run(batch)
    books.add("big", 20, start=50)
    books.scheduler.admission.under_memory_pressure = True
    assert "big" not in wanted(books.schedule()[0])
    books.scheduler.end(first)
    assert "big" in wanted(books.schedule()[0])


def test_a_grant_behind_a_refusal_is_given_back() -> None:
    books = Books()
    for i, name in enumerate("abc"):
        books.add(name, 4, start=20 * i)
    _, batch = books.schedule("b")
    assert keys(batch) == ["a"]
    assert waiting(books) == ["b", "c"]
    books.run(batch)
    decision, batch = books.schedule()
    assert decision.update.releases == ["c"]
    assert keys(batch) == ["a", "b", "c"]


def test_an_arrival_during_the_exchange_makes_the_run_short() -> None:
    books = Books()
    books.add("a", 3)
    decision = books.scheduler.schedule()
    reply = books.manager.update(decision.update)
    books.add("b", 3, start=9)
    assert books.scheduler.apply(decision, reply).num_steps == 1


def test_an_arrival_that_cannot_come_in_leaves_the_run_long() -> None:
    books = Books(batch_size=1)
    books.add("a", 3)
    decision = books.scheduler.schedule()
    reply = books.manager.update(decision.update)
    books.add("b", 3, start=9)
    assert books.scheduler.apply(decision, reply).num_steps == 8
    assert not books.scheduler.admission.could_admit()


def test_newcomers_leave_a_block_for_each_running_row() -> None:
    books = Books(num_blocks=5, max_num_steps=1)
    books.add("a", 4)
    books.add("b", 13, start=20)
    _, batch = books.schedule()
    assert keys(batch) == ["a"], "b would leave no block for a to grow into"
    books = Books(num_blocks=6, max_num_steps=1)
    books.add("a", 4)
    books.add("b", 13, start=20)
    books.add("c", 1, start=50)
    _, batch = books.schedule()
    assert keys(batch) == ["a", "b"]


def test_restart_keeps_the_order_and_the_tokens() -> None:
    books = Books(batch_size=2, max_num_steps=2)
    requests = [books.add(name, 4, start=20 * i) for i, name in enumerate("abc")]
    _, batch = books.schedule()
    books.run(batch, num_steps=2)
    generated = [request.context.tokens.generated_length for request in requests]
    assert generated == [2, 2, 0]
    books.scheduler.restart()
    assert waiting(books) == ["a", "b", "c"]
    assert [request.context.tokens.generated_length for request in requests] == generated
    assert all(request.context.processed_length == 0 for request in requests)
    decision = books.scheduler.schedule()
    assert decision.update.commits == [], "what was computed is lost"


def test_full_blocks_are_committed_once_and_ended_requests_leave_them_behind() -> None:
    books = Books(max_num_steps=1)
    request = books.add("a", 9)
    _, batch = books.schedule()
    books.run(batch)
    decision, batch = books.schedule()
    assert [(key, first, len(hashes)) for key, first, hashes in decision.update.commits] == [("a", 0, 2)]
    for _ in range(3):
        books.run(batch)
        decision, batch = books.schedule()
    assert [(key, first, len(hashes)) for key, first, hashes in decision.update.commits] == [("a", 2, 1)]
    books.scheduler.end(request)
    assert books.scheduler.budget.has_releases
    flush = books.scheduler.budget.take_update([])
    assert (flush.commits, flush.releases) == ([], ["a"])
    books.scheduler.budget.apply_reply(flush, books.manager.update(flush))
    assert books.manager.num_free_blocks == 16
    assert not books.scheduler.budget.has_releases
    assert books.scheduler.budget.take_update([]) == CacheUpdate()


def test_hits_misses_and_evictions_of_the_prefix_cache_are_counted_in_blocks() -> None:
    books = Books(num_blocks=4, max_num_steps=1)
    for start in (0, 0, 50):  # the second finds both blocks of the first, the third takes them
        request = books.add("a", 9, start=start, max_new_tokens=1)
        _, batch = books.schedule()
        books.run(batch)
        books.scheduler.end(request)
    stats = books.stats
    assert (stats.prefix_cache_hits, stats.prefix_cache_misses) == (2, 4)
    assert stats.prefix_cache_evictions == books.manager.metrics.evictions > 0


def test_a_request_that_outgrew_the_cache_fails_alone() -> None:
    books = Books(num_blocks=2, max_num_steps=1)
    request = books.add("a", 7)
    books.add("b", 3, start=30)
    for _ in range(2):
        _, batch = books.schedule()
        books.run(batch)
    books.schedule()
    assert request.outputs.closed
    assert running(books) == ["b"]
    assert books.stats.failed == 1


def test_no_request_can_run_and_none_can_be_preempted() -> None:
    books = Books()
    request = books.add("a", 3)
    _, batch = books.schedule("a")
    assert batch.requests == []
    assert books.scheduler.queues.is_empty
    assert request.outputs.closed
    with pytest.raises(InsufficientBlocksError, match="16 of 16 KV cache blocks are free"):
        raise request.outputs.error or AssertionError
