"""BlockPool: order of reuse, reference counts."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from max_ray.kv_cache import BlockPool


def test_blocks_come_least_recently_used_first() -> None:
    pool = BlockPool(3)
    assert [pool.alloc() for _ in range(3)] == [0, 1, 2]
    for block in (1, 0, 2):
        pool.free(block, keep=True)
    assert [pool.alloc() for _ in range(3)] == [1, 0, 2]


def test_a_block_without_contents_is_reused_before_cached_ones() -> None:
    pool = BlockPool(3)
    for _ in range(3):
        pool.alloc()
    pool.free(0, keep=True)
    pool.free(1, keep=False)
    assert pool.alloc() == 1
    assert pool.alloc() == 0


def test_touch_shares_and_revives() -> None:
    pool = BlockPool(2)
    block = pool.alloc()
    pool.touch(block)
    pool.free(block, keep=True)
    assert not pool.is_free(block)
    pool.free(block, keep=True)
    assert pool.is_free(block)
    pool.touch(block)
    assert pool.num_free == 1
    pool.assert_invariants({block: 1})


def test_misuse_is_an_assertion() -> None:
    pool = BlockPool(1)
    pool.alloc()
    with pytest.raises(AssertionError, match="empty pool"):
        pool.alloc()
    pool.free(0, keep=False)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(0, keep=False)
    with pytest.raises(AssertionError, match="references"):
        pool.assert_invariants({0: 1})
    with pytest.raises(AssertionError, match="at least one block"):
        BlockPool(0)


@pytest.mark.parametrize("seed", range(20))
def test_random_traffic_keeps_the_counts(seed: int) -> None:
    rng = random.Random(seed)
    pool = BlockPool(6)
    refs: Counter[int] = Counter()
    for _ in range(200):
        used = [block for block, count in refs.items() if count]
        if used and rng.random() < 0.5:
            block = rng.choice(used)
            pool.free(block, keep=rng.random() < 0.5)
            refs[block] -= 1
        elif rng.random() < 0.3:
            block = rng.randrange(6)
            pool.touch(block)
            refs[block] += 1
        elif pool.num_free:
            refs[pool.alloc()] += 1
        pool.assert_invariants(refs)
        assert pool.num_free == sum(refs[block] == 0 for block in range(6))
