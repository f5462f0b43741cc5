"""Runs that are extended while they go on: when they are, when they must not be, and who comes in between."""

from __future__ import annotations

import asyncio
import random

import pytest

from max_ray.errors import WorkerGroupError
from tests.scheduler.fakes import make_context
from tests.scheduler.harness import Harness, running


@pytest.mark.parametrize("num_new", [9, 16, 17, 40, 41])
async def test_one_request_is_one_run_however_long(num_new: int) -> None:
    async with running(can_extend=True) as h:
        outputs = await h.generate("a", range(5), num_new)
        assert len(outputs) == num_new
        assert [run.steps_made for run in h.pipeline.runs] == [num_new]
    assert h.loop.stats.extensions == -(-num_new // 8) - 1, "none is asked for that no row needs"
    assert h.pipeline.runs[0].num_steps == 8 * -(-num_new // 8)


async def test_rows_that_end_leave_the_others_to_go_on() -> None:
    async with running(can_extend=True, max_batch_size=4) as h:
        await asyncio.gather(*(h.generate(f"r{i}", range(i, i + 3), num_new=7 + 9 * i) for i in range(4)))
    assert len(h.pipeline.runs) == 1


async def test_an_arrival_ends_an_extended_run_at_once() -> None:
    async with running(can_extend=True) as h:
        first = asyncio.create_task(h.generate("a", range(3), num_new=60))
        await h.at_step(21)
        await h.generate("b", range(50, 55), num_new=4)
        assert not first.done()
        await first
    assert h.pipeline.runs[0].steps_made <= 23


async def test_somebody_who_waits_for_blocks_ends_extensions() -> None:
    async with running(can_extend=True, num_blocks=10) as h:
        first = asyncio.create_task(h.generate("a", range(12), num_new=24))
        await h.at_step(2)
        second = asyncio.create_task(h.generate("b", range(50, 70), num_new=2))
        await asyncio.gather(first, second)
    assert len(h.pipeline.runs) > 3


async def test_no_extension_without_blocks() -> None:
    async with running(can_extend=True, num_blocks=8, max_batch_size=2) as h:
        await asyncio.gather(h.generate("a", range(4), num_new=20), h.generate("b", range(50, 54), num_new=20))
    assert h.loop.stats.preemptions > 0


async def test_an_answer_that_comes_after_the_run_is_kept_for_the_next() -> None:
    async with running(can_extend=True) as h:
        first = asyncio.create_task(h.generate("a", range(5), num_new=20))
        await h.at_step(3)
        h.ledger.gate.clear()
        await h.at_step(8)
        for _ in range(5):
            await asyncio.sleep(0)
        h.ledger.gate.set()
        await first
    assert [run.steps_made for run in h.pipeline.runs] == [8, 12]


@pytest.mark.parametrize("step", [4, 5, 6, 7])
async def test_a_row_that_ends_while_the_ledger_thinks(step: int) -> None:
    async with running(can_extend=True) as h:
        ends = asyncio.create_task(h.generate("a", range(5), num_new=step))
        stays = asyncio.create_task(h.generate("b", range(50, 55), num_new=20))
        await h.at_step(3)
        h.ledger.gate.clear()
        await h.at_step(7)
        h.ledger.gate.set()
        await asyncio.gather(ends, stays)


async def test_a_cancel_while_the_ledger_thinks() -> None:
    async with running(can_extend=True) as h:
        stream = h.loop.submit(make_context("a", range(5), 40))
        other = asyncio.create_task(h.generate("b", range(50, 55), num_new=20))
        await h.at_step(3)
        h.ledger.gate.clear()
        await h.at_step(5)
        await stream.aclose()
        h.ledger.gate.set()
        await other
    assert h.loop.stats.cancelled == 1


@pytest.mark.parametrize("kind", ["before", "lost", "after"])
@pytest.mark.parametrize("step", [3, 4, 7, 8, 9, 15])
async def test_workers_that_die_around_an_extension(step: int, kind: str) -> None:
    async with running(can_extend=True, recover=True) as h:
        h.pipeline.fail_at[step] = kind
        await asyncio.gather(*(h.generate(f"r{i}", range(i, i + 5), num_new=20) for i in range(3)))
    assert h.loop.stats.recoveries == 1


async def test_a_ledger_that_dies_when_it_is_asked_for_more() -> None:
    async with running(can_extend=True, recover=True, check=False) as h:
        first = asyncio.create_task(h.generate("a", range(5), num_new=30))
        await h.at_step(3)
        h.ledger.error = WorkerGroupError("the KV manager died")
        await first
        await h.settle()
        h.assert_clean()
    assert h.loop.stats.recoveries == 1


@pytest.mark.parametrize("seed", range(40))
async def test_random_traffic(seed: int) -> None:
    rng = random.Random(seed)
    page_size = rng.choice([1, 3, 4])
    async with running(
        can_extend=True,
        num_blocks=-(-rng.choice([52, 80, 400]) // page_size),
        page_size=page_size,
        max_batch_size=rng.choice([1, 3, 6]),
        max_num_steps=rng.choice([2, 3, 8]),
        recover=True,
    ) as h:
        if rng.random() < 0.3:
            h.pipeline.fail_at[rng.randrange(60)] = rng.choice(["before", "lost", "after"])
        await asyncio.gather(*(_visit(h, f"r{i}", rng) for i in range(10)))


async def _visit(h: Harness, name: str, rng: random.Random) -> None:
    """One request that comes at some time and ends, or is given up, at some time."""
    for _ in range(rng.randrange(60)):
        await asyncio.sleep(0)
    first = rng.randrange(10)
    prompt = range(first, first + rng.randrange(1, 10))
    if rng.random() < 0.2:
        stream = h.loop.submit(make_context(name, prompt, 30))
        for _ in range(rng.randrange(1, 4)):
            await anext(stream)
        await stream.aclose()
    else:
        await h.generate(name, prompt, rng.randrange(1, 40))
