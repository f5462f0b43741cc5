"""Forecast: when the waiting requests will probably be admitted, and when the queue has room again.

The running requests are taken to their probable ends, in the order of these ends: each end frees a place in the batch
and KV blocks, the next waiting request takes them, and so on. How long a step takes and how long answers get is what
was measured lately.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

from max_ray.interfaces import GenerationStatus, TextContext
from max_ray.scheduler.block_budget import BlockBudget
from max_ray.scheduler.decision import SchedulerLimits
from max_ray.scheduler.request_queues import RequestQueues

_VALID_FOR_S = 0.25
_MEMORY = 0.95
"""Share of what was measured that still counts one run later."""
_LENGTHS = 128


class StepTimes:
    """How long a step takes, lately."""

    def __init__(self) -> None:
        self._steps = 0.0
        self._seconds = 0.0

    def note(self, num_steps: int, seconds: float) -> None:
        """A run has made so many steps in so much time."""
        self._steps = self._steps * _MEMORY + num_steps
        self._seconds = self._seconds * _MEMORY + seconds

    def step_s(self, num_steps: int, seconds: float) -> float | None:
        """Mean seconds of a step; None while no step was made.

        Args:
            num_steps: Steps of the run in progress.
            seconds: Its time so far.
        """
        steps = self._steps + num_steps
        return (self._seconds + seconds) / steps if steps else None


class AnswerLengths:
    """How long answers get that the model ends by itself."""

    def __init__(self) -> None:
        self._lengths: deque[int] = deque(maxlen=_LENGTHS)
        self._ended_itself: deque[bool] = deque(maxlen=_LENGTHS)
        self._sorted: list[int] = []
        self._sums: list[int] = []

    def note(self, context: TextContext) -> None:
        """An answer is complete."""
        ended_itself = context.status is GenerationStatus.END_OF_SEQUENCE
        self._ended_itself.append(ended_itself)
        if ended_itself:
            self._lengths.append(context.tokens.generated_length)

    def prepare(self) -> None:
        """To be called before `remaining` is, which then goes by what was noted so far."""
        self._sorted = sorted(self._lengths)
        self._sums = [*accumulate(self._sorted, initial=0)]

    def remaining(self, context: TextContext) -> int:
        """Tokens that a request will probably still get."""
        limit = context.remaining_new_tokens
        if sum(self._ended_itself) * 10 < len(self._ended_itself):
            return limit
        length = context.tokens.generated_length
        first = bisect_right(self._sorted, length)
        num_longer = len(self._sorted) - first
        if not num_longer:
            return limit
        mean = (self._sums[-1] - self._sums[first]) / num_longer
        return min(limit, max(1, round(mean) - length))


@dataclass(frozen=True, slots=True)
class Departures:
    """When requests leave the queue.

    Args:
        now: When this was forecast.
        times: Of each departure, in order.
        tokens: Tokens that have left by then.
    """

    now: float
    times: list[float]
    tokens: list[int]

    def wait_s(self, num_requests: int, num_tokens: int) -> float:
        """Seconds from `now` until so many requests and so many of their tokens have left; both may be zero or less."""
        index = max(num_requests - 1, bisect_left(self.tokens, num_tokens) if num_tokens > 0 else -1)
        if index < 0:
            return 0.0
        if index < len(self.times):
            return self.times[index] - self.now
        if not self.times:
            return 0.0
        whole = self.times[-1] - self.now
        by_requests = num_requests / len(self.times)
        by_tokens = num_tokens / self.tokens[-1] if self.tokens[-1] else 0.0
        return whole * max(1.0, by_requests, by_tokens)


class Forecast:
    """Forecasts for one scheduler.

    Args:
        limits: Of batches.
        queues: Waiting and running requests.
        budget: The account of KV blocks.
        clock: Seconds, monotonic.
    """

    def __init__(
        self, limits: SchedulerLimits, queues: RequestQueues, budget: BlockBudget, clock: Callable[[], float]
    ) -> None:
        self.lengths = AnswerLengths()
        self._steps = StepTimes()
        self._limits = limits
        self._queues = queues
        self._budget = budget
        self._clock = clock
        self._begin: tuple[float, int] | None = None
        self._departures: Departures | None = None

    def begin_run(self, num_steps: int) -> None:
        """A run begins; `num_steps` were made before it."""
        self._begin = self._clock(), num_steps

    def end_run(self, num_steps: int) -> None:
        """The run has ended; `num_steps` were made in all."""
        assert self._begin is not None, "end_run() without begin_run()"
        begin, before = self._begin
        self._begin = None
        self._steps.note(num_steps - before, self._clock() - begin)

    def departures(self, num_steps: int) -> Departures | None:
        """When the waiting requests leave the queue; None while no step was made. Good for a quarter of a second.

        Args:
            num_steps: Steps made in all.
        """
        now = self._clock()
        begin, before = self._begin or (now, num_steps)
        step_s = self._steps.step_s(num_steps - before, now - begin)
        if step_s is None:
            return None
        last = self._departures
        is_same = last is not None and len(last.times) == len(self._queues.waiting)
        if last is None or not is_same or now - last.now > _VALID_FOR_S:
            last = self._departures = self._simulated(now, step_s)
        return last

    def _simulated(self, now: float, step_s: float) -> Departures:
        self.lengths.prepare()
        ends: list[tuple[float, int]] = []
        num_free_blocks = self._budget.num_free_blocks
        for request in self._queues.running.values():
            num_steps, num_blocks = self._life(request.context)
            num_free_blocks -= num_blocks - len(request.context.block_table)
            ends.append((now + num_steps * step_s, num_blocks))
        heapq.heapify(ends)
        time, num_tokens, times, tokens = now, 0, [], []
        for request in self._queues.in_order():
            num_steps, num_blocks = self._life(request.context)
            while ends and (len(ends) >= self._limits.max_batch_size or num_blocks > num_free_blocks):
                end, freed = heapq.heappop(ends)
                time, num_free_blocks = max(time, end), num_free_blocks + freed
            heapq.heappush(ends, (time + num_steps * step_s, num_blocks))
            num_free_blocks -= num_blocks
            num_tokens += len(request.context.tokens)
            times.append(time)
            tokens.append(num_tokens)
        return Departures(now, times, tokens)

    def _life(self, context: TextContext) -> tuple[int, int]:
        """Steps until a request probably ends, and the blocks that it holds half of the way."""
        num_new = self.lengths.remaining(context)
        num_pending = len(context.tokens) - context.processed_length
        num_steps = -(-num_pending // self._limits.max_batch_input_tokens) + num_new - 1
        return num_steps, (len(context.tokens) + num_new // 2) // self._budget.page_size + 1
