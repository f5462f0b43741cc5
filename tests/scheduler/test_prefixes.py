"""Requests that come together and begin alike: their common beginning is computed once."""

from __future__ import annotations

import asyncio

import pytest

from max_ray.scheduler.prefixes import WORTH_WAITING_TOKENS, KnownPrefixes
from tests.scheduler.fakes import make_context
from tests.scheduler.harness import Harness, running

SHARED = [t % 40 for t in range(WORTH_WAITING_TOKENS + 32)]
NUM = 8


def prefilled(h: Harness) -> int:
    """Prompt tokens that were computed; decode rows have one each."""
    return sum(n for run in h.pipeline.runs for n in run.rows.values() if n > 1)


async def share(h: Harness, num_shared: int = len(SHARED), num: int = NUM) -> None:
    prompts = [[*SHARED[:num_shared], *range(i, i + 8)] for i in range(num)]
    await asyncio.gather(*[h.generate(f"r{i}", prompt, num_new=6) for i, prompt in enumerate(prompts)])


@pytest.mark.parametrize("budget", [20, 256])
@pytest.mark.parametrize("page_size", [4, 16])
async def test_a_common_beginning_is_computed_once(budget: int, page_size: int) -> None:
    async with running(num_blocks=512, page_size=page_size, budget=budget, max_batch_size=NUM) as h:
        await share(h)
        assert prefilled(h) == len(SHARED) + NUM * 8
        assert h.loop.stats.prefix_hit_tokens == (NUM - 1) * len(SHARED)
        before, num_runs = prefilled(h), len(h.pipeline.runs)
        prompts = [[*SHARED, *range(20 + i, 28 + i)] for i in range(NUM)]
        await asyncio.gather(*[h.generate(f"s{i}", prompt, num_new=6) for i, prompt in enumerate(prompts)])
        assert prefilled(h) - before == NUM * 8
        if budget == 256:
            assert len(h.pipeline.runs[num_runs].rows) == NUM, "what is cached is waited for by nobody"


async def test_a_short_common_beginning_is_not_waited_for() -> None:
    async with running(num_blocks=256, budget=1024, max_batch_size=NUM) as h:
        await share(h, num_shared=WORTH_WAITING_TOKENS - 4)
        assert len(h.pipeline.runs[0].rows) == NUM


async def test_nobody_waits_where_nothing_is_cached() -> None:
    async with running(num_blocks=256, budget=1024, max_batch_size=NUM, prefix_caching=False) as h:
        h.ledger.manager.enable_prefix_caching = False
        await share(h)
        assert len(h.pipeline.runs[0].rows) == NUM
        assert prefilled(h) == NUM * (len(SHARED) + 8)


async def test_others_pass_those_that_wait() -> None:
    async with running(num_blocks=512, budget=256, max_batch_size=4) as h:
        twins = [h.generate(name, [*SHARED, n], num_new=4) for n, name in enumerate("ab")]
        other = h.generate("c", range(41, 45), num_new=4)
        await asyncio.gather(*twins, other)
        starts = {key: i for i, run in reversed(list(enumerate(h.pipeline.runs))) for key in run.rows}
        assert starts["a"] <= starts["c"] < starts["b"]


async def test_when_the_one_that_computes_is_cancelled_another_does() -> None:
    async with running(num_blocks=512, budget=16, max_batch_size=4) as h:
        first = h.loop.submit(make_context("a", [*SHARED, 1], 4))
        rest = [asyncio.create_task(h.generate(name, [*SHARED, n], num_new=4)) for n, name in enumerate("bcd")]
        await h.at_step(2)
        await first.aclose()
        await asyncio.gather(*rest)
        assert prefilled(h) <= len(SHARED) + 16 * 2 + 3 * 4


def test_known_prefixes_forget_the_oldest() -> None:
    known = KnownPrefixes(capacity=2)
    known.note([b"a", b"b"])
    known.note([b"a", b"c"])
    assert known.missing([b"a", b"b", b"c"]) == [b"b"]
