"""EmbeddingsLoop over a scripted pipeline: batches, turns, cancellation, a full queue, failures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import numpy as np
import pytest

from max_ray.errors import MaxRayError, QueueFullError, WorkerGroupError
from max_ray.interfaces import EmbeddingsContext, EmbeddingsGenerationOutput, RequestID
from max_ray.scheduler import EmbeddingsLoop, SchedulerLimits, recovery


class FakeEmbedder:
    """The vector of a text is (its first token, its length). `gate`: each step waits for it when set."""

    def __init__(self) -> None:
        self.steps: list[list[int]] = []
        self.failures: list[Exception] = []
        self.deadly = -1  # a step with this text in it fails
        self.dies_every = 0  # so many steps
        self.gate: asyncio.Event | None = None

    async def embed(self, contexts: Sequence[EmbeddingsContext]) -> dict[RequestID, EmbeddingsGenerationOutput]:
        self.steps.append([int(context.tokens[0]) for context in contexts])
        await (self.gate.wait() if self.gate is not None else asyncio.sleep(0))
        if self.failures:
            raise self.failures.pop(0)
        if self.deadly in self.steps[-1]:
            raise WorkerGroupError("deadly")
        if self.dies_every and len(self.steps) % self.dies_every == 0:
            raise WorkerGroupError("died")
        return {
            c.request_id: EmbeddingsGenerationOutput(np.array([c.tokens[0], len(c.tokens)], np.float32))
            for c in contexts
        }


def texts(*names: int, length: int = 2) -> list[EmbeddingsContext]:
    return [EmbeddingsContext(RequestID(), np.full(length, name)) for name in names]


def limits(rows: int = 4, tokens: int = 100, queue: int = 8) -> SchedulerLimits:
    return SchedulerLimits(rows, tokens, queue, max_num_steps=1)


@asynccontextmanager
async def running(loop: EmbeddingsLoop) -> AsyncIterator[None]:
    task = asyncio.create_task(loop.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def names_of(future: asyncio.Future[list[EmbeddingsGenerationOutput]]) -> list[int]:
    return [int(output.embeddings[0]) for output in await future]


async def test_jobs_share_steps_and_take_turns() -> None:
    embedder = FakeEmbedder()
    loop = EmbeddingsLoop(embedder, limits(rows=4))
    long, short = loop.submit(texts(*range(10, 17))), loop.submit(texts(20, 21))
    async with running(loop):
        assert await names_of(long) == list(range(10, 17))
        assert await names_of(short) == [20, 21]
    assert embedder.steps == [[10, 20, 11, 21], [12, 13, 14, 15], [16]]
    assert (loop.stats.steps, loop.stats.runs, loop.stats.finished, loop.stats.prompt_tokens) == (3, 3, 2, 18)


async def test_a_step_keeps_to_its_tokens_and_a_longer_text_runs_alone() -> None:
    embedder = FakeEmbedder()
    loop = EmbeddingsLoop(embedder, limits(rows=8, tokens=10))
    jobs = [loop.submit([*texts(1, length=11)]), loop.submit([*texts(2, length=6), *texts(3, length=4)])]
    jobs.append(loop.submit(texts(4, length=5)))
    async with running(loop):
        assert [await names_of(job) for job in jobs] == [[1], [2, 3], [4]]
    assert embedder.steps == [[1], [2, 3], [4]]


async def test_arrivals_gather_while_a_step_runs() -> None:
    embedder = FakeEmbedder()
    embedder.gate = asyncio.Event()
    loop = EmbeddingsLoop(embedder, limits())
    async with running(loop):
        first = loop.submit(texts(1))
        await asyncio.sleep(0.01)
        others = [loop.submit(texts(n)) for n in (2, 3, 4)]
        assert (loop.stats.running, loop.stats.queued) == (1, 3)
        embedder.gate.set()
        assert [await names_of(job) for job in (first, *others)] == [[1], [2], [3], [4]]
    assert embedder.steps == [[1], [2, 3, 4]]


async def test_a_cancelled_job_takes_no_more_part() -> None:
    embedder = FakeEmbedder()
    embedder.gate = asyncio.Event()
    loop = EmbeddingsLoop(embedder, limits(rows=2))
    async with running(loop):
        under_way, waiting = loop.submit(texts(1, 2, 3)), loop.submit(texts(4, 5))
        await asyncio.sleep(0.01)
        assert embedder.steps == [[1, 4]]
        waiting.cancel()
        under_way.cancel()
        embedder.gate.set()
        assert await names_of(loop.submit(texts(6))) == [6]
    assert embedder.steps == [[1, 4], [6]]
    assert (loop.stats.cancelled, loop.stats.finished, loop.stats.queued) == (2, 1, 0)


async def test_a_full_queue_refuses() -> None:
    loop = EmbeddingsLoop(FakeEmbedder(), limits(rows=1, queue=2))
    jobs = [loop.submit(texts(n, n)) for n in (1, 2, 3)]
    with pytest.raises(QueueFullError, match="3 requests are waiting") as caught:
        loop.submit(texts(4))
    assert caught.value.retry_after >= 1
    jobs[0].cancel()
    last = loop.submit(texts(4))
    async with running(loop):
        assert await names_of(last) == [4]
    assert loop.stats.rejected == 1


async def test_a_dead_group_is_brought_back_and_the_step_is_run_again() -> None:
    embedder, recovered = FakeEmbedder(), 0
    embedder.failures = [WorkerGroupError("died")]

    async def recover() -> None:
        nonlocal recovered
        assert not loop.healthy
        recovered += 1

    loop = EmbeddingsLoop(embedder, limits(), recover)
    async with running(loop):
        assert await names_of(loop.submit(texts(1, 2))) == [1, 2]
        assert loop.healthy
    assert (recovered, loop.stats.recoveries, embedder.steps) == (1, 1, [[1, 2], [1, 2]])


@pytest.mark.parametrize(("times", "ends"), [(1, "vectors"), (3, "vectors"), (4, "error"), (6, "error")])
async def test_a_recovery_that_fails_is_tried_again(times: int, ends: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However it ends for the jobs, the loop is healthy again without a further one."""
    monkeypatch.setattr(recovery, "_FIRST_PAUSE_S", 0.005)
    embedder, attempts = FakeEmbedder(), 0
    embedder.failures = [WorkerGroupError("died")]

    async def recover() -> None:
        nonlocal attempts
        attempts += 1
        if attempts <= times:
            raise WorkerGroupError("A worker died while it was starting")

    loop = EmbeddingsLoop(embedder, limits(), recover)
    async with running(loop):
        job = loop.submit(texts(1, 2))
        if ends == "error":
            with pytest.raises(WorkerGroupError, match="while it was starting"):
                await job
        else:
            assert await names_of(job) == [1, 2]
        while not loop.healthy:
            await asyncio.sleep(0.001)
        assert await names_of(loop.submit(texts(3))) == [3]
    assert attempts == times + 1


async def test_an_idle_loop_recovers_when_it_is_told_of_a_failure() -> None:
    recovered = asyncio.Event()

    async def recover() -> None:
        recovered.set()

    loop = EmbeddingsLoop(FakeEmbedder(), limits(), recover)
    async with running(loop):
        await asyncio.sleep(0)
        loop.report_failure(WorkerGroupError("rank 0 does not answer"))
        await asyncio.wait_for(recovered.wait(), 5)
        assert await names_of(loop.submit(texts(1))) == [1]
        assert loop.healthy


async def test_a_text_that_takes_the_workers_down_ends_alone() -> None:
    embedder = FakeEmbedder()
    embedder.deadly = 2
    loop = EmbeddingsLoop(embedder, limits(), nothing)
    jobs = [loop.submit(texts(1)), loop.submit(texts(2, 3)), loop.submit(texts(4))]
    async with running(loop):
        assert [await names_of(jobs[0]), await names_of(jobs[2])] == [[1], [4]]
        with pytest.raises(WorkerGroupError, match="deadly"):
            await jobs[1]
        assert await names_of(loop.submit(texts(5))) == [5]
        assert loop.healthy
    assert embedder.steps == [[1, 2, 4, 3], [1, 2, 4, 3], [1], [2], [2], [4], [5]]


async def nothing() -> None:
    """Brings back workers that are well."""


@pytest.mark.parametrize("failures", [[WorkerGroupError("gone")] * 6, [ZeroDivisionError("ours")]])
async def test_what_does_not_end_reaches_every_job_and_the_loop_goes_on(failures: list[Exception]) -> None:
    embedder = FakeEmbedder()
    embedder.failures = list(failures)
    loop = EmbeddingsLoop(embedder, limits(rows=1), nothing)
    jobs = [loop.submit(texts(n)) for n in (1, 2, 4, 5)]
    async with running(loop):
        for job in jobs:
            with pytest.raises(type(failures[0])):
                await job
        assert await names_of(loop.submit(texts(3))) == [3]
    with pytest.raises(MaxRayError, match="stopping"):
        loop.submit(texts(4))


@pytest.mark.parametrize("seed", range(20))
async def test_random_traffic(seed: int) -> None:
    """Jobs come, some are given up, workers die now and then: whoever stays gets the vectors of his own texts."""
    random = np.random.default_rng(seed)
    embedder = FakeEmbedder()
    embedder.dies_every = 7
    bounds = limits(rows=int(random.integers(1, 6)), tokens=int(random.integers(3, 30)), queue=100)
    loop = EmbeddingsLoop(embedder, bounds, nothing)
    jobs = []
    async with running(loop):
        for _ in range(30):
            names = random.integers(0, 1000, size=random.integers(1, 9)).tolist()
            contexts = [text for name in names for text in texts(name, length=int(random.integers(1, 12)))]
            jobs.append((contexts, loop.submit(contexts)))
            if random.random() < 0.3:
                await asyncio.sleep(0)
            if random.random() < 0.2:
                jobs.pop(int(random.integers(len(jobs))))[1].cancel()
        for contexts, future in jobs:
            expected = [[float(c.tokens[0]), float(len(c.tokens))] for c in contexts]
            assert [output.embeddings.tolist() for output in await future] == expected
    assert all(len(step) <= bounds.max_batch_size for step in embedder.steps)
    assert loop.stats.recoveries == len(embedder.steps) // 7 > 0
    assert loop.stats.failed == loop.stats.queued == loop.stats.running == 0
