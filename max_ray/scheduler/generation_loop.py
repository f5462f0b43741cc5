"""GenerationLoop: continuous batching for one worker group. Receive, schedule, run, deliver, release.

One task runs `run()`; requests arrive through `submit()`. Everything happens on one event loop, so state does not
change between two awaits. A request's state is its context and its entry in the Scheduler:

    submit -> waiting -> running -> ended: finished, failed, cancelled or disconnected, always by Scheduler.end()

While a run is in progress, its contexts belong to the pipeline: a cancelled request leaves at the end of the run, which
`interrupt()` brings about at the next step boundary. A run does not end if the next one would have the same requests:
when half of its steps are read, it is extended, with the blocks for the added steps.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import replace

from max_ray.errors import InputError, WorkerGroupError
from max_ray.interfaces import CacheReply, CacheUpdate, GenerationStatus, KVCacheClient, RequestID, TextContext
from max_ray.kv_cache import insufficient_blocks
from max_ray.log import get_logger
from max_ray.scheduler.activity import LoopActivity, request_activities
from max_ray.scheduler.batch_runner import BatchRunner, TextPipeline
from max_ray.scheduler.decision import SchedulerLimits
from max_ray.scheduler.delivery import Delivery
from max_ray.scheduler.engine_loop import EngineLoop, stopping_error
from max_ray.scheduler.forecast import Forecast
from max_ray.scheduler.output_queue import TokenStream
from max_ray.scheduler.queue_room import QueueRoom
from max_ray.scheduler.recovery import Recover
from max_ray.scheduler.scheduled_request import ScheduledRequest
from max_ray.scheduler.scheduler import Scheduler
from max_ray.scheduler.stats import SchedulerStats

logger = get_logger(__name__)


class GenerationLoop(EngineLoop):
    """Continuous batching over one pipeline and one KV manager.

    Args:
        pipeline: What runs batches.
        kv_cache: Client of the KV manager.
        limits: Limits of batches and of the queue.
        recover: Called after a WorkerGroupError, once all contexts are reset. It brings the workers back and returns
            the client of an empty KV manager (None: the one before, which it has emptied); it is called again if it
            fails. Every stream gets the error if `recover` is None, or after MAX_FAILURES consecutive failures of
            runs or of `recover`. A request that causes the failures by itself is the only one to get it.
        flush_after_s: Idle delay before pending releases are sent by themselves. Until then they travel with the
            next request's exchange, which a separate exchange would delay.
    """

    def __init__(
        self,
        pipeline: TextPipeline,
        kv_cache: KVCacheClient,
        limits: SchedulerLimits,
        recover: Recover | None = None,
        flush_after_s: float = 0.02,
    ) -> None:
        super().__init__(limits, recover)
        self._kv_cache = kv_cache
        self._flush_after_s = flush_after_s
        self._can_flush = True
        self._scheduler = Scheduler(limits, kv_cache.page_size, kv_cache.num_blocks, self._stats)
        self._forecast = Forecast(limits, self._scheduler.queues, self._scheduler.budget, time.monotonic)
        self._room = QueueRoom(self._scheduler, self._forecast, time.monotonic)
        self._delivery = Delivery(self._scheduler, self._forecast.lengths)
        self._runner = BatchRunner(pipeline, self._scheduler, self._delivery, self._update_cache)

    def submit(self, context: TextContext) -> TokenStream:
        """Queues a request.

        Returns:
            Its outputs, one a step. Closing the stream cancels the request.

        Raises:
            QueueFullError: Too many requests or tokens wait, or the request could not start before its deadline.
            InsufficientBlocksError: The prompt is larger than the whole cache.
            InputError: A request of this id is in progress, or the request has more siblings than can be admitted.
        """
        if self._is_stopped:
            raise stopping_error()
        check_request(context, self._scheduler)
        self._room.check(context)
        request = ScheduledRequest(context, arrival=time.monotonic())
        context.trace.submitted_at = request.arrival
        self._scheduler.queues.add(request)
        self._wake.set()
        self._runner.interrupt_for_waiting()
        return TokenStream(request.outputs, lambda: self._cancel(request))

    def cancel(self, request_id: RequestID) -> None:
        """Ends a request at the next step boundary; its stream ends with CANCELLED. Ignores unknown ids."""
        request = self._scheduler.queues.get(request_id)
        if request is not None:
            self._cancel(request)

    @property
    def stats(self) -> SchedulerStats:
        """A snapshot."""
        queues, budget = self._scheduler.queues, self._scheduler.budget
        oldest = queues.oldest_arrival
        return replace(
            self._stats,
            queued=len(queues.waiting),
            running=len(queues.running),
            oldest_waiting_s=time.monotonic() - oldest if oldest is not None else 0.0,
            num_used_blocks=budget.num_blocks - budget.num_free_blocks,
            num_blocks=budget.num_blocks,
            healthy=self.healthy,
            batch_size=self._stats.batch_size.copy(),
        )

    @property
    def activity(self) -> LoopActivity:
        """Limits and requests at this moment."""
        budget = self._scheduler.budget
        requests = request_activities(self._scheduler.queues, time.monotonic())
        return LoopActivity(self.limits, budget.page_size, budget.num_blocks, requests)

    # One turn of the loop.

    async def _serve(self) -> None:
        """One decision: one exchange with the KV manager, one run. Sleeps if there are no requests."""
        if self._scheduler.queues.is_empty:
            await self._rest()
            return
        self._stats.decisions += 1
        self._forecast.begin_run(self._stats)
        decision = self._scheduler.schedule()
        reply = await self._update_cache(decision.update)
        batch = self._scheduler.apply(decision, reply)
        if batch.requests:
            await self._runner.run(batch)
            self._forecast.end_run(self._stats)
        self._end_cancelled()

    async def _update_cache(self, update: CacheUpdate) -> CacheReply:
        """Sends a message to the present KV manager."""
        return await self._kv_cache.update(update)

    async def _rest(self) -> None:
        """Sends pending releases, once, and sleeps until a request arrives."""
        self._wake.clear()
        budget = self._scheduler.budget
        if budget.has_releases and self._can_flush and not await self._is_woken_soon():
            self._can_flush = False
            update = budget.take_update([])
            budget.apply_reply(update, await self._update_cache(update))
        await self._wake.wait()
        self._can_flush = True

    async def _is_woken_soon(self) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(self._flush_after_s):
                return await self._wake.wait()
        return False

    # Ends that are not the model's.

    def _cancel(self, request: ScheduledRequest) -> None:
        if request.outputs.closed or request.is_cancelled:
            return
        request.is_cancelled = True
        self._delivery.cancel(request)
        if self._scheduler.queues.is_waiting(request):
            self._end_as_cancelled(request)
        else:
            self._runner.interrupt()
        self._wake.set()

    def _end_cancelled(self) -> None:
        for request in [r for r in self._scheduler.queues.running.values() if r.is_cancelled]:
            self._end_as_cancelled(request)

    def _end_as_cancelled(self, request: ScheduledRequest) -> None:
        request.context.status = GenerationStatus.CANCELLED
        self._scheduler.end(request)

    def _fail_all(self, error: Exception) -> None:
        for request in self._scheduler.queues.all():
            self._scheduler.fail(request, error)

    def _on_worker_failure(self, error: WorkerGroupError) -> None:
        """The cache is lost with the workers: running requests compute their tokens again, as a prompt."""
        quarantine = self._scheduler.quarantine
        self._stats.healthy = False
        self._delivery.deliver_missing()
        self._end_cancelled()
        poison = quarantine.attribute_failure()
        if poison is not None:
            logger.error("Request %s takes the workers down: it ends, the others continue.", poison.request_id)
            self._scheduler.fail(poison, error)
        self._scheduler.restart()
        self._recovery.is_needed = self._recovery.recover is not None
        if self._recovery.is_needed and not quarantine.must_fail_all:
            logger.warning("The worker group failed (%s); bringing it back.", error)
            return
        logger.error("The worker group failed (%s); all streams end.", error)
        quarantine.reset_failures()
        self._fail_all(error)

    def _on_recovered(self, kv_cache: KVCacheClient | None) -> None:
        self._kv_cache = kv_cache or self._kv_cache
        self._scheduler.budget.reset(self._kv_cache.page_size, self._kv_cache.num_blocks)


def check_request(context: TextContext, scheduler: Scheduler) -> None:
    """Refuses a request that could never be served.

    Raises:
        InputError: Its id is in use, or it asks for more choices than may run and wait.
        InsufficientBlocksError: Its prompt is larger than the whole cache.
    """
    budget, limits, num_tokens = scheduler.budget, scheduler.limits, len(context.tokens)
    assert num_tokens > 0, "a request without a single token"
    assert context.remaining_new_tokens > 0, "a request that may not generate a token"
    if context.request_id in scheduler.queues:
        raise InputError(
            f"A request with the id {context.request_id} is in progress; ids must be unique.", param="request_id"
        )
    if budget.exceeds_cache(num_tokens):
        raise insufficient_blocks(num_tokens, budget.page_size, budget.num_blocks)
    num_choices, limit = 1 + context.num_siblings, limits.max_queued_requests + limits.max_batch_size
    if num_choices > limit:
        raise InputError(
            f"The request asks for {num_choices} choices at once, and this server takes {limit} at most, running "
            f"and waiting. Ask for {limit} choices or fewer (n times the number of prompts).",
            param="n",
        )
