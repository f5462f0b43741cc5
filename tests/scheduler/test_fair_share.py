"""Keys share a worker group by their weights, and a key that floods does not hold up another one."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from max_ray.benchmark.fairness import quantile, shares_of, ttft_beside
from max_ray.benchmark.fairness_simulation import Job, Machine, Simulation
from max_ray.errors import QueueFullError
from max_ray.interfaces import WaitReason
from max_ray.scheduler import SchedulerLimits
from tests.scheduler.fakes import make_context
from tests.scheduler.harness import running

SMALL = Machine(num_blocks=40, page_size=4, limits=SchedulerLimits(4, 16, 1000, 1))


def submit(simulation: Simulation, tenant: str, prompt: int = 8, num_new: int = 8, weight: float = 1.0) -> Job:
    job = Job(tenant, prompt, num_new, weight)
    simulation.submit(job)
    return job


def order(simulation: Simulation) -> str:
    return "".join(request.context.tenant for request in simulation.scheduler.queues.in_order())


def test_one_key_is_served_in_order_of_arrival() -> None:
    simulation = Simulation(SMALL)
    jobs = [submit(simulation, "a", prompt) for prompt in (30, 2, 9, 4)]
    queues = simulation.scheduler.queues
    assert list(queues.in_order()) == [job.request for job in jobs]
    assert queues.num_waiting_tokens == 45
    assert not queues.share.is_contended


def test_two_keys_take_turns_by_weight() -> None:
    simulation = Simulation(SMALL)
    for _ in range(6):
        submit(simulation, "a")
    for _ in range(4):
        submit(simulation, "b")
    assert order(simulation) == "abababab" + "aa"
    heavy = Simulation(SMALL)
    for _ in range(6):
        submit(heavy, "a")
    for _ in range(6):
        submit(heavy, "b", weight=3.0)
    assert order(heavy)[:8].count("b") == 6


def test_a_key_that_was_away_has_no_credit() -> None:
    """B comes after A has been served for long, with others waiting: they take turns, B does not get all."""
    simulation = Simulation(SMALL)
    for _ in range(200):
        submit(simulation, "a", num_new=20)
    submit(simulation, "c", num_new=1)
    simulation.run(2.0)
    before = sum(job.tenant == "a" for job in simulation.done)
    for _ in range(50):
        submit(simulation, "b", num_new=20)
    simulation.run(6.0)
    num_a = sum(job.tenant == "a" for job in simulation.done) - before
    num_b = sum(job.tenant == "b" for job in simulation.done)
    assert num_b > 8
    assert abs(num_a - num_b) <= 4


def test_a_new_key_gets_a_place_in_a_full_batch_at_once() -> None:
    simulation = Simulation(SMALL)
    flood = [submit(simulation, "a", num_new=60) for _ in range(30)]
    simulation.run(0.1)
    assert len(simulation.scheduler.queues.running) == 4
    job = submit(simulation, "b", prompt=6)
    simulation.run(simulation.now + 0.02)
    assert job.first_token is not None
    assert simulation.stats.preemptions == 1
    oldest, *_, youngest = flood[:4]
    assert youngest.request is not None
    assert youngest.request.context.trace.num_preemptions == 1
    assert oldest.request is not None
    assert oldest.request.context.trace.num_preemptions == 0
    simulation.run(60.0)
    assert len(simulation.done) == 31, "the preempted one ends too"


def test_memory_is_taken_from_the_key_that_holds_most() -> None:
    """A cache that is too small for all: the youngest request is B's, but A has more than its share."""
    simulation = Simulation(Machine(num_blocks=24, page_size=4, limits=SchedulerLimits(8, 64, 100, 1)))
    for _ in range(3):
        submit(simulation, "a", prompt=20, num_new=30)
    simulation.run(0.02)
    job = submit(simulation, "b", prompt=4, num_new=12)
    simulation.run(5.0)
    assert simulation.stats.preemptions >= 1
    assert job.request is not None
    assert job.request.context.trace.num_preemptions == 0


def test_why_a_request_waited() -> None:
    simulation = Simulation(SMALL)
    jobs = [submit(simulation, "a", prompt=4, num_new=30) for _ in range(6)]
    simulation.run(0.03)
    reasons = [job.request.context.trace.wait_reason for job in jobs if job.request is not None]
    assert reasons[:4] == [None] * 4
    assert reasons[4] is WaitReason.BATCH_FULL


@pytest.mark.parametrize(("num_clients", "prompt_length"), [(1, 256), (8, 256), (8, 4000)])
def test_a_flood_does_not_raise_another_keys_time_to_first_token(num_clients: int, prompt_length: int) -> None:
    usual = ttft_beside(16, prompt_length, num_clients, 30.0)
    flooded = ttft_beside(300, prompt_length, num_clients, 30.0)
    assert quantile(flooded, 0.99) <= 1.5 * quantile(usual, 0.99)


@pytest.mark.parametrize(
    ("weights", "sizes"),
    [((1, 1), [(256, 128)] * 2), ((1, 2, 4), [(256, 128)] * 3), ((1, 3), [(1000, 30), (60, 200)])],
)
def test_shares_follow_the_weights(weights: tuple[float, ...], sizes: list[tuple[int, int]]) -> None:
    keys = [str(number) for number in range(len(weights))]
    result = shares_of(dict(zip(keys, weights, strict=True)), dict(zip(keys, sizes, strict=True)), 40.0)
    assert all(0.9 <= ratio <= 1.1 for ratio in result.values()), result


arrivals = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(1, 60), st.integers(1, 40), st.integers(0, 30)),
    min_size=1,
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(arrivals, st.integers(1, 6), st.integers(40, 90), st.tuples(*[st.sampled_from([0.5, 1.0, 4.0])] * 3))
def test_any_history_ends_with_every_request_served(
    history: list[tuple[str, int, int, int]], batch_size: int, num_blocks: int, weights: tuple[float, float, float]
) -> None:
    """And the requests of one key are first admitted in the order in which they came, but for shared prefixes."""
    machine = Machine(num_blocks=num_blocks, page_size=4, limits=SchedulerLimits(batch_size, 24, 1000, 1))
    simulation = Simulation(machine)
    jobs: dict[str, list[Job]] = defaultdict(list)
    time = 0.0
    for tenant, prompt, num_new, pause in history:
        job = Job(tenant, prompt, num_new, weights["abc".index(tenant)])
        jobs[tenant].append(job)
        time += pause / 1000
        simulation.at(time, lambda job=job: simulation.submit(job))  # type: ignore[misc]
    simulation.run(time + len(history) * 40 * 0.02 * 4)
    simulation.manager.assert_invariants()
    assert len(simulation.done) == len(history)
    for own in jobs.values():
        admitted = [job.request.context.trace.admitted_at or 0.0 for job in own if job.request is not None]
        assert admitted == sorted(admitted)
    assert simulation.scheduler.queues.num_waiting_tokens == 0
    assert not list(simulation.scheduler.queues.share.active)


def test_a_full_queue_still_takes_another_keys_requests() -> None:
    simulation = Simulation(Machine(num_blocks=40, page_size=4, limits=SchedulerLimits(2, 16, 10, 1)))
    for _ in range(12):
        submit(simulation, "a")
    with pytest.raises(QueueFullError):
        submit(simulation, "a")
    for _ in range(5):
        submit(simulation, "b")
    with pytest.raises(QueueFullError):
        submit(simulation, "b")
    for _ in range(2):
        submit(simulation, "c", weight=0.5)
    with pytest.raises(QueueFullError):
        submit(simulation, "c", weight=0.5)


async def test_a_long_run_is_interrupted_for_a_key_that_has_nothing() -> None:
    async with running(num_blocks=256, max_batch_size=2, budget=16, max_num_steps=64, can_extend=True) as harness:
        streams = [harness.loop.submit(make_context(f"a{n}", [n], 200)) for n in range(3)]
        await harness.at_step(20)
        context = make_context("b", [9], 4)
        context.tenant = "b"
        steps = harness.pipeline.num_steps
        outputs = [output async for output in harness.loop.submit(context)]
        assert outputs[-1].is_done
        assert harness.pipeline.num_steps - steps < 12
        for stream in streams:
            assert [output async for output in stream][-1].is_done
        assert harness.loop.stats.preemptions >= 1


def test_priority_goes_before_share() -> None:
    """And a request is not preempted for a less important one of a key that has less."""
    simulation = Simulation(SMALL)
    for tenant, priority in (("a", 0), ("a", 0), ("b", 3), ("b", -1), ("a", 0), ("c", 0)):
        simulation.submit(Job(tenant, 8, 8, priority=priority))
    queues = simulation.scheduler.queues
    order = [(request.context.tenant, request.priority) for request in queues.in_order()]
    assert order == [("b", -1), ("a", 0), ("c", 0), ("a", 0), ("a", 0), ("b", 3)]
    full = Simulation(SMALL)
    for _ in range(4):
        submit(full, "a", num_new=20)
    full.run(0.02)
    full.submit(Job("b", 8, 8, priority=1))
    full.run(0.1)
    assert full.stats.preemptions == 0
    full.submit(Job("c", 8, 8, priority=0))
    full.run(0.13)
    assert full.stats.preemptions == 1
