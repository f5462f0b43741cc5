"""BlockBudget: its account between two messages to the KV manager, against the manager's own."""

from __future__ import annotations

import random

import pytest

from max_ray.interfaces import CacheReply, KVCacheParams, TextContext
from max_ray.kv_cache import PagedKVCacheManager
from max_ray.scheduler import SchedulerStats
from max_ray.scheduler.block_budget import BlockBudget
from tests.scheduler.fakes import make_context


class Account:
    """A budget and the manager that it keeps an account of."""

    def __init__(self, num_blocks: int = 16, page_size: int = 4) -> None:
        params = KVCacheParams(dtype="float32", num_layers=1, num_kv_heads=1, head_dim=8, page_size=page_size)
        self.manager = PagedKVCacheManager(params, num_blocks)
        self.stats = SchedulerStats()
        self.budget = BlockBudget(page_size, num_blocks, self.stats)

    def admit(self, context: TextContext, num_steps: int = 1) -> bool:
        update = self.budget.take_update([self.budget.block_request(context, num_steps, is_new=True)])
        (grant,) = self.budget.apply_reply(update, self.manager.update(update))
        if grant is not None:
            self.budget.first_grant(context, grant)
        return grant is not None

    def send(self) -> None:
        update = self.budget.take_update([])
        self.budget.apply_reply(update, self.manager.update(update))


@pytest.mark.parametrize(
    ("length", "num_steps", "missing"), [(3, 1, 1), (4, 1, 1), (5, 1, 2), (4, 2, 2), (1, 4, 1), (1, 5, 2), (1, 99, 2)]
)
def test_missing_blocks_cover_the_tokens_of_a_run_but_the_last(length: int, num_steps: int, missing: int) -> None:
    account = Account()
    context = make_context("a", range(length), max_new_tokens=7)
    assert account.budget.num_missing(context, num_steps) == missing
    assert account.admit(context, num_steps)
    assert len(context.block_table) == missing
    assert account.budget.num_missing(context, num_steps) == 0


@pytest.mark.parametrize(("num_tokens", "exceeds"), [(63, False), (64, False), (65, True)])
def test_what_the_whole_cache_holds(num_tokens: int, exceeds: bool) -> None:
    assert Account(num_blocks=16, page_size=4).budget.exceeds_cache(num_tokens) is exceeds


def test_blocks_that_are_given_back_count_until_the_manager_hears_of_them() -> None:
    """A reply that was on its way when a request ended does not know of its blocks yet."""
    account = Account()
    first, second = make_context("a", range(8)), make_context("b", range(20, 28))
    assert account.admit(first)
    update = account.budget.take_update([account.budget.block_request(second, 1, is_new=True)])
    reply = account.manager.update(update)
    account.budget.give_back(first)
    assert account.budget.num_free_blocks == 16
    account.budget.apply_reply(update, reply)
    assert (account.manager.num_free_blocks, account.budget.num_free_blocks) == (12, 14)
    assert account.budget.has_releases, "the message was older than the release"
    account.send()
    assert account.manager.num_free_blocks == account.budget.num_free_blocks == 14
    assert not account.budget.has_releases


def test_a_shared_block_does_not_become_free_and_the_next_reply_says_so() -> None:
    account = Account()
    first, second = make_context("a", range(9)), make_context("b", range(9))
    assert account.admit(first)
    first.update(1)
    account.budget.commit(first)
    assert account.admit(second)
    assert second.processed_length == 8
    account.budget.give_back(first)
    assert account.budget.num_free_blocks == 12 + 3, "an estimate"
    account.send()
    assert account.budget.num_free_blocks == account.manager.num_free_blocks == 13


def test_full_blocks_are_committed_once() -> None:
    account = Account()
    context = make_context("a", range(9), max_new_tokens=9)
    assert account.admit(context, num_steps=9)
    counts = []
    for token in range(6):
        context.update(token)
        account.budget.commit(context)
        commits = account.budget.take_update([]).commits
        counts.append([(first, len(hashes)) for _, first, hashes in commits])
    assert counts == [[(0, 2)], [], [], [(2, 1)], [], []]


def test_lost_blocks_are_released_without_a_commit() -> None:
    account = Account()
    context = make_context("a", range(9))
    assert account.admit(context)
    context.update(1)
    account.budget.lose_all()
    update = account.budget.take_update([])
    assert (update.commits, update.releases) == ([], ["a"])
    account.budget.reset(8, 99)
    assert (account.budget.page_size, account.budget.num_blocks, account.budget.num_free_blocks) == (8, 99, 99)


def test_the_account_may_not_change_while_requests_hold_blocks() -> None:
    account = Account()
    assert account.admit(make_context("a", range(9)))
    with pytest.raises(AssertionError, match="another KV manager"):
        account.budget.reset(4, 16)


def test_counts_of_the_prefix_cache_reach_the_stats() -> None:
    account = Account()
    account.budget.apply_reply(account.budget.take_update([]), CacheReply({}, 5, 16, 1, 2, 3))
    stats = account.stats
    assert (stats.prefix_cache_hits, stats.prefix_cache_misses, stats.prefix_cache_evictions) == (1, 2, 3)
    assert account.budget.num_free_blocks == 5


@pytest.mark.parametrize("seed", range(20))
def test_after_each_message_the_account_is_the_managers(seed: int) -> None:
    rng = random.Random(seed)
    account = Account(num_blocks=rng.randrange(8, 30), page_size=rng.choice([1, 3, 4]))
    alive: list[TextContext] = []
    for number in range(120):
        context = make_context(f"r{number}", range(rng.randrange(3), rng.randrange(4, 12)), 20)
        if account.admit(context, rng.randrange(1, 4)):
            alive.append(context)
        for held in rng.sample(alive, min(2, len(alive))):
            if rng.random() < 0.6:
                alive.remove(held)
                account.budget.give_back(held)
            elif account.budget.has_room(held) and held.remaining_new_tokens > 1:
                held.update(rng.randrange(5))
                account.budget.commit(held)
        account.send()
        assert account.budget.num_free_blocks == account.manager.num_free_blocks
        account.manager.assert_invariants()
