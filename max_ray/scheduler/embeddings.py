"""EmbeddingsLoop: continuous batching for texts that take one step each. Receive, form a step, run it, reply.

A job is what one client sent: a list of texts. While a step runs, jobs gather; the next step takes a text of each in
turn until its limits are reached, so a short job does not wait for a long one to end. Everything happens on one event
loop; a job whose future was cancelled takes no more part.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from max_ray.errors import MaxRayError, QueueFullError, StaleLeaseError, WorkerGroupError
from max_ray.interfaces import EmbeddingsContext, EmbeddingsGenerationOutput, RequestID
from max_ray.log import get_logger
from max_ray.scheduler.recovery import Recover, Recovery
from max_ray.scheduler.row import SchedulerLimits
from max_ray.scheduler.stats import CompletionRate, SchedulerStats

logger = get_logger(__name__)

MAX_FAILURES = 2  # of a step, one after another
MAX_GUILTY = 2  # texts found guilty one after another: the reason is no single text
Outputs = dict[RequestID, EmbeddingsGenerationOutput]


class TextEmbedder(Protocol):
    """What the loop needs of a pipeline."""

    async def embed(self, contexts: Sequence[EmbeddingsContext]) -> Outputs:
        """One step. Raises WorkerGroupError when a worker dies."""


@dataclass(eq=False, slots=True)
class _Job:
    """num_taken: texts that are in a step or past it. `outputs` fill up in any order."""

    contexts: Sequence[EmbeddingsContext]
    future: asyncio.Future[list[EmbeddingsGenerationOutput]]
    arrival: float
    num_taken: int = 0
    outputs: Outputs = field(default_factory=dict)

    @property
    def num_waiting(self) -> int:
        """Texts that are not in a step yet; none once nobody waits for them."""
        return 0 if self.future.done() else len(self.contexts) - self.num_taken


class EmbeddingsLoop:
    """One former of batches for a worker group.

    limits: max_batch_size texts and max_batch_input_tokens tokens a step (a longer text runs alone);
    max_queued_requests jobs that may wait.
    recover: called after a WorkerGroupError; it brings the workers back, and the step is run again; when that fails
    too, each of its texts alone. A text that fails alone ends its job. Without `recover`, or when texts go on failing,
    every job gets the error.
    """

    def __init__(
        self,
        pipeline: TextEmbedder,
        limits: SchedulerLimits,
        recover: Recover | None = None,
    ) -> None:
        self.limits = limits
        self._pipeline = pipeline
        self._recovery = Recovery(recover)
        self._reported: WorkerGroupError | None = None
        self._jobs: dict[_Job, None] = {}
        self._num_running = 0
        self._stats = SchedulerStats()
        self._completions = CompletionRate()
        self._wake = asyncio.Event()
        self._num_guilty = 0
        self._is_stopped = False

    async def run(self) -> None:
        """Serves until it is cancelled; then every open job gets an error. Call it once."""
        try:
            while True:
                await self._turn()
        finally:
            self._is_stopped = True
            self._fail_all(_stopping())

    def submit(self, contexts: Sequence[EmbeddingsContext]) -> asyncio.Future[list[EmbeddingsGenerationOutput]]:
        """Queues a job; the future gives its vectors in the order of `contexts`, and cancelling it ends the job.
        Raises QueueFullError at the call."""
        assert contexts, "a job without a text"
        if self._is_stopped:
            raise _stopping()
        self._check_room()
        job = _Job(contexts, asyncio.get_running_loop().create_future(), time.monotonic())
        self._jobs[job] = None
        self._stats.prompt_tokens += sum(len(context.tokens) for context in contexts)
        self._wake.set()
        return job.future

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
        """A snapshot; `queued` and `running` count texts."""
        oldest = next(iter(self._jobs), None)
        return replace(
            self._stats,
            queued=sum(job.num_waiting for job in self._jobs),
            running=self._num_running,
            oldest_waiting_s=time.monotonic() - oldest.arrival if oldest else 0.0,
            healthy=self.healthy,
        )

    async def _turn(self) -> None:
        """Whatever goes wrong, every job gets an answer and the loop goes on."""
        try:
            if self._reported is not None:
                self._note_failure(self._reported)
            if self._recovery.is_needed:
                await self._bring_back()
            step = self._next_step()
            if step:
                await self._execute(step)
            else:
                self._wake.clear()
                await self._wake.wait()
        except Exception as error:
            logger.exception("The embeddings loop failed; all its jobs end with this error.")
            self._stats.healthy = self._stats.healthy and not isinstance(error, StaleLeaseError)
            self._fail_all(error)

    def _next_step(self) -> list[tuple[_Job, EmbeddingsContext]]:
        """A text of each job in turn, the oldest first, within the limits."""
        for job in [job for job in self._jobs if job.future.done()]:
            self._stats.cancelled += 1
            del self._jobs[job]
        step: list[tuple[_Job, EmbeddingsContext]] = []
        num_tokens = 0
        turns = deque(job for job in self._jobs if job.num_waiting)
        while turns and len(step) < self.limits.max_batch_size:
            job = turns.popleft()
            context = job.contexts[job.num_taken]
            if step and num_tokens + len(context.tokens) > self.limits.max_batch_input_tokens:
                continue
            job.num_taken += 1
            step.append((job, context))
            num_tokens += len(context.tokens)
            if job.num_waiting:
                turns.append(job)
        return step

    async def _execute(self, step: list[tuple[_Job, EmbeddingsContext]]) -> None:
        self._num_running = len(step)
        try:
            outputs = await self._embed([context for _, context in step])
        except WorkerGroupError as error:
            await self._blame(step, error)
            return
        finally:
            self._num_running = 0
        for job, context in step:
            job.outputs[context.request_id] = outputs[context.request_id]
            if len(job.outputs) == len(job.contexts):
                self._finish(job)

    async def _blame(self, step: list[tuple[_Job, EmbeddingsContext]], error: WorkerGroupError) -> None:
        """Finds the text that takes the workers down, and ends its job. Raises `error` where it is none of them."""
        if self._recovery.is_needed:
            raise error
        if len(step) > 1:
            for one in step:
                if not one[0].future.done():
                    await self._execute([one])
            return
        self._num_guilty += 1
        if self._recovery.recover is None or self._num_guilty > MAX_GUILTY:
            self._num_guilty = 0
            raise error
        logger.error("A text takes the workers down: its job ends, the others go on.")
        self._stats.failed += 1
        ((job, _),) = step
        self._jobs.pop(job, None)
        if not job.future.done():
            job.future.set_exception(error)

    async def _embed(self, contexts: list[EmbeddingsContext]) -> Outputs:
        """Runs the step; after each failure the workers are brought back. Raises the last WorkerGroupError, or why the
        workers are not back."""
        num_failures = 0
        while True:
            self._stats.runs += 1
            try:
                outputs = await self._pipeline.embed(contexts)
            except WorkerGroupError as error:
                num_failures += 1
                self._note_failure(error)
                await self._bring_back()
                if num_failures == MAX_FAILURES:
                    raise
                continue
            self._stats.steps += 1
            self._num_guilty = 0
            return outputs

    def _note_failure(self, error: WorkerGroupError) -> None:
        """Raises `error` where nobody can bring the workers back."""
        self._stats.healthy = False
        self._reported = None
        if self._recovery.recover is None:
            raise error
        logger.warning("The worker group failed (%s); bringing it back.", error)
        self._recovery.is_needed = True

    async def _bring_back(self) -> None:
        """Attempts until the workers are back. Raises where jobs need not wait any longer."""
        is_back = False
        while not is_back:
            self._stats.recoveries += 1
            is_back, _ = await self._recovery.attempt()
        self._reported = None  # what was said of the workers before
        self._stats.healthy = True

    def _finish(self, job: _Job) -> None:
        self._jobs.pop(job, None)
        if job.future.done():
            self._stats.cancelled += 1
            return
        self._stats.finished += 1
        self._completions.note(time.monotonic())
        job.future.set_result([job.outputs[context.request_id] for context in job.contexts])

    def _fail_all(self, error: Exception) -> None:
        jobs, self._jobs = self._jobs, {}
        for job in jobs:
            if not job.future.done():
                self._stats.failed += 1
                job.future.set_exception(error)

    def _check_room(self) -> None:
        num_waiting = sum(job.num_taken == 0 and not job.future.done() for job in self._jobs)
        if num_waiting >= self.limits.max_queued_requests + self.limits.max_batch_size:
            self._stats.rejected += 1
            retry_after = self._completions.retry_after(num_waiting, time.monotonic())
            raise QueueFullError(
                f"{num_waiting} requests are waiting already, as many as this server lets wait. "
                f"Try again in {retry_after:.0f} s.",
                retry_after=retry_after,
            )


def _stopping() -> MaxRayError:
    return MaxRayError("The server is stopping; send the request to another one.")
