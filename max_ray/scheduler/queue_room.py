"""QueueRoom: whether a request may wait, and when one that may not should come back.

The queue is bounded by requests and by tokens. A tenant (API key) that waits with less than its share of the queue is
let in though other tenants have filled it; the queue may then hold twice as much.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from max_ray.errors import QueueFullError
from max_ray.interfaces import TextContext
from max_ray.scheduler.forecast import Forecast
from max_ray.scheduler.scheduler import Scheduler

_MIN_RETRY_AFTER_S = 1.0
_MAX_RETRY_AFTER_S = 600.0
_MOST_PROMISES = 1024
_SURELY = 2.0
"""A deadline is out of reach if even half of the forecast wait is too long."""


@dataclass(frozen=True, slots=True)
class _Promise:
    """A refused request that was told to come back at `time`."""

    time: float
    num_requests: int
    num_tokens: int
    tenant: str


class QueueRoom:
    """The limits of one scheduler's queue.

    Args:
        scheduler: Whose queue it is.
        forecast: When requests leave it.
        clock: Seconds, monotonic.
    """

    def __init__(self, scheduler: Scheduler, forecast: Forecast, clock: Callable[[], float]) -> None:
        self._limits = scheduler.limits
        self._queues = scheduler.queues
        self._stats = scheduler.stats
        self._forecast = forecast
        self._clock = clock
        self._promises: deque[_Promise] = deque(maxlen=_MOST_PROMISES)

    def check(self, context: TextContext) -> None:
        """Raises QueueFullError for a request that may not wait, with its siblings behind it.

        Args:
            context: Of a request that is not queued yet.
        """
        num_requests = 1 + context.num_siblings
        num_tokens = num_requests * len(context.tokens)
        missing = self._missing(context, num_requests, num_tokens)
        if missing is not None:
            raise self._full(context, num_requests, num_tokens, missing)
        self._check_deadline(context)

    def _missing(self, context: TextContext, num_requests: int, num_tokens: int) -> tuple[int, int] | None:
        """Requests and tokens that must leave the queue first; None where there is room."""
        limits, queues = self._limits, self._queues
        num_free_places = max(0, limits.max_batch_size - len(queues.running))
        most_requests = limits.max_queued_requests + num_free_places
        missing_requests = len(queues.waiting) + num_requests - most_requests
        missing_tokens = 0
        if limits.max_queued_tokens is not None and queues.waiting:
            missing_tokens = queues.num_waiting_tokens + num_tokens - limits.max_queued_tokens
        if missing_requests <= 0 and missing_tokens <= 0:
            return None
        if self._is_below_share(context, num_requests, num_tokens, missing_requests, missing_tokens):
            return None
        return missing_requests, missing_tokens

    def _is_below_share(
        self, context: TextContext, num_requests: int, num_tokens: int, missing_requests: int, missing_tokens: int
    ) -> bool:
        """Whether the queue is full of other tenants' requests, and not of this one's."""
        limits, tenant = self._limits, self._queues.share.tenant_of(context)
        share = self._queues.share.share_of(tenant)
        num_own_tokens = sum(len(request.context.tokens) for request in tenant.waiting.values())
        max_tokens = limits.max_queued_tokens
        return (
            share < 1
            and len(tenant.waiting) + num_requests <= share * limits.max_queued_requests
            and missing_requests <= limits.max_queued_requests
            and (max_tokens is None or not tenant.waiting or num_own_tokens + num_tokens <= share * max_tokens)
            and (max_tokens is None or missing_tokens <= max_tokens)
        )

    def _full(
        self, context: TextContext, num_requests: int, num_tokens: int, missing: tuple[int, int]
    ) -> QueueFullError:
        self._stats.rejected += 1
        wait_s = self._retry_after(context.tenant, missing)
        until = self._clock() + wait_s
        self._promises.append(_Promise(until, num_requests, num_tokens, context.tenant))
        waiting, more = f"{len(self._queues.waiting)} requests", f"{num_requests} more"
        if missing[0] <= 0:
            waiting, more = f"{self._queues.num_waiting_tokens} prompt tokens", f"{num_tokens} more"
        return QueueFullError(
            f"{waiting} are waiting already, and {more} would be too many. Try again in {wait_s:.0f} s.",
            retry_after=wait_s,
        )

    def _retry_after(self, tenant: str, missing: tuple[int, int]) -> float:
        """Seconds until the queue has room, also for those of the tenant that were told to come back before."""
        now = self._clock()
        self._promises = deque((p for p in self._promises if p.time > now), maxlen=_MOST_PROMISES)
        earlier = [promise for promise in self._promises if promise.tenant == tenant]
        departures = self._forecast.departures()
        num_requests = missing[0] + sum(promise.num_requests for promise in earlier)
        num_tokens = missing[1] + sum(promise.num_tokens for promise in earlier) if missing[1] > 0 else 0
        wait_s = departures.wait_s(num_requests, num_tokens) - (now - departures.now)
        return min(_MAX_RETRY_AFTER_S, max(_MIN_RETRY_AFTER_S, wait_s))

    def _check_deadline(self, context: TextContext) -> None:
        """Raises QueueFullError for a request whose client will have given up before it can start."""
        if context.deadline is None or not self._queues.waiting:
            return
        departures = self._forecast.departures()
        now = self._clock()
        tenant = self._queues.share.tenant_of(context)
        wait_s = departures.last_s(tenant) - (now - departures.now)
        if wait_s / _SURELY <= context.deadline - now:
            return
        self._stats.rejected += 1
        raise QueueFullError(
            f"{len(tenant.waiting)} requests are waiting, so that this one would start in {wait_s:.0f} s, after "
            f"its time limit. Allow more time, or try again later.",
            retry_after=min(_MAX_RETRY_AFTER_S, max(_MIN_RETRY_AFTER_S, wait_s - (context.deadline - now))),
        )
