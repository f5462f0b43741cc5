"""GenerationLoop: the one former of batches for a worker group. Receive, schedule, execute, reply, release.

One task runs `run()`; requests come in through `submit()`. Everything happens on one event loop, so between two
awaits nothing changes under our feet. The state of a request is its context and its row in the Batcher:

    submit -> waiting -> running -> ended: finished, failed, cancelled or disconnected, all through Batcher.end()

While a run is in progress, its contexts belong to the pipeline: a cancelled row leaves `running` at the run's end,
which `interrupt()` brings about at the next step boundary. A run whose rows would be those of the next one too does
not end: when half of its steps are read, it gets as many as a run may have, and the blocks for them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

from max_ray.errors import InputError, MaxRayError, QueueFullError, StaleLeaseError, WorkerGroupError
from max_ray.interfaces import (
    GenerationStatus,
    KVLedger,
    RequestID,
    TextContext,
    TextGenerationInputs,
    TextGenerationOutput,
)
from max_ray.kv_cache import insufficient_blocks
from max_ray.log import get_logger
from max_ray.scheduler.batch import Batcher
from max_ray.scheduler.channel import TokenStream
from max_ray.scheduler.longer_run import LongerRun
from max_ray.scheduler.recovery import MAX_FAILURES, Recover, Recovery
from max_ray.scheduler.row import Batch, Row, SchedulerLimits
from max_ray.scheduler.stats import CompletionRate, SchedulerStats

logger = get_logger(__name__)

MAX_GUILTY = 2  # requests found guilty one after another: the reason is no single request
StepOutputs = dict[RequestID, TextGenerationOutput]


class TextPipeline(Protocol):
    """What the loop needs of a pipeline."""

    def stream(self, inputs: TextGenerationInputs[TextContext]) -> AsyncIterator[StepOutputs]:
        """Runs the batch, updates its contexts in place and gives one dict a step, of the rows that gained something
        or ended; a chunk that did not sample advances its context silently. Raises WorkerGroupError when a worker
        dies."""

    def interrupt(self) -> None:
        """Ends the run in progress at the next step boundary; returns at once."""

    @property
    def can_extend(self) -> bool:
        """Whether `extend` reaches the workers."""

    def extend(self, num_steps: int) -> None:
        """Lets the run in progress go on to `num_steps` steps in all, for which its contexts have blocks; returns at
        once. A run that has ended stays ended."""


class GenerationLoop:
    """Continuous batching over one pipeline and one ledger.

    recover: called after a WorkerGroupError, once all contexts are reset; it brings the workers back and returns the
    ledger to use from then on, with nothing in it (None: the old one, which it has emptied). It is called again when
    it fails. Without it, after MAX_FAILURES in a row with no step between them, or when it fails as often, every
    stream gets the error. A row that fails in company and then alone is the only one to get it.

    flush_after_s: how long an idle loop keeps what it has to give back, for the first exchange of the next request to
    take along: an exchange of its own would be in that request's way.
    """

    def __init__(
        self,
        pipeline: TextPipeline,
        ledger: KVLedger,
        limits: SchedulerLimits,
        recover: Recover | None = None,
        flush_after_s: float = 0.02,
    ) -> None:
        self.limits = limits
        self._pipeline = pipeline
        self._ledger = ledger
        self._recovery = Recovery(recover)
        self._flush_after_s = flush_after_s
        self._stats = SchedulerStats()
        self._batcher = Batcher(limits, ledger.page_size, ledger.total_blocks, self._stats)
        self._completions = CompletionRate()
        self._wake = asyncio.Event()
        self._can_interrupt = False
        self._can_flush = True
        self._failures = 0
        self._num_guilty = 0
        self._rows_in_run: list[Row] = []
        self._reported: WorkerGroupError | None = None
        self._is_stopped = False

    async def run(self) -> None:
        """Serves until it is cancelled; then every open stream gets an error. Call it once."""
        try:
            while True:
                await self._turn()
        finally:
            self._is_stopped = True
            self._fail_all(MaxRayError("The server is stopping; send the request to another one."))

    def submit(self, context: TextContext) -> TokenStream:
        """Queues a request. Its tokens come from the stream, one output a step; closing it cancels the request.

        Raises at the call: QueueFullError, InsufficientBlocksError when the prompt is larger than the whole cache,
        InputError when a request of this id is in progress, or it comes with more siblings than can ever be admitted.
        """
        self._check(context)
        row = Row(context, arrival=time.monotonic())
        self._batcher.waiting[row.key] = row
        self._wake.set()
        self._interrupt_for_waiting()
        return TokenStream(row.channel, lambda: self._cancel(row))

    def cancel(self, request_id: RequestID | str) -> None:
        """Ends a request at the next step boundary; its stream ends with the status CANCELLED. Unknown ids are fine."""
        key = str(request_id)
        row = self._batcher.waiting.get(key) or self._batcher.running.get(key)
        if row is not None:
            self._cancel(row)

    def report_failure(self, error: WorkerGroupError) -> None:
        """The workers were found dead or silent by a look from outside: the next turn brings them back."""
        self._reported = error
        self._wake.set()

    @property
    def healthy(self) -> bool:
        """False from a failure of the workers until they are back, and once the lease has gone to another replica."""
        return self._stats.healthy and not self._is_stopped

    @property
    def stats(self) -> SchedulerStats:
        """A snapshot."""
        batcher = self._batcher
        oldest = next(iter(batcher.waiting.values()), None)
        return replace(
            self._stats,
            queued=len(batcher.waiting),
            running=len(batcher.running),
            oldest_waiting_s=time.monotonic() - oldest.arrival if oldest else 0.0,
            kv_used_blocks=batcher.total_blocks - batcher.free_blocks,
            kv_total_blocks=batcher.total_blocks,
            healthy=self.healthy,
        )

    # One turn of the loop.

    async def _turn(self) -> None:
        """Whatever goes wrong, every stream gets an answer and the loop goes on."""
        try:
            await self._serve_or_restart()
        except Exception as error:
            logger.exception("The scheduling loop failed; all its streams end with this error.")
            self._stats.healthy = self._stats.healthy and not isinstance(error, StaleLeaseError)
            self._fail_all(error)

    async def _serve_or_restart(self) -> None:
        if self._recovery.is_needed:
            await self._bring_back()
            return
        try:
            self._raise_reported()
            await (self._rest() if self._batcher.is_idle else self._serve())
        except WorkerGroupError as error:
            self._reset(error)

    def _raise_reported(self) -> None:
        error, self._reported = self._reported, None
        if error is not None:
            raise error

    async def _serve(self) -> None:
        """One decision: one exchange with the ledger, one run."""
        self._stats.decisions += 1
        decision = self._batcher.decide()
        reply = await self._ledger.exchange(decision.leases)
        batch = self._batcher.apply(decision, reply)
        if batch.rows:
            await self._execute(batch)
        self._end_cancelled()

    async def _execute(self, batch: Batch) -> None:
        contexts = {row.context.request_id: row.context for row in batch.rows}
        inputs = TextGenerationInputs(batches=[contexts], num_steps=batch.num_steps)
        self._stats.runs += 1
        self._rows_in_run = batch.rows
        self._can_interrupt = batch.num_steps > 1
        longer = LongerRun(batch)
        try:
            async for outputs in self._pipeline.stream(inputs):
                self._note_step()
                self._deliver(outputs)
                longer.num_read += 1
                if self._can_interrupt and longer.is_due(self.limits.max_num_steps) and self._pipeline.can_extend:
                    longer.start(self._extend(longer))
            self._rows_in_run = []
        finally:
            self._can_interrupt = False
            await longer.settle()

    async def _extend(self, longer: LongerRun) -> None:
        """The next decision, made while the run goes on; it must be over before the one after."""
        decision = self._batcher.decide_extension(longer.rows, longer.steps_left)
        if decision is None:
            return
        self._stats.extensions += 1
        reply = await self._ledger.exchange(decision.leases)
        if self._batcher.apply_extension(decision, reply) and self._can_interrupt:
            longer.num_steps += self.limits.max_num_steps
            longer.is_tried = False
            self._pipeline.extend(longer.num_steps)

    async def _rest(self) -> None:
        """Nothing to do: gives back what is left to give, once, and sleeps until a request comes."""
        self._wake.clear()
        if self._batcher.has_releases and self._can_flush and not await self._is_woken_soon():
            self._can_flush = False
            leases = self._batcher.flush()
            self._batcher.note_reply(leases, await self._ledger.exchange(leases))
        await self._wake.wait()
        self._can_flush = True

    async def _is_woken_soon(self) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(self._flush_after_s):
                return await self._wake.wait()
        return False

    # What a step brings.

    def _note_step(self) -> None:
        self._stats.steps += 1
        self._stats.healthy = True
        self._failures = self._num_guilty = 0

    def _deliver(self, outputs: StepOutputs) -> None:
        for request_id, output in outputs.items():
            row = self._batcher.running.get(request_id.value)
            if row is not None:
                self._reply(row, output)

    def _reply(self, row: Row, output: TextGenerationOutput) -> None:
        if output.failure is not None:
            self._batcher.fail(row, output.failure)
            return self._interrupt_for_waiting()
        row.num_delivered += len(output.tokens)
        row.num_failures = 0 if output.tokens else row.num_failures
        self._stats.generated_tokens += len(output.tokens)
        row.channel.push(output)
        if output.is_done:
            self._stats.finished += 1
            self._completions.note(time.monotonic())
            self._batcher.end(row)
            self._interrupt_for_waiting()

    def _interrupt_for_waiting(self) -> None:
        """Ends a long run early when somebody who waits could join the next one. A run without rows ends by itself."""
        if self._can_interrupt and self._batcher.running and self._batcher.could_admit():
            self._interrupt()

    def _interrupt(self) -> None:
        if self._can_interrupt:
            self._can_interrupt = False
            self._stats.interrupts += 1
            self._pipeline.interrupt()

    # Ends that are not the model's.

    def _cancel(self, row: Row) -> None:
        if row.channel.closed or row.is_cancelled:
            return
        row.is_cancelled = True
        self._stats.cancelled += 1
        row.channel.push(_cancelled(row.context))
        if self._batcher.waiting.get(row.key) is row:
            self._end_row_as_cancelled(row)
        else:
            self._interrupt()
        self._wake.set()

    def _end_cancelled(self) -> None:
        for row in [row for row in self._batcher.running.values() if row.is_cancelled]:
            self._end_row_as_cancelled(row)

    def _end_row_as_cancelled(self, row: Row) -> None:
        row.context.status = GenerationStatus.CANCELLED
        self._batcher.end(row)

    def _fail_all(self, error: Exception) -> None:
        for row in [*self._batcher.running.values(), *self._batcher.waiting.values()]:
            self._batcher.fail(row, error)

    def _reset(self, error: WorkerGroupError) -> None:
        """The workers are gone, and the cache with them: prefill again what was running, tokens kept."""
        self._failures += 1
        self._stats.healthy = False
        for row in list(self._batcher.running.values()):
            self._deliver_missing(row)
        self._end_cancelled()
        self._blame(error)
        self._batcher.restart()
        self._recovery.is_needed = self._recovery.recover is not None
        if not self._recovery.is_needed or self._failures >= MAX_FAILURES:
            logger.error("The worker group failed (%s); all streams end.", error)
            self._failures = 0
            self._fail_all(error)
        else:
            logger.warning("The worker group failed (%s); bringing it back.", error)

    async def _bring_back(self) -> None:
        """One attempt. Raises where requests need not wait for the next one."""
        self._stats.recoveries += 1
        is_back, ledger = await self._recovery.attempt()
        if is_back:
            self._reported = None  # what was said of the workers before
            self._ledger = ledger or self._ledger
            self._batcher.use_ledger(self._ledger.page_size, self._ledger.total_blocks)
            self._stats.healthy = True

    def _blame(self, error: WorkerGroupError) -> None:
        """Notes who took part in the run that failed, and ends the row that fails alone, too: it was the reason."""
        rows, self._rows_in_run = self._rows_in_run, []
        for row in rows:
            row.num_failures += 1
        if len(rows) == 1 and rows[0].is_guilty:
            logger.error("The request %s takes the workers down: it ends, the others go on.", rows[0].key)
            self._batcher.fail(rows[0], error)
            self._num_guilty += 1
            self._failures = MAX_FAILURES if self._num_guilty > MAX_GUILTY else 0

    def _deliver_missing(self, row: Row) -> None:
        """Tokens that a dying pipeline had put into the context and not handed out."""
        generated = row.context.tokens.generated
        if len(generated) > row.num_delivered:
            self._reply(
                row,
                TextGenerationOutput(
                    request_id=row.context.request_id,
                    tokens=generated[row.num_delivered :].tolist(),
                    final_status=row.context.status,
                    num_cached_tokens=row.context.cached_prefix_length,
                ),
            )

    # Admission.

    def _check(self, context: TextContext) -> None:
        batcher = self._batcher
        key = context.request_id.value
        assert len(context.tokens) > 0, "a request without a single token"
        assert context.remaining_new_tokens > 0, "a request that may not generate a token"
        if self._is_stopped:
            raise MaxRayError("The server is stopping; send the request to another one.")
        if key in batcher.waiting or key in batcher.running:
            raise InputError(f"A request with the id {key} is in progress; ids must be unique.", param="request_id")
        if -(-len(context.tokens) // batcher.page_size) > batcher.total_blocks:
            raise insufficient_blocks(len(context.tokens), batcher.page_size, batcher.total_blocks)
        self._check_room(1 + context.num_siblings)

    def _check_room(self, num_coming: int) -> None:
        """For a request of so many contexts, all together."""
        batcher, limits = self._batcher, self.limits
        at_most = limits.max_queued_requests + limits.max_batch_size
        if num_coming > at_most:
            raise InputError(
                f"The request asks for {num_coming} choices at once, and this server takes {at_most} at most, running "
                f"and waiting. Ask for {at_most} choices or fewer (n times the number of prompts).",
                param="n",
            )
        free_rows = max(0, limits.max_batch_size - len(batcher.running))
        if len(batcher.waiting) + num_coming > limits.max_queued_requests + free_rows:
            self._stats.rejected += 1
            retry_after = self._completions.retry_after(len(batcher.waiting), time.monotonic())
            raise QueueFullError(
                f"{len(batcher.waiting)} requests are waiting already, and {num_coming} more would be too many. "
                f"Try again in {retry_after:.0f} s.",
                retry_after=retry_after,
            )


def _cancelled(context: TextContext) -> TextGenerationOutput:
    return TextGenerationOutput(
        request_id=context.request_id,
        final_status=GenerationStatus.CANCELLED,
        num_cached_tokens=context.cached_prefix_length,
    )
