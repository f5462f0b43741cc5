"""EmbeddingsLoop: continuous batching for texts that take one step each. Receive, build a step, run it, reply.

A job is what one client sent: a list of texts. While a step runs, jobs gather. The next step takes a text of each job
in turn until its limits are reached, so a short job does not wait for a long one. Everything happens on one event loop.
A job whose future was cancelled takes no further part.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from max_ray.errors import QueueFullError, WorkerGroupError
from max_ray.interfaces import EmbeddingsContext, EmbeddingsGenerationOutput, KVCacheClient, RequestID
from max_ray.log import get_logger
from max_ray.scheduler.activity import LoopActivity
from max_ray.scheduler.decision import SchedulerLimits
from max_ray.scheduler.engine_loop import EngineLoop, stopping_error
from max_ray.scheduler.recovery import Recover
from max_ray.scheduler.stats import SchedulerStats

logger = get_logger(__name__)

MAX_STEP_FAILURES = 2
"""Consecutive failures of a step after which its texts run one by one."""
MAX_POISON_TEXTS = 2
"""Consecutive poison texts after which no single text is held responsible."""

Outputs = dict[RequestID, EmbeddingsGenerationOutput]


class TextEmbedder(Protocol):
    """What the loop needs of a pipeline."""

    async def embed(self, contexts: Sequence[EmbeddingsContext]) -> Outputs:
        """Runs one step.

        Raises:
            WorkerGroupError: A worker died.
        """


@dataclass(eq=False, slots=True)
class _Job:
    """Texts that one client sent.

    Attributes:
        contexts: The texts.
        future: Gets their vectors.
        arrival: Time of arrival, in monotonic seconds.
        num_taken: Texts that are in a step or done.
        outputs: Vectors so far, in any order.
    """

    contexts: Sequence[EmbeddingsContext]
    future: asyncio.Future[list[EmbeddingsGenerationOutput]]
    arrival: float
    num_taken: int = 0
    outputs: Outputs = field(default_factory=dict)

    @property
    def num_waiting(self) -> int:
        """Texts that are not in a step yet; 0 once the job has ended."""
        return 0 if self.future.done() else len(self.contexts) - self.num_taken


class EmbeddingsLoop(EngineLoop):
    """Continuous batching of texts for one worker group.

    Args:
        pipeline: What runs a step.
        limits: max_batch_size texts and max_batch_input_tokens tokens a step (a longer text runs alone);
            max_queued_requests jobs that may wait.
        recover: Called after a WorkerGroupError. It brings the workers back, and the step runs again; if it fails
            again, each of its texts runs alone. A text that fails alone ends its job. Without `recover`, or if texts
            keep failing, every job gets the error.
    """

    def __init__(self, pipeline: TextEmbedder, limits: SchedulerLimits, recover: Recover | None = None) -> None:
        super().__init__(limits, recover)
        self._pipeline = pipeline
        self._jobs: dict[_Job, None] = {}
        self._num_running = 0
        self._num_poison = 0

    def submit(self, contexts: Sequence[EmbeddingsContext]) -> asyncio.Future[list[EmbeddingsGenerationOutput]]:
        """Queues a job.

        Returns:
            Its vectors, in the order of `contexts`. Cancelling the future ends the job.

        Raises:
            QueueFullError: Too many jobs wait.
        """
        assert contexts, "a job without a text"
        if self._is_stopped:
            raise stopping_error()
        self._check_room()
        job = _Job(contexts, asyncio.get_running_loop().create_future(), time.monotonic())
        self._jobs[job] = None
        self._stats.prompt_tokens += sum(len(context.tokens) for context in contexts)
        self._wake.set()
        return job.future

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
            batch_size=self._stats.batch_size.copy(),
        )

    @property
    def activity(self) -> LoopActivity:
        """Limits alone: jobs are not named."""
        return LoopActivity(self.limits)

    async def _serve(self) -> None:
        """One step; sleeps if no text waits."""
        step = self._next_step()
        if not step:
            self._wake.clear()
            await self._wake.wait()
            return
        try:
            await self._execute(step)
        except WorkerGroupError as error:
            logger.exception("Recovery did not help; all jobs end with this error.")
            self._end_all(error)

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
            await self._attribute_failure(step, error)
            return
        finally:
            self._num_running = 0
        for job, context in step:
            job.outputs[context.request_id] = outputs[context.request_id]
            if len(job.outputs) == len(job.contexts):
                self._finish(job)

    async def _attribute_failure(self, step: list[tuple[_Job, EmbeddingsContext]], error: WorkerGroupError) -> None:
        """Finds the text that takes the workers down, and ends its job. Raises `error` if no single text does."""
        if self._recovery.is_needed:
            raise error
        if len(step) > 1:
            for one in step:
                if not one[0].future.done():
                    await self._execute([one])
            return
        self._num_poison += 1
        if self._recovery.recover is None or self._num_poison > MAX_POISON_TEXTS:
            self._num_poison = 0
            raise error
        logger.error("A text takes the workers down: its job ends, the others continue.")
        self._stats.failed += 1
        ((job, _),) = step
        self._jobs.pop(job, None)
        if not job.future.done():
            job.future.set_exception(error)

    async def _embed(self, contexts: list[EmbeddingsContext]) -> Outputs:
        """Runs the step; after each failure, brings the workers back.

        Raises:
            WorkerGroupError: The last failure of the step.
            Exception: The reason why the workers are not back.
        """
        num_failures = 0
        while True:
            self._stats.runs += 1
            try:
                outputs = await self._pipeline.embed(contexts)
            except WorkerGroupError as error:
                num_failures += 1
                self._on_worker_failure(error)
                while self._recovery.is_needed:
                    await self._recover_once()
                if num_failures == MAX_STEP_FAILURES:
                    raise
                continue
            self._stats.steps += 1
            self._stats.batch_size.observe(len(contexts))
            self._num_poison = 0
            return outputs

    def _on_worker_failure(self, error: WorkerGroupError) -> None:
        """Requests recovery. Raises `error` if failures are final."""
        self._stats.healthy = False
        self._reported = None
        if self._recovery.recover is None:
            raise error
        logger.warning("The worker group failed (%s); bringing it back.", error)
        self._recovery.is_needed = True

    def _on_recovered(self, kv_cache: KVCacheClient | None) -> None:
        """Nothing to do: a text keeps nothing in a cache."""

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
