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
from max_ray.scheduler.fair_share import Tenant
from max_ray.scheduler.request_queues import RequestQueues
from max_ray.scheduler.stats import SchedulerStats

_VALID_FOR_S = 0.25
_MEMORY = 0.95
"""Share of what was measured that still counts one run later."""
_LENGTHS = 128
_MOST_DEPARTURES = 4096
_FIRST_STEP_S = 0.02
"""Assumed while no step was made."""
_CAUTION = 1.1
"""A client that comes back a little late is let in; one that comes too early is refused again."""


class StepTimes:
    """How long steps take, lately: so much for a step, and so much more for each prompt token in it."""

    def __init__(self) -> None:
        self._sums = [0.0] * 8

    def note(self, num_steps: int, num_tokens: int, seconds: float) -> None:
        """A run has made so many steps, with so many prompt tokens, in so much time."""
        n, p, t = float(num_steps), float(num_tokens), seconds
        for index, value in enumerate((n, p, t, n * n, n * p, p * p, n * t, p * t)):
            self._sums[index] = self._sums[index] * _MEMORY + value

    def costs(self) -> tuple[float, float]:
        """Seconds of a step, and of a prompt token: least squares over the runs, then scaled to their time in all."""
        n, p, t, nn, np, pp, nt, pt = self._sums
        if not n or not t:
            return _FIRST_STEP_S, 0.0
        spread = nn * pp - np * np
        token_s = 0.0 if spread <= 1e-9 * nn * pp else min(max(0.0, (nn * pt - np * nt) / spread), t / p)
        return max(0.0, t - token_s * p) / n, token_s


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
class _Life:
    """What a request will probably need.

    Args:
        num_tokens: Of its prompt.
        num_steps: Decode steps until it ends.
        num_blocks: KV blocks that it holds half of the way.
    """

    num_tokens: float
    num_steps: float
    num_blocks: float


class Departures:
    """When requests leave the queue: those that wait, and behind them others that are like these on average.

    Counts in steps. The time of a step is known from the prompt tokens that are computed by then.

    Args:
        now: When this is forecast.
        costs: Seconds of a step, and of a prompt token.
        limits: Of batches.
        num_free_blocks: KV blocks that no running request will hold half of its way.
    """

    def __init__(self, now: float, costs: tuple[float, float], limits: SchedulerLimits, num_free_blocks: float) -> None:
        self.now = now
        self._step_s, self._token_s = costs
        self._limits = limits
        self._num_free_blocks = num_free_blocks
        self._ends: list[tuple[float, float]] = []
        self._step = 0.0
        self._num_prompt_tokens = 0.0
        self._times: list[float] = []
        self._tokens: list[float] = []
        self._waiting: list[_Life] = []
        self._last_times: dict[Tenant, float] = {}

    def add_running(self, life: _Life, num_pending: int) -> None:
        """A request that runs; `num_pending` tokens of its prompt are left."""
        self._num_prompt_tokens += num_pending if num_pending > 1 else 0
        prompt_steps = self._num_prompt_tokens / self._limits.max_batch_input_tokens
        heapq.heappush(self._ends, (prompt_steps + life.num_steps, life.num_blocks))

    def add_waiting(self, life: _Life, tenant: Tenant) -> None:
        """The next request that waits. All running ones have been added."""
        self._waiting.append(life)
        self._leave(life)
        self._last_times[tenant] = self._times[-1]

    def last_s(self, tenant: Tenant) -> float:
        """Seconds from `now` until the last waiting request of a tenant has left; 0 if none waits."""
        return self._last_times.get(tenant, self.now) - self.now

    def wait_s(self, num_requests: int, num_tokens: int) -> float:
        """Seconds from `now` until so many requests and so many of their tokens have left; both may be zero or less."""
        if not self._waiting or max(num_requests, num_tokens) <= 0:
            return 0.0
        number = len(self._waiting)
        mean = _Life(
            *(sum(getattr(life, name) for life in self._waiting) / number for name in _Life.__dataclass_fields__)
        )
        while len(self._times) < _MOST_DEPARTURES and not (
            len(self._times) >= num_requests and self._tokens[-1] >= num_tokens
        ):
            self._leave(mean)
        index = max(num_requests - 1, bisect_left(self._tokens, num_tokens))
        return self._times[min(index, len(self._times) - 1)] - self.now

    def _leave(self, life: _Life) -> None:
        limits = self._limits
        while self._ends and (len(self._ends) >= limits.max_batch_size or life.num_blocks > self._num_free_blocks):
            end, freed = heapq.heappop(self._ends)
            self._step, self._num_free_blocks = max(self._step, end), self._num_free_blocks + freed
        self._step = max(self._step, self._num_prompt_tokens / limits.max_batch_input_tokens)
        seconds = self._step * self._step_s + self._num_prompt_tokens * self._token_s
        self._times.append(self.now + seconds * _CAUTION)
        self._tokens.append((self._tokens[-1] if self._tokens else 0) + life.num_tokens)
        self._num_prompt_tokens += life.num_tokens
        self._num_free_blocks -= life.num_blocks
        heapq.heappush(self._ends, (self._step + 1 + life.num_steps, life.num_blocks))


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
        self._begin = (0.0, 0, 0)
        self._departures: Departures | None = None

    def begin_run(self, stats: SchedulerStats) -> None:
        """A run begins."""
        self._begin = self._counts(stats)

    def end_run(self, stats: SchedulerStats) -> None:
        """The run has ended."""
        (begin, *before), (end, *after) = self._begin, self._counts(stats)
        steps, tokens = (int(new - old) for new, old in zip(after, before, strict=True))
        self._steps.note(steps, tokens, end - begin)

    def _counts(self, stats: SchedulerStats) -> tuple[float, int, int]:
        """Time, and steps and computed prompt tokens so far."""
        return self._clock(), stats.steps, stats.prompt_tokens - stats.prefix_hit_tokens

    def departures(self) -> Departures:
        """When the waiting requests leave the queue. Good for a quarter of a second."""
        now = self._clock()
        if self._departures is None or now - self._departures.now > _VALID_FOR_S:
            self._departures = self._forecast(now)
        return self._departures

    def _forecast(self, now: float) -> Departures:
        self.lengths.prepare()
        running = self._queues.running.values()
        lives = [self._life(request.context) for request in running]
        held = sum(life.num_blocks - len(r.context.block_table) for life, r in zip(lives, running, strict=True))
        departures = Departures(now, self._steps.costs(), self._limits, self._budget.num_free_blocks - held)
        for life, request in zip(lives, running, strict=True):
            departures.add_running(life, request.num_pending_tokens)
        for request in self._queues.in_order():
            departures.add_waiting(self._life(request.context), request.tenant)
        return departures

    def _life(self, context: TextContext) -> _Life:
        num_tokens, num_new = len(context.tokens), self.lengths.remaining(context)
        return _Life(num_tokens, num_new, (num_tokens + num_new // 2) // self._budget.page_size + 1)
