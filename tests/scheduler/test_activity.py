"""GenerationLoop.activity: phases, tokens and blocks of requests, from their arrival to their end."""

from __future__ import annotations

import asyncio

from tests.scheduler.fakes import make_context
from tests.scheduler.harness import Harness, running


async def drain(h: Harness, name: str, prompt: range, num_new: int) -> None:
    async for _ in h.loop.submit(make_context(name, prompt, num_new)):
        pass


async def test_an_idle_loop_has_no_requests() -> None:
    async with running() as h:
        found = h.loop.activity
        assert found.requests == ()
        assert (found.page_size, found.num_blocks, found.limits) == (4, 64, h.loop.limits)
        await h.generate("a", range(5))
        assert h.loop.activity.requests == ()


async def test_a_request_waits_is_computed_and_decodes() -> None:
    """A prompt of three chunks; one place in the batch, so the second request waits."""
    phases: dict[str, list[str]] = {"a": [], "b": []}
    async with running(budget=8, max_batch_size=1, max_num_steps=1) as h:
        tasks = [
            asyncio.create_task(drain(h, name, range(start, start + 20), 4)) for name, start in (("a", 0), ("b", 20))
        ]
        while not all(task.done() for task in tasks):
            for request in h.loop.activity.requests:
                seen = phases[str(request.request_id)]
                if seen[-1:] != [request.phase]:
                    seen.append(request.phase)
                assert request.prompt_tokens == 20
                assert request.age_s >= 0
                assert request.processed_tokens <= len(request.blocks) * 4
                assert (request.phase == "queued") == (len(request.blocks) == 0)
            await asyncio.sleep(0)
    assert phases == {"a": ["queued", "prefill", "decode"], "b": ["queued", "prefill", "decode"]}


async def test_blocks_are_those_of_the_kv_manager_and_running_comes_first() -> None:
    async with running(max_batch_size=2, max_num_steps=1) as h:
        tasks = [asyncio.create_task(drain(h, name, range(8), 12)) for name in "abc"]
        await h.at_step(4)
        first, second, third = h.loop.activity.requests
        assert [str(one.request_id) for one in (first, second, third)] == ["a", "b", "c"]
        assert third.phase == "queued"
        for one in (first, second):
            assert one.blocks.tolist() == h.ledger.manager.get_req_blocks(str(one.request_id))
            assert one.generated_tokens > 0
        await asyncio.gather(*tasks)


async def test_a_preempted_request_says_so() -> None:
    seen: set[str] = set()
    async with running(num_blocks=6, page_size=4, max_num_steps=1, prefix_caching=False) as h:
        tasks = [asyncio.create_task(drain(h, name, range(7), 12)) for name in "ab"]
        while not all(task.done() for task in tasks):
            seen |= {request.phase for request in h.loop.activity.requests}
            await asyncio.sleep(0)
        assert h.loop.stats.preemptions > 0
    assert "preempted" in seen
