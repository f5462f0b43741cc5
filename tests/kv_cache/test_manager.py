"""PagedKVCacheManager: borders, then random traffic against the naive ledger."""

from __future__ import annotations

import random

import numpy as np
import pytest

from max_ray.errors import ConfigError, InputError, InsufficientBlocksError
from max_ray.interfaces import (
    BlockRequest,
    CacheUpdate,
    KVCacheParams,
    RequestID,
    SamplingParams,
    TextContext,
    TokenBuffer,
)
from max_ray.kv_cache import LocalKVCacheClient, PagedKVCacheManager, hash_blocks, tokens_to_cover
from tests.kv_cache.naive_ledger import NaiveLedger


def make_manager(num_blocks: int = 8, page_size: int = 4, **kwargs: bool) -> PagedKVCacheManager:
    params = KVCacheParams(dtype="float32", num_layers=1, num_kv_heads=1, head_dim=8, page_size=page_size)
    return PagedKVCacheManager(params, num_blocks, **kwargs)


def make_context(name: str, tokens: list[int], **sampling: int) -> TextContext:
    return TextContext(
        request_id=RequestID(name),
        tokens=TokenBuffer(tokens),
        max_length=10_000,
        sampling_params=SamplingParams(**sampling),  # type: ignore[arg-type]
    )


def run_step(context: TextContext, token: int = 1) -> None:
    """What a pipeline does to a context in one step."""
    if context.prompt_in_chunks:
        context.advance()
    else:
        context.update(token)


def prefill(manager: PagedKVCacheManager, context: TextContext, num_steps: int = 1) -> None:
    manager.claim(context.request_id)
    manager.alloc(context, num_steps=num_steps)
    run_step(context)
    manager.step([context])
    manager.assert_invariants()


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("extra", [-1, 0, 1])
@pytest.mark.parametrize("num_steps", [1, 2, 17])
def test_alloc_covers_the_active_tokens_and_the_steps(page_size: int, extra: int, num_steps: int) -> None:
    length = max(1, 2 * page_size + extra)
    manager = make_manager(64, page_size)
    context = make_context("a", list(range(length)))
    manager.claim("a")
    manager.alloc(context, num_steps=num_steps)
    expected = -(-(length + num_steps - 1) // page_size)
    assert len(context.block_table) == expected
    assert context.block_table.dtype == np.int32
    assert manager.get_req_blocks("a") == context.block_table.tolist()
    assert manager.num_free_blocks == 64 - expected


def test_a_row_that_may_sample_little_gets_no_blocks_for_more() -> None:
    context = make_context("a", [1, 2, 3], max_new_tokens=2)
    assert tokens_to_cover(context, 8) == 4
    context.chunk(2)
    assert tokens_to_cover(context, 8) == 2, "a chunk that does not sample takes one step"


def test_one_block_at_a_time_while_decoding() -> None:
    manager = make_manager(8, 4)
    context = make_context("a", [1, 2, 3])
    manager.claim(context)
    sizes = []
    for _ in range(6):
        manager.alloc(context, num_steps=1)
        sizes.append(len(context.block_table))
        run_step(context)
        manager.step([context])
    assert sizes == [1, 1, 2, 2, 2, 2]
    assert manager.get_req_blocks(context) == context.block_table.tolist()


@pytest.mark.parametrize("page_size", [1, 16])
def test_prefix_hit_of_exactly_one_block(page_size: int) -> None:
    manager = make_manager(64, page_size)
    first = make_context("a", list(range(page_size + 1)))
    prefill(manager, first)
    second = make_context("b", [*range(page_size), 99, 98])
    prefill(manager, second)
    assert second.cached_prefix_length == page_size
    assert second.block_table[0] == first.block_table[0]
    assert second.block_table[1] != first.block_table[1]
    assert manager.metrics.cache_hit_tokens == page_size


@pytest.mark.parametrize("page_size", [1, 16])
def test_a_full_hit_leaves_one_block_to_run(page_size: int) -> None:
    manager = make_manager(64, page_size)
    tokens = list(range(3 * page_size))
    prefill(manager, make_context("a", tokens))
    second = make_context("b", tokens)
    manager.claim("b")
    manager.alloc(second)
    assert second.processed_length == 2 * page_size
    assert second.active_length == page_size
    manager.assert_invariants()


def test_one_token_more_than_the_cached_blocks_reuses_them_all() -> None:
    manager = make_manager(16, 4)
    prefill(manager, make_context("a", list(range(8))))
    second = make_context("b", [*range(8), 50])
    manager.claim("b")
    manager.alloc(second)
    assert second.processed_length == 8
    assert second.active_length == 1


def test_blocks_of_a_running_request_are_reused_and_outlive_it() -> None:
    manager = make_manager(8, 4)
    first = make_context("a", list(range(9)))
    prefill(manager, first)
    second = make_context("b", list(range(9)))
    manager.claim("b")
    manager.alloc(second)
    assert manager.num_free_blocks == 8 - 4, "two shared, one each"
    manager.release("a")
    manager.assert_invariants()
    assert manager.get_req_blocks("b")[:2] == first.block_table[:2].tolist()
    assert manager.num_free_blocks == 8 - 3


def test_identical_blocks_are_deduplicated_at_step() -> None:
    manager = make_manager(8, 4)
    first, second = make_context("a", list(range(5))), make_context("b", list(range(5)))
    for context in (first, second):
        manager.claim(context)
        manager.alloc(context)
    in_flight = second.block_table
    before = in_flight.tolist()
    for context in (first, second):
        run_step(context)
    manager.step([first, second])
    assert second.block_table[0] == first.block_table[0]
    assert in_flight.tolist() == before, "the table that a run may still hold was written to"
    assert manager.num_free_blocks == 8 - 3
    assert manager.get_req_blocks("b") == second.block_table.tolist()
    manager.assert_invariants()


def test_the_tail_is_evicted_first_and_unused_cached_blocks_are_revived() -> None:
    manager = make_manager(4, 4)
    prefill(manager, make_context("a", list(range(12))))
    manager.release("a")
    other = make_context("b", [77] * 8)
    manager.claim("b")
    manager.alloc(other)
    assert manager.metrics.evictions == 1, "the fourth block was empty, the other one was the tail"
    manager.release("b")
    again = make_context("c", list(range(12)))
    manager.claim("c")
    manager.alloc(again)
    assert again.cached_prefix_length == 8
    manager.assert_invariants()


def test_alloc_that_does_not_fit_changes_nothing() -> None:
    manager = make_manager(3, 4)
    prefill(manager, make_context("a", list(range(8))))
    newcomer = make_context("b", [*range(8), *range(50, 58)])
    manager.claim("b")
    metrics = (manager.metrics.cache_hits, manager.metrics.cache_misses)
    with pytest.raises(InsufficientBlocksError, match=r"needs 4 KV cache blocks for 16 tokens.* 3 blocks of 4 tokens"):
        manager.alloc(newcomer)
    assert manager.get_req_blocks("b") == []
    assert newcomer.processed_length == 0
    assert (manager.metrics.cache_hits, manager.metrics.cache_misses) == metrics
    manager.assert_invariants()


def test_the_error_of_a_busy_cache_says_what_is_free() -> None:
    manager = make_manager(3, 4)
    prefill(manager, make_context("a", list(range(8))))
    manager.claim("b")
    with pytest.raises(InsufficientBlocksError, match=r"1 of 3 blocks are free.*--kv-cache-memory"):
        manager.alloc(make_context("b", [9] * 8))


def test_reviving_cached_blocks_counts_as_using_them() -> None:
    """Two of three free blocks are the wanted prefix: they cannot also be the new blocks."""
    manager = make_manager(3, 4)
    prefill(manager, make_context("a", list(range(8))))
    manager.release("a")
    manager.claim("b")
    with pytest.raises(InsufficientBlocksError):
        manager.alloc(make_context("b", [*range(8), *range(70, 76)]))
    manager.assert_invariants()
    context = make_context("c", [*range(8), 1])
    prefill(manager, context)
    assert context.cached_prefix_length == 8


def test_without_prefix_caching_nothing_is_shared() -> None:
    manager = make_manager(8, 4, enable_prefix_caching=False)
    first = make_context("a", list(range(8)))
    prefill(manager, first)
    second = make_context("b", list(range(8)))
    prefill(manager, second)
    assert second.cached_prefix_length == 0
    assert not set(first.block_table.tolist()) & set(second.block_table.tolist())
    assert manager.metrics.cache_misses == 0


def test_a_reset_context_starts_again() -> None:
    manager = make_manager(8, 4)
    context = make_context("a", list(range(6)))
    prefill(manager, context)
    context.reset()
    manager.alloc(context)
    assert context.processed_length == 4, "its own block was found again"
    assert context.cached_prefix_length == 0, "but the user saw no cached prompt"
    assert manager.get_req_blocks("a") == context.block_table.tolist()
    manager.assert_invariants()


def test_claim_alloc_and_release_of_strangers() -> None:
    manager = make_manager()
    manager.claim("a")
    with pytest.raises(InputError, match="claimed before"):
        manager.claim(RequestID("a"))
    with pytest.raises(InputError, match=r"call claim\(\) first"):
        manager.alloc(make_context("b", [1]))
    with pytest.raises(InputError, match="not claimed"):
        manager.get_req_blocks("b")
    manager.release("b")
    manager.release(RequestID("a"))
    manager.release("a")
    assert not manager.contains("a")


def test_there_is_one_replica() -> None:
    manager = make_manager()
    manager.claim("a", replica_idx=0)
    manager.alloc(make_context("a", [1]), num_steps=1, replica_idx=0)
    for call in (
        lambda: manager.claim("b", replica_idx=1),
        lambda: manager.alloc(make_context("a", [1]), replica_idx=1),
        lambda: manager.contains("a", replica_idx=2),
    ):
        with pytest.raises(ConfigError, match="replica_idx"):
            call()


def test_counts_and_resets() -> None:
    manager = make_manager(8, 4)
    prefill(manager, make_context("a", list(range(8))))
    assert manager.total_num_blocks == 8
    assert manager.used_blocks_pct == pytest.approx(0.25)
    manager.reset_prefix_cache()
    manager.assert_invariants()
    second = make_context("b", list(range(8)))
    prefill(manager, second)
    assert second.cached_prefix_length == 0
    manager.release_all()
    assert manager.num_free_blocks == 8
    assert manager.request_ids == []
    third = make_context("c", list(range(8)))
    prefill(manager, third)
    assert third.cached_prefix_length == 4, "release_all keeps the prefix cache"
    manager.reset()
    prefill(manager, make_context("c", list(range(8))))
    assert manager.metrics.cache_hits == 1
    assert manager.metrics.cache_hit_rate == pytest.approx(1 / 4)
    manager.reset_metrics()
    assert manager.metrics.cache_hits == 0


async def test_exchange_applies_commits_then_releases_then_wants() -> None:
    manager = make_manager(2, 4)
    ledger = LocalKVCacheClient(manager)
    assert (ledger.page_size, ledger.num_blocks) == (4, 2)
    hashes = hash_blocks(list(range(8)), 4)
    reply = await ledger.update(CacheUpdate(requests=[BlockRequest("a", 8, hashes[:1])]))
    grant = reply.grants["a"]
    assert grant is not None
    assert (len(grant.block_ids), grant.cached_tokens) == (2, 0)
    reply = await ledger.update(CacheUpdate([("a", 0, hashes)], ["a"], [BlockRequest("b", 8, hashes[:1])]))
    grant = reply.grants["b"]
    assert grant is not None
    assert grant.cached_tokens == 4
    assert (reply.num_free_blocks, reply.num_blocks) == (0, 2)
    manager.assert_invariants()


def test_a_refused_want_leaves_no_trace_and_later_ones_are_tried() -> None:
    manager = make_manager(4, 4)
    reply = manager.update(CacheUpdate(requests=[BlockRequest("a", 8), BlockRequest("b", 12), BlockRequest("c", 8)]))
    assert reply.grants["b"] is None
    assert not manager.contains("b")
    assert reply.grants["c"] is not None
    reply = manager.update(CacheUpdate(requests=[BlockRequest("a", 9), BlockRequest("c", 5)]))
    assert reply.grants["a"] is None
    assert manager.get_req_blocks("a") == [0, 1]
    grant = reply.grants["c"]
    assert grant is not None
    assert len(grant.block_ids) == 0, "num_tokens is in all, not additional"


def test_exchange_never_gives_the_whole_sequence_from_the_cache() -> None:
    manager = make_manager(8, 4)
    hashes = hash_blocks(list(range(8)), 4)
    manager.update(CacheUpdate(requests=[BlockRequest("a", 8)]))
    reply = manager.update(CacheUpdate(commits=[("a", 0, hashes)], requests=[BlockRequest("b", 8, hashes)]))
    grant = reply.grants["b"]
    assert grant is not None
    assert grant.cached_tokens == 4


def test_exchange_does_not_change_tables_behind_the_workers_back() -> None:
    manager = make_manager(8, 4)
    hashes = hash_blocks(list(range(4)), 4)
    manager.update(CacheUpdate(requests=[BlockRequest("a", 5), BlockRequest("b", 5)]))
    before = manager.get_req_blocks("b")
    manager.update(CacheUpdate(commits=[("a", 0, hashes), ("b", 0, hashes)]))
    assert manager.get_req_blocks("b") == before
    manager.update(CacheUpdate(releases=["b"]))
    manager.assert_invariants()


def test_our_own_mistakes_are_assertions() -> None:
    manager = make_manager(8, 4)
    with pytest.raises(AssertionError, match="holds no blocks"):
        manager.update(CacheUpdate(commits=[("a", 0, [b"x"])]))
    with pytest.raises(AssertionError, match="two block requests"):
        manager.update(CacheUpdate(requests=[BlockRequest("a", 4), BlockRequest("a", 8)]))
    moved = make_context("b", [1, 2, 3])
    moved.processed_length = 2
    manager.claim("b")
    with pytest.raises(AssertionError, match=r"reset\(\)"):
        manager.alloc(moved)


@pytest.mark.parametrize("seed", range(200))
def test_random_traffic_equals_the_naive_ledger(seed: int) -> None:
    rng = random.Random(seed)
    page_size, num_blocks = rng.choice([1, 2, 3, 16]), rng.randint(2, 12)
    manager, naive = make_manager(num_blocks, page_size), NaiveLedger(num_blocks, page_size)
    contexts: dict[str, TextContext] = {}
    for turn in range(40):
        name = rng.choice(list(contexts)) if contexts and rng.random() < 0.6 else f"r{turn}"
        if name not in contexts:
            _start(rng, manager, naive, contexts, name)
        elif rng.random() < 0.3:
            manager.release(name)
            naive.release(name)
            del contexts[name]
        else:
            _decode(rng, manager, naive, contexts, name)
        manager.assert_invariants()
        assert manager.num_free_blocks == naive.num_free
        for key, table in naive.tables.items():
            assert manager.get_req_blocks(key) == table
    manager.release_all()
    assert manager.num_free_blocks == num_blocks


def _start(
    rng: random.Random,
    manager: PagedKVCacheManager,
    naive: NaiveLedger,
    contexts: dict[str, TextContext],
    name: str,
) -> None:
    """A newcomer whose prompt shares a beginning with others more often than not."""
    page_size = manager.page_size
    tokens = [rng.randint(0, 1) for _ in range(page_size)] * rng.randint(0, 3)
    tokens += [rng.randint(0, 1) for _ in range(rng.randint(1, page_size + 1))]
    expected_hit = naive.cached_blocks(tokens)
    reply = manager.update(CacheUpdate(requests=[BlockRequest(name, len(tokens), hash_blocks(tokens, page_size))]))
    grant = reply.grants[name]
    if grant is None:
        in_use = {block for table in naive.tables.values() for block in table}
        held = sum(1 for block, prefix in naive.contents.items() if block in in_use and _is_prefix(prefix, tokens))
        assert naive.blocks_for(len(tokens)) - min(held, expected_hit) > naive.num_free, "refused without need"
        return
    assert grant.cached_tokens == expected_hit * page_size
    naive.take(name, grant.block_ids.tolist(), expected_hit, tokens)
    contexts[name] = make_context(name, tokens)
    contexts[name].processed_length = grant.cached_tokens


def _is_prefix(prefix: tuple[int, ...], tokens: list[int]) -> bool:
    return tuple(tokens[: len(prefix)]) == prefix


def _decode(
    rng: random.Random,
    manager: PagedKVCacheManager,
    naive: NaiveLedger,
    contexts: dict[str, TextContext],
    name: str,
) -> None:
    """The active tokens run, full blocks are committed, and room for the next tokens is asked for."""
    context = contexts[name]
    run_step(context, rng.randint(0, 1))
    tokens = context.tokens.all.tolist()
    hashes = hash_blocks(tokens[: context.processed_length], manager.page_size)
    want = BlockRequest(name, len(tokens) + rng.randint(0, 2))
    reply = manager.update(CacheUpdate(commits=[(name, 0, hashes)], requests=[want]))
    naive.commit(name, tokens, context.processed_length)
    grant = reply.grants[name]
    if grant is not None:
        naive.take(name, grant.block_ids.tolist(), 0, tokens)
        return
    assert naive.blocks_for(want.num_tokens) - len(naive.tables[name]) > naive.num_free, "refused without need"
    manager.release(name)
    naive.release(name)
    del contexts[name]
