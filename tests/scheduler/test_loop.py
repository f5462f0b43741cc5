"""GenerationLoop, healthy workers: batches, budgets, fairness, preemption, the queue's bound."""

from __future__ import annotations

import asyncio
import random

import pytest

from max_ray.errors import ConfigError, InputError, InsufficientBlocksError, QueueFullError
from max_ray.scheduler import SchedulerLimits
from tests.scheduler.fakes import expected_tokens, make_context
from tests.scheduler.harness import Harness, running


async def test_one_request_runs_as_one_long_run() -> None:
    async with running(max_num_steps=32) as h:
        outputs = await h.generate("a", range(5), num_new=20)
        assert len(outputs) == 20, "one output a step"
        assert [(run.num_steps, run.steps_made) for run in h.pipeline.runs] == [(32, 20)]
    assert h.loop.stats.steps == 20
    assert h.loop.stats.generated_tokens == 20
    assert h.loop.stats.finished == 1
    assert h.ledger.flushes == [["a"]]


async def test_num_steps_is_bounded_by_the_limit_and_by_the_free_blocks() -> None:
    async with running(num_blocks=3, page_size=4, max_num_steps=8) as h:
        await h.generate("a", range(2), num_new=10)
        assert [run.num_steps for run in h.pipeline.runs] == [8, 8]
    async with running(num_blocks=3, page_size=4, max_num_steps=64, max_batch_size=1) as h:
        await h.generate("a", range(4), num_new=9)
        await h.generate("b", range(50, 54), num_new=2)
        assert [run.num_steps for run in h.pipeline.runs] == [64, 64], "no lease beyond what the row may sample"


async def test_prefill_and_decode_share_a_step() -> None:
    async with running(max_num_steps=1) as h:
        first = asyncio.create_task(h.generate("a", range(5), num_new=12))
        await h.at_step(3)
        await asyncio.gather(first, h.generate("b", range(20, 27), num_new=4))
    assert [run.rows for run in h.pipeline.runs if run.rows.get("b") == 7] == [{"a": 1, "b": 7}]
    assert h.pipeline.num_steps == 12, "b cost no step of its own"


async def test_decode_goes_on_while_a_long_prompt_is_chunked() -> None:
    async with running(budget=8) as h:
        first = asyncio.create_task(h.generate("a", range(3), num_new=30))
        await h.at_step(1)
        await asyncio.gather(first, h.generate("b", range(40), num_new=3))
    chunks = [run for run in h.pipeline.runs if run.rows.get("b", 1) > 1]
    assert [run.rows for run in chunks] == [{"a": 1, "b": 7}] * 5 + [{"a": 1, "b": 5}]
    assert all(run.num_steps == 1 for run in chunks[:-1])


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 15, 16, 17, 24])
async def test_chunk_borders(page_size: int, length: int) -> None:
    async with running(page_size=page_size, budget=8) as h:
        await h.generate("a", range(length), num_new=3)
        await h.generate("b", range(length), num_new=3)
    chunks = [run.rows["a"] for run in h.pipeline.runs if "a" in run.rows]
    assert chunks[: -(-length // 8)] == [8] * (length // 8) + [length % 8] * (length % 8 > 0)
    hit = (length - 1) // page_size * page_size
    assert h.loop.stats.prefix_hit_tokens == hit
    assert h.loop.stats.prompt_tokens == 2 * length


@pytest.mark.parametrize("budget", [1, 2, 3, 5, 16])
async def test_the_budget_holds_and_nobody_starves(budget: int) -> None:
    async with running(budget=budget, max_batch_size=6) as h:
        await asyncio.gather(*(h.generate(f"r{i}", range(i, 3 * i + 5), num_new=6) for i in range(8)))
    assert max(run.num_tokens for run in h.pipeline.runs) <= budget
    assert max(len(run.rows) for run in h.pipeline.runs) <= 6


async def test_without_chunked_prefill_prompts_run_whole() -> None:
    async with running(budget=8, chunked=False) as h:
        lengths = {f"r{i}": 3 + 4 * i for i in range(5)}
        await asyncio.gather(*(h.generate(k, range(100, 100 + n), num_new=4) for k, n in lengths.items()))
    first_tokens: dict[str, int] = {}
    for run in h.pipeline.runs:
        for key, count in run.rows.items():
            first_tokens.setdefault(key, count)
    hits = h.loop.stats.prefix_hit_tokens
    assert sum(first_tokens.values()) == sum(lengths.values()) - hits
    assert all(sum(n > 1 for n in run.rows.values()) <= 1 or run.num_tokens <= 8 for run in h.pipeline.runs)


async def test_an_arrival_that_fits_interrupts_a_long_run() -> None:
    async with running(max_num_steps=1000) as h:
        first = asyncio.create_task(h.generate("a", range(3), num_new=100))
        await h.at_step(5)
        await h.generate("b", range(50, 55), num_new=4)
        assert not first.done()
        await first
    assert h.pipeline.runs[0].steps_made <= 7
    assert h.loop.stats.interrupts >= 1


async def test_an_arrival_without_a_free_row_does_not_interrupt() -> None:
    async with running(max_num_steps=1000, max_batch_size=1) as h:
        first = asyncio.create_task(h.generate("a", range(3), num_new=60))
        await h.at_step(5)
        await asyncio.gather(first, h.generate("b", range(50, 55), num_new=4))
    assert h.pipeline.runs[0].steps_made == 60
    assert h.pipeline.num_interrupts == 0


async def test_an_arrival_without_free_blocks_does_not_interrupt() -> None:
    async with running(max_num_steps=1000, num_blocks=16, page_size=4) as h:
        first = asyncio.create_task(h.generate("a", range(3), num_new=50))
        await h.at_step(5)
        await asyncio.gather(first, h.generate("b", range(70, 90), num_new=4))
    assert h.pipeline.runs[0].steps_made == 50


async def test_a_row_that_ends_makes_way_for_one_that_waits() -> None:
    """Row a ends in the middle of a run of b: c, which waited for a row, need not wait for b."""
    async with running(max_num_steps=1000, max_batch_size=2) as h:
        tasks = [
            asyncio.create_task(h.generate("a", range(3), num_new=5)),
            asyncio.create_task(h.generate("b", range(10, 13), num_new=60)),
            asyncio.create_task(h.generate("c", range(20, 23), num_new=5)),
        ]
        await tasks[2]
        assert not tasks[1].done()
        await asyncio.gather(*tasks)


async def test_requests_start_in_order_and_a_large_one_is_not_overtaken() -> None:
    order: list[str] = []

    async def one(h: Harness, name: str, length: int) -> None:
        stream = h.loop.submit(make_context(name, range(length), 6))
        async for _ in stream:
            if name not in order:
                order.append(name)

    async with running(num_blocks=8, page_size=4, budget=64) as h:
        await asyncio.gather(*(one(h, name, n) for name, n in [("a", 12), ("big", 24), ("c", 3), ("d", 3)]))
    assert order == ["a", "big", "c", "d"]


async def test_preemption_takes_the_youngest_and_everybody_ends() -> None:
    async with running(num_blocks=6, page_size=4) as h:
        ends: list[str] = []

        async def one(name: str, base: int) -> None:
            await h.generate(name, range(base, base + 4), num_new=18)
            ends.append(name)

        await asyncio.gather(*(one(f"r{i}", 10 * i) for i in range(4)))
    assert h.loop.stats.preemptions > 0
    assert ends[0] == "r0", "the oldest always makes progress"
    assert h.loop.stats.prompt_tokens == 16, "a prompt counts once, however often it is prefilled"


async def test_a_prompt_that_shares_blocks_comes_in_though_it_would_not_fit_alone() -> None:
    async with running(num_blocks=10, page_size=4, budget=64) as h:
        first = asyncio.create_task(h.generate("a", range(24), num_new=12))
        await h.at_step(1)
        second = asyncio.create_task(h.generate("b", [*range(24), 40], num_new=2))
        await asyncio.gather(first, second)
    assert h.loop.stats.prefix_hit_tokens == 24
    assert h.loop.stats.preemptions == 0


async def test_the_queue_is_bounded() -> None:
    async with running(max_batch_size=2, max_queued=3) as h:
        tasks = [asyncio.create_task(h.generate(f"r{i}", range(i, i + 4))) for i in range(5)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError, match="5 requests are waiting") as caught:
            h.loop.submit(make_context("late", range(4)))
        assert caught.value.retry_after >= 1
        await asyncio.gather(*tasks)
        await h.generate("late", range(4))
    assert h.loop.stats.rejected == 1


async def test_a_prompt_larger_than_the_cache_fails_at_the_call() -> None:
    async with running(num_blocks=4, page_size=4) as h:
        with pytest.raises(InsufficientBlocksError, match="needs 5 KV cache blocks for 17 tokens"):
            h.loop.submit(make_context("a", range(17)))
        await h.generate("b", range(16), num_new=1)


async def test_a_request_that_outgrows_the_cache_fails_and_the_others_go_on() -> None:
    async with running(num_blocks=4, page_size=4) as h:
        big = h.loop.submit(make_context("big", range(10), 50))
        small = asyncio.create_task(h.generate("small", range(30, 33), num_new=4))
        tokens = []
        with pytest.raises(InsufficientBlocksError, match="needs 5 KV cache blocks"):
            tokens += [token async for output in big for token in output.tokens]
        await small
    assert h.loop.stats.failed == 1


async def test_blocks_held_by_a_stranger_end_in_an_error_not_in_a_busy_loop() -> None:
    async with running(num_blocks=4, page_size=4, check=False) as h:
        h.ledger.manager.claim("stranger")
        h.ledger.manager.alloc(make_context("stranger", range(9)))
        stream = h.loop.submit(make_context("a", range(6)))
        with pytest.raises(InsufficientBlocksError, match="claimed by other code"):
            await anext(stream)
        h.ledger.manager.release("stranger")
        await h.generate("b", range(6))


async def test_ids_are_unique_while_they_run() -> None:
    async with running() as h:
        stream = h.loop.submit(make_context("a", range(3)))
        with pytest.raises(InputError, match="id a is in progress"):
            h.loop.submit(make_context("a", range(3)))
        assert len([output async for output in stream]) == 8
        await h.settle()
        await h.generate("a", range(3))


async def test_stats_tell_the_age_of_the_oldest() -> None:
    async with running(max_batch_size=1) as h:
        tasks = [asyncio.create_task(h.generate(f"r{i}", range(i, i + 4), num_new=30)) for i in range(3)]
        await h.at_step(2)
        stats = h.loop.stats
        assert (stats.running, stats.queued) == (1, 2)
        assert 0 < stats.oldest_waiting_s < 60
        assert 0 < stats.num_used_blocks <= stats.num_blocks == 64
        await asyncio.gather(*tasks)
    assert h.loop.stats.oldest_waiting_s == 0


@pytest.mark.parametrize("name", ["max_batch_size", "max_batch_input_tokens", "max_num_steps"])
def test_limits_are_checked(name: str) -> None:
    values = {"max_batch_size": 1, "max_batch_input_tokens": 1, "max_queued_requests": 0, "max_num_steps": 1}
    assert SchedulerLimits(**values)
    with pytest.raises(ConfigError, match=name):
        SchedulerLimits(**{**values, name: 0})


@pytest.mark.parametrize("seed", range(200))
async def test_random_traffic(seed: int) -> None:
    """Every stream gets exactly its tokens, or ends as it was told to; nothing is left behind."""
    rng = random.Random(seed)
    page_size = rng.choice([1, 2, 4, 16])
    num_blocks = rng.randint(2, 8) + 48 // page_size
    async with running(
        num_blocks=num_blocks,
        page_size=page_size,
        max_batch_size=rng.randint(1, 6),
        budget=rng.choice([1, 4, 7, 64]),
        max_num_steps=rng.choice([1, 3, 16]),
        chunked=rng.random() < 0.8,
        recover=True,
    ) as h:
        for step in rng.sample(range(60), rng.choice([0, 0, 3])):
            h.pipeline.fail_at[step] = rng.choice(["before", "lost", "after"])
        await asyncio.gather(*(_client(rng, h, i) for i in range(rng.randint(1, 8))))


async def _client(rng: random.Random, h: Harness, index: int) -> None:
    for _ in range(rng.randint(0, 12)):
        await asyncio.sleep(0)
    prompt = [rng.randint(0, 1) for _ in range(rng.randint(1, 24))]
    num_new = rng.randint(1, 24)
    if rng.random() < 0.7:
        await h.generate(f"r{index}", prompt, num_new)
        return
    stream = h.loop.submit(make_context(f"r{index}", prompt, num_new))
    outputs = [await anext(stream) for _ in range(rng.randint(0, min(3, num_new)))]
    if rng.random() < 0.5:
        await stream.aclose()
    else:
        h.loop.cancel(f"r{index}")
        outputs += [output async for output in stream]
        assert [o.is_done for o in outputs] == [False] * (len(outputs) - 1) + [True]
    tokens = [token for output in outputs for token in output.tokens]
    assert tokens == expected_tokens(prompt, num_new)[: len(tokens)]
