"""BatchRunner: runs a batch, delivers its steps, extends the run or ends it early."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol

from max_ray.interfaces import CacheReply, CacheUpdate, TextContext, TextGenerationInputs
from max_ray.scheduler.decision import Batch
from max_ray.scheduler.delivery import Delivery, StepOutputs
from max_ray.scheduler.run_extender import RunExtender
from max_ray.scheduler.scheduler import Scheduler


class TextPipeline(Protocol):
    """What the scheduling loop needs of a pipeline."""

    def stream(self, inputs: TextGenerationInputs[TextContext]) -> AsyncIterator[StepOutputs]:
        """Runs the batch and updates its contexts in place.

        Yields:
            For each step, outputs of the requests that gained tokens or ended. A prompt chunk that did not sample
            advances its context without an output.

        Raises:
            WorkerGroupError: A worker died.
        """

    def interrupt(self) -> None:
        """Ends the run in progress at the next step boundary. Returns at once."""

    @property
    def can_extend(self) -> bool:
        """Whether `extend` reaches the workers."""

    def extend(self, num_steps: int) -> None:
        """Raises the steps of the run in progress to `num_steps` in all, for which its contexts have blocks.

        Returns at once. A run that has ended stays ended.
        """


class BatchRunner:
    """One run at a time.

    Args:
        pipeline: What runs the batches.
        scheduler: What schedules extensions.
        delivery: Where the outputs go.
        update_cache: Sends a message to the KV manager.
    """

    def __init__(
        self,
        pipeline: TextPipeline,
        scheduler: Scheduler,
        delivery: Delivery,
        update_cache: Callable[[CacheUpdate], Awaitable[CacheReply]],
    ) -> None:
        self._pipeline = pipeline
        self._scheduler = scheduler
        self._delivery = delivery
        self._update_cache = update_cache
        self._stats = scheduler.stats
        self._max_num_steps = scheduler.limits.max_num_steps
        self._can_interrupt = False

    async def run(self, batch: Batch) -> None:
        """Runs a batch to its end.

        Raises:
            WorkerGroupError: A worker died.
        """
        inputs = TextGenerationInputs(batches=[[r.context for r in batch.requests]], num_steps=batch.num_steps)
        quarantine = self._scheduler.quarantine
        self._stats.runs += 1
        self._can_interrupt = batch.num_steps > 1
        quarantine.begin_run(batch.requests)
        run = RunExtender(batch)
        try:
            async for outputs in self._pipeline.stream(inputs):
                quarantine.note_step()
                self._read(run, outputs)
            quarantine.end_run()
        finally:
            self._can_interrupt = False
            await run.settle()

    def interrupt(self) -> None:
        """Ends a run of several steps at the next step boundary."""
        if self._can_interrupt:
            self._can_interrupt = False
            self._stats.interrupts += 1
            self._pipeline.interrupt()

    def interrupt_for_waiting(self) -> None:
        """Ends a long run early if a waiting request could join the next one. A run without requests ends by itself."""
        if self._can_interrupt and self._scheduler.queues.running and self._scheduler.admission.could_admit():
            self.interrupt()

    def _read(self, run: RunExtender, outputs: StepOutputs) -> None:
        """Delivers one step, and starts to extend the run when that is due."""
        self._stats.steps += 1
        self._stats.batch_size.observe(len(outputs))
        self._stats.healthy = True
        ends, is_ragged = self._delivery.deliver(outputs)
        run.num_read += 1
        if is_ragged:
            run.is_ragged = True
        if ends:
            self.interrupt_for_waiting()
        if self._can_interrupt and run.is_due(self._max_num_steps) and self._pipeline.can_extend:
            run.start(self._extend(run))

    async def _extend(self, run: RunExtender) -> None:
        """Makes the next decision while the run continues."""
        num_steps = self._max_num_steps
        decision = self._scheduler.schedule_extension(run.requests, run.tokens_left, num_steps)
        if decision is None:
            return
        self._stats.extensions += 1
        reply = await self._update_cache(decision.update)
        if self._scheduler.apply_extension(decision, reply) and self._can_interrupt:
            run.num_steps += num_steps
            run.is_tried = False
            self._pipeline.extend(run.num_steps)
