"""A running GenerationLoop over fakes, as an async context manager that checks the books when it is left."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from max_ray.errors import WorkerGroupError
from max_ray.interfaces import KVCacheClient, TextGenerationOutput
from max_ray.scheduler import GenerationLoop, SchedulerLimits
from tests.scheduler.fakes import CountingLedger, FakePipeline, expected_tokens, make_context


@dataclass
class Harness:
    loop: GenerationLoop
    pipeline: FakePipeline
    ledger: CountingLedger
    ledgers: list[CountingLedger] = field(default_factory=list)

    async def generate(self, name: str, prompt: Iterable[int], num_new: int = 8) -> list[TextGenerationOutput]:
        """Runs one request to its end and checks its tokens."""
        tokens = list(prompt)
        outputs = [output async for output in self.loop.submit(make_context(name, tokens, num_new))]
        assert [t for o in outputs for t in o.tokens] == expected_tokens(tokens, num_new), name
        assert [o.is_done for o in outputs] == [False] * (len(outputs) - 1) + [True]
        return outputs

    async def at_step(self, num_steps: int) -> None:
        """Returns when the pipeline has made `num_steps` steps in all."""
        while self.pipeline.num_steps < num_steps:
            await asyncio.sleep(0)

    async def until(self, condition: Callable[[], bool], what: str, within_s: float = 5.0) -> None:
        """Waits for the condition."""
        deadline = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < deadline, f"not within {within_s} s: {what}"
            await asyncio.sleep(0.001)

    async def settle(self) -> None:
        """Waits until the loop is idle and has given everything back."""
        for _ in range(1000):
            await asyncio.sleep(0)
            if not self.loop.stats.running and not self.loop.stats.queued and self.ledgers[-1].used == 0:
                break
        for _ in range(5):
            await asyncio.sleep(0)

    def assert_clean(self) -> None:
        ledger = self.ledgers[-1]
        ledger.manager.assert_invariants()
        assert ledger.used == 0, "blocks were not given back"
        assert ledger.manager.request_ids == []
        stats = self.loop.stats
        assert (stats.queued, stats.running, stats.num_used_blocks) == (0, 0, 0)


@asynccontextmanager
async def running(
    num_blocks: int = 64,
    page_size: int = 4,
    max_batch_size: int = 4,
    budget: int = 16,
    max_queued: int = 64,
    max_num_steps: int = 8,
    chunked: bool = True,
    recover: bool = False,
    error: Callable[[], Exception] = lambda: WorkerGroupError("rank 1 died"),
    check: bool = True,
    can_extend: bool = False,
    flush_after_s: float = 0.0,
    prefix_caching: bool = True,
) -> AsyncIterator[Harness]:
    """recover: bring the workers back with a fresh ledger after a WorkerGroupError."""
    limits = SchedulerLimits(max_batch_size, budget, max_queued, max_num_steps, chunked, prefix_caching)
    ledger = CountingLedger(num_blocks, page_size)
    pipeline = FakePipeline(page_size, error, ledger.manager, can_extend=can_extend)
    ledgers = [ledger]

    async def bring_back() -> KVCacheClient:
        await asyncio.sleep(0)
        ledgers.append(CountingLedger(num_blocks, page_size))
        pipeline.manager = ledgers[-1].manager
        return ledgers[-1]

    callback: Callable[[], Awaitable[KVCacheClient | None]] | None = bring_back if recover else None
    loop = GenerationLoop(pipeline, ledger, limits, callback, flush_after_s)
    task = asyncio.create_task(loop.run())
    harness = Harness(loop, pipeline, ledger, ledgers)
    try:
        yield harness
        await harness.settle()
        if check:
            harness.assert_clean()
            flushes = sum(len(ledger.flushes) for ledger in ledgers)
            exchanges = loop.stats.decisions + loop.stats.extensions + flushes
            assert sum(len(x.requests) for x in ledgers) == exchanges
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
