"""The queue is bounded by tokens too, and a refused request is told when there will be room."""

from __future__ import annotations

import pytest

from max_ray.benchmark.fairness import retry_after, share_within
from max_ray.benchmark.fairness_simulation import Job, Machine, Simulation
from max_ray.errors import ConfigError, QueueFullError
from max_ray.interfaces import GenerationStatus
from max_ray.scheduler import SchedulerLimits
from max_ray.scheduler.forecast import AnswerLengths, StepTimes
from tests.scheduler.fakes import make_context
from tests.scheduler.harness import running


def limits(max_queued_tokens: int | None) -> SchedulerLimits:
    return SchedulerLimits(2, 64, 100, 1, max_queued_tokens=max_queued_tokens)


def test_the_limit_of_tokens() -> None:
    simulation = Simulation(Machine(num_blocks=100, page_size=4, limits=limits(100)))
    simulation.submit(Job("a", 300, 5))
    for _ in range(2):
        with pytest.raises(QueueFullError, match="300 prompt tokens are waiting already, and 1 more would be too many"):
            simulation.submit(Job("a", 1, 5))
    simulation.run(0.05)
    assert not simulation.scheduler.queues.waiting
    simulation.submit(Job("a", 60, 5))
    simulation.submit(Job("a", 40, 5))
    with pytest.raises(QueueFullError):
        simulation.submit(Job("a", 1, 5))
    assert simulation.stats.rejected == 3
    with pytest.raises(ConfigError, match="max_queued_tokens must be at least 1"):
        limits(0)
    without = Simulation(Machine(num_blocks=100, page_size=4, limits=limits(None)))
    for _ in range(50):
        without.submit(Job("a", 300, 5))


@pytest.mark.parametrize(
    ("limits", "size"),
    [
        (SchedulerLimits(32, 2048, 32, 1), (256, 256)),
        (SchedulerLimits(32, 2048, 32, 1), (1000, 64)),
        (SchedulerLimits(32, 2048, 512, 1, max_queued_tokens=8192), (512, 256)),
    ],
)
def test_retry_after_is_right_within_a_factor_of_two(limits: SchedulerLimits, size: tuple[int, int]) -> None:
    clients = retry_after(limits, size, 150, 2)
    assert len(clients.refusals) > 100
    assert share_within(clients.refusals) >= 0.8
    assert clients.num_first_retries[True] > clients.num_first_retries[False]


def test_the_cost_of_a_step_is_learned() -> None:
    times = StepTimes()
    assert times.costs() == (0.02, 0.0)
    for number in range(200):
        steps, tokens = 1 + number % 7, (number * 37) % 500
        times.note(steps, tokens, steps * 0.008 + tokens * 0.0001)
    step_s, token_s = times.costs()
    assert (step_s, token_s) == (pytest.approx(0.008), pytest.approx(0.0001))
    decoding = StepTimes()
    for _ in range(20):
        decoding.note(4, 0, 0.04)
    assert decoding.costs() == (pytest.approx(0.01), 0.0)


def test_how_long_answers_get_is_learned() -> None:
    lengths = AnswerLengths()
    context = make_context("x", [1], 1000)
    lengths.prepare()
    assert lengths.remaining(context) == 1000
    for _ in range(20):
        ended = make_context("y", [1], 1000)
        for _ in range(50):
            ended.update(2)
        ended.status = GenerationStatus.END_OF_SEQUENCE
        lengths.note(ended)
    lengths.prepare()
    assert lengths.remaining(context) == 50
    assert lengths.remaining(make_context("z", [1], 10)) == 10


async def test_a_request_that_cannot_start_in_time_is_refused() -> None:
    async with running(num_blocks=64, max_batch_size=1, budget=16) as harness:
        loop = harness.loop
        streams = [loop.submit(make_context(f"a{n}", [n], 200)) for n in range(12)]
        await harness.at_step(5)
        late, patient = make_context("late", [3], 4), make_context("patient", [3], 4)
        late.deadline, patient.deadline = loop._room._clock() + 1e-6, loop._room._clock() + 1000
        with pytest.raises(QueueFullError, match="after its time limit") as caught:
            loop.submit(late)
        assert caught.value.retry_after >= 1
        streams.append(loop.submit(patient))
        other = make_context("other", [3], 4)
        other.tenant, other.deadline = "other", loop._room._clock() + 0.001
        streams.append(loop.submit(other))
        for stream in streams:
            await stream.aclose()
