"""Priorities: who is admitted next, who is preempted first, and that equal ones keep their order."""

from __future__ import annotations

import asyncio
import random

import pytest

from max_ray.scheduler import ScheduledRequest
from max_ray.scheduler.fair_share import FairShare
from max_ray.scheduler.request_queues import RequestQueues
from tests.scheduler.fakes import expected_tokens, make_context
from tests.scheduler.harness import Harness, running
from tests.scheduler.test_scheduler import Books
from tests.scheduler.test_scheduler import running as running_names
from tests.scheduler.test_scheduler import waiting as waiting_names


def request_of(name: str, priority: int, arrival: float = 0.0) -> ScheduledRequest:
    return ScheduledRequest(make_context(name, range(3), priority=priority), arrival)


@pytest.mark.parametrize("case", range(200))
def test_both_tables_are_ordered_by_priority_and_arrival(case: int) -> None:
    """Arrivals, admissions of the head, preemptions of the last, ends and restarts, in random order."""
    rng = random.Random(case)
    queues, arrivals = RequestQueues(FairShare(16)), 0
    for _ in range(60):
        action = rng.choice(["arrive", "arrive", "admit", "preempt", "end", "restart"])
        if action == "arrive":
            queues.add(request_of(str(arrivals), rng.choice([-1, 0, 0, 0, 7]), float(arrivals)))
            arrivals += 1
        elif action == "admit" and queues.head is not None:
            queues.admit(queues.head)
        elif action == "preempt" and queues.running:
            queues.requeue(next(reversed(queues.running.values())))
        elif action == "end" and queues.all():
            queues.remove(rng.choice(queues.all()))
        elif action == "restart" and rng.random() < 0.2:
            for request in reversed(list(queues.running.values())):
                queues.requeue(request)
        for table in (queues.waiting, queues.running):
            order = [(request.priority, request.arrival) for request in table.values()]
            assert order == sorted(order)
        assert queues.oldest_arrival == min((r.arrival for r in queues.waiting.values()), default=None)


def test_the_least_important_request_is_preempted_first() -> None:
    books = Books(num_blocks=6, max_num_steps=1)
    for name, start, priority in [("low", 0, 5), ("first", 20, 0), ("second", 40, 0)]:
        request = ScheduledRequest(make_context(name, range(start, start + 4), 100, priority), arrival=0.0)
        books.scheduler.queues.add(request)
    preempted: list[str] = []
    while len(preempted) < 2:
        before = set(waiting_names(books))
        _, batch = books.schedule()
        preempted += [name for name in waiting_names(books) if name not in before]
        books.run(batch)
    assert preempted == ["low", "second"], "the oldest of the most important priority goes on"
    assert waiting_names(books) == ["second", "low"]
    assert running_names(books) == ["first"]


async def test_requests_run_by_priority_and_equal_ones_in_order() -> None:
    given = [("a", 0), ("b", 3), ("c", 0), ("d", -2), ("e", 3), ("f", 0), ("g", -2)]
    ended: list[str] = []

    async def follow(h: Harness, name: str, priority: int) -> None:
        stream = h.loop.submit(make_context(name, range(4), 4, priority))
        async for output in stream:
            if output.is_done:
                ended.append(name)

    async with running(max_batch_size=1) as h:
        busy = asyncio.create_task(h.generate("busy", range(3), num_new=30))
        await h.at_step(2)
        await asyncio.gather(busy, *(follow(h, name, priority) for name, priority in given))
    assert ended == [name for name, _ in sorted(given, key=lambda pair: pair[1])]


@pytest.mark.parametrize("seed", range(60))
async def test_random_traffic_with_priorities(seed: int) -> None:
    """Whatever is preempted and lost, every request gets exactly its tokens."""
    rng = random.Random(seed)
    page_size = rng.choice([1, 2, 4])

    async def client(h: Harness, index: int) -> None:
        for _ in range(rng.randint(0, 12)):
            await asyncio.sleep(0)
        prompt, num_new = [rng.randint(0, 1) for _ in range(rng.randint(1, 20))], rng.randint(1, 20)
        context = make_context(f"r{index}", prompt, num_new, rng.randint(-1, 2))
        outputs = [output async for output in h.loop.submit(context)]
        assert [token for output in outputs for token in output.tokens] == expected_tokens(prompt, num_new)

    async with running(
        num_blocks=rng.randint(2, 6) + 40 // page_size,
        page_size=page_size,
        max_batch_size=rng.randint(1, 6),
        budget=rng.choice([4, 64]),
        max_num_steps=rng.choice([1, 8]),
        recover=True,
    ) as h:
        for step in rng.sample(range(40), rng.choice([0, 1, 2])):
            h.pipeline.fail_at[step] = rng.choice(["before", "lost", "after"])
        await asyncio.gather(*(client(h, i) for i in range(rng.randint(2, 9))))


def test_a_cached_prefix_is_found_under_its_salt_alone() -> None:
    books = Books(num_blocks=32)

    def cached_tokens(name: str, salt: str) -> int:
        context = make_context(name, range(16), 1)
        context.cache_salt = salt
        request = ScheduledRequest(context, arrival=0.0)
        books.scheduler.queues.add(request)
        _, batch = books.schedule()
        books.run(batch, num_steps=1)
        books.scheduler.end(request)
        books.schedule()
        return context.cached_prefix_length

    assert [cached_tokens(*given) for given in [("a", "x"), ("b", "y"), ("c", ""), ("d", "x"), ("e", "")]] == [
        0,
        0,
        0,
        12,
        12,
    ]
