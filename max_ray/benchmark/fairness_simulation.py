"""A scheduler with its KV manager on a virtual clock: how it shares a worker group, without a model.

The scheduler, the queue's limits and the KV manager are the real ones. A step takes

    base_s + token_s * tokens of the step

and nothing else takes time, so that a minute of load is seconds of work and each result can be repeated.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from max_ray.errors import QueueFullError
from max_ray.interfaces import KVCacheParams, RequestID, SamplingParams, TextContext, TokenBuffer
from max_ray.kv_cache import PagedKVCacheManager
from max_ray.scheduler import ScheduledRequest, Scheduler, SchedulerLimits, SchedulerStats
from max_ray.scheduler.forecast import Forecast
from max_ray.scheduler.queue_room import QueueRoom


@dataclass(frozen=True)
class Machine:
    """What is simulated.

    Args:
        num_blocks: KV blocks.
        page_size: Tokens of a block.
        base_s: Seconds of a step without tokens.
        token_s: Seconds that each token adds.
        limits: Of the scheduler.
    """

    num_blocks: int = 2000
    page_size: int = 16
    base_s: float = 0.008
    token_s: float = 0.000025
    limits: SchedulerLimits = field(default_factory=lambda: SchedulerLimits(32, 2048, 512, 1))


@dataclass(eq=False)
class Job:
    """One request of a client.

    Args:
        tenant: Who sent it.
        prompt_length: Tokens of the prompt.
        num_new: Tokens that it gets.
        weight: Of the tenant.
        priority: Lower numbers run earlier.
        on_end: Called when it has ended.
        arrival: When it was accepted.
        first_token: When its first token came.
        request: What the scheduler knows.
    """

    tenant: str
    prompt_length: int
    num_new: int
    weight: float = 1.0
    priority: int = 0
    on_end: Callable[[], None] | None = None
    arrival: float = 0.0
    first_token: float | None = None
    request: ScheduledRequest | None = None

    @property
    def ttft(self) -> float | None:
        """Seconds to the first token."""
        return None if self.first_token is None else self.first_token - self.arrival


class Simulation:
    """Events and steps on one virtual clock.

    Args:
        machine: What is simulated.

    Attributes:
        now: Seconds since the start.
        done: Jobs that have ended.
        block_seconds: KV-block-seconds by tenant since `reset`.
        departed: Requests and tokens that have left the queue.
    """

    def __init__(self, machine: Machine) -> None:
        self.now = 0.0
        self.done: list[Job] = []
        self.block_seconds: dict[str, float] = {}
        self.stats = SchedulerStats()
        self.machine = machine
        params = KVCacheParams(dtype="float32", num_layers=1, num_kv_heads=1, head_dim=8, page_size=machine.page_size)
        self.manager = PagedKVCacheManager(params, machine.num_blocks)
        self.scheduler = Scheduler(machine.limits, machine.page_size, machine.num_blocks, self.stats, self._clock)
        self.forecast = Forecast(machine.limits, self.scheduler.queues, self.scheduler.budget, self._clock)
        self.room = QueueRoom(self.scheduler, self.forecast, self._clock)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._event_time = 0.0  # events of the time of a step are called behind it
        self._numbers = itertools.count()
        self._jobs: dict[RequestID, Job] = {}

    def at(self, time: float, event: Callable[[], None]) -> None:
        """Has `event` called at a time."""
        heapq.heappush(self._events, (time, next(self._numbers), event))

    def submit(self, job: Job) -> None:
        """Queues a job. Raises QueueFullError."""
        number = next(self._numbers)
        context = TextContext(
            request_id=RequestID(f"{job.tenant}-{number}"),
            tokens=TokenBuffer([number] * job.prompt_length),
            max_length=1_000_000,
            sampling_params=SamplingParams(max_new_tokens=job.num_new),
            tenant=job.tenant,
            tenant_weight=job.weight,
            priority=job.priority,
        )
        self.room.check(context)
        job.arrival = self._event_time
        job.request = ScheduledRequest(context, job.arrival)
        self._jobs[context.request_id] = job
        self.scheduler.queues.add(job.request)

    def run(self, until: float) -> None:
        """Events and steps until a time."""
        while self.now < until:
            self._call_events()
            if self.scheduler.queues.is_empty:
                self.now = min(until, self._events[0][0]) if self._events else until
            else:
                self._step()

    def _clock(self) -> float:
        return self.now

    def _call_events(self) -> None:
        while self._events and self._events[0][0] <= self.now:
            self._event_time, _, event = heapq.heappop(self._events)
            event()

    def _step(self) -> None:
        self.forecast.begin_run(self.stats)
        decision = self.scheduler.schedule()
        batch = self.scheduler.apply(decision, self.manager.update(decision.update))
        num_tokens = sum(request.context.active_length for request in batch.requests)
        seconds = self.machine.base_s + self.machine.token_s * num_tokens
        for request in self.scheduler.queues.running.values():
            held = len(request.context.block_table) * seconds
            self.block_seconds[request.context.tenant] = self.block_seconds.get(request.context.tenant, 0.0) + held
        self.now += seconds
        self.stats.steps += 1
        for request in batch.requests:
            self._advance(request)
        self.forecast.end_run(self.stats)

    def _advance(self, request: ScheduledRequest) -> None:
        context = request.context
        if context.prompt_in_chunks:
            context.advance()
            return
        context.update(1)
        job = self._jobs[request.request_id]
        if job.first_token is None:
            job.first_token = self.now
        if context.is_done:
            del self._jobs[request.request_id]
            self.forecast.lengths.note(context)
            self.scheduler.end(request)
            self.done.append(job)
            if job.on_end is not None:
                job.on_end()


class Clients:
    """Clients of one tenant in a closed loop: each sends its next job when the last one has ended, after a pause.

    Args:
        simulation: Where they send to.
        make: Makes a job.
        num_clients: How many send at a time.
        pause_s: Gives the seconds between two jobs of a client.
    """

    def __init__(
        self,
        simulation: Simulation,
        make: Callable[[], Job],
        num_clients: int,
        pause_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.num_refused = 0
        self._simulation = simulation
        self._make = make
        self._pause_s = pause_s
        for _ in range(num_clients):
            simulation.at(simulation.now + pause_s(), self._send)

    def _send(self) -> None:
        job = self._make()
        job.on_end = self._next
        try:
            self._simulation.submit(job)
        except QueueFullError as error:
            self.num_refused += 1
            self._simulation.at(self._simulation.now + error.retry_after, self._send)

    def _next(self) -> None:
        self._simulation.at(self._simulation.now + self._pause_s(), self._send)
