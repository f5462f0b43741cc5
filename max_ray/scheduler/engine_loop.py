"""EngineLoop: base of the loops that serve one worker group. Turns, failures, recovery, and the limit of the queue."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod

from max_ray.errors import MaxRayError, ServerStoppingError, StaleLeaseError, WorkerGroupError
from max_ray.interfaces import KVCacheClient
from max_ray.log import get_logger
from max_ray.scheduler.activity import LoopActivity
from max_ray.scheduler.decision import SchedulerLimits
from max_ray.scheduler.recovery import Recover, Recovery
from max_ray.scheduler.stats import CompletionRate, SchedulerStats

logger = get_logger(__name__)


class EngineLoop(ABC):
    """One task runs `run()`; requests arrive by calls on the same event loop, between two awaits.

    Args:
        limits: Limits of batches and of the queue.
        recover: Brings the workers back after a WorkerGroupError; None if failures are final.
    """

    def __init__(self, limits: SchedulerLimits, recover: Recover | None) -> None:
        self.limits = limits
        self._recovery = Recovery(recover)
        self._stats = SchedulerStats()
        self._completions = CompletionRate()
        self._wake = asyncio.Event()
        self._reported: WorkerGroupError | None = None
        self._is_stopped = False

    async def run(self) -> None:
        """Serves until it is cancelled; then every open request gets an error. Call it once."""
        try:
            while True:
                await self._turn()
        finally:
            self._is_stopped = True
            self._fail_all(stopping_error())

    def report_failure(self, error: WorkerGroupError) -> None:
        """The workers were found dead or silent from outside: the next turn brings them back."""
        self._reported = error
        self._wake.set()

    def stop(self) -> None:
        """The server ends: every open request gets an error, and no other is taken."""
        self._is_stopped = True
        self._fail_all(stopping_error())

    @property
    def healthy(self) -> bool:
        """False from a failure of the workers until they are back, and once another replica owns the worker group."""
        return self._stats.healthy and not self._is_stopped

    @property
    @abstractmethod
    def stats(self) -> SchedulerStats:
        """A snapshot."""

    @property
    @abstractmethod
    def activity(self) -> LoopActivity:
        """Limits and requests at this moment."""

    @abstractmethod
    async def _serve(self) -> None:
        """One turn with healthy workers: a step or a run, or sleep until `_wake` is set.

        Raises:
            WorkerGroupError: A worker died.
        """

    @abstractmethod
    def _fail_all(self, error: Exception) -> None:
        """Ends all open requests with `error`."""

    @abstractmethod
    def _on_worker_failure(self, error: WorkerGroupError) -> None:
        """The workers failed: requests recovery, or ends requests."""

    @abstractmethod
    def _on_recovered(self, kv_cache: KVCacheClient | None) -> None:
        """The workers are back. `kv_cache`: the client of an empty KV manager; None: the one before, emptied."""

    async def _turn(self) -> None:
        """Whatever goes wrong, every request gets an answer and the loop continues."""
        try:
            await self._serve_or_recover()
        except Exception as error:
            logger.exception("%s failed; all its requests end with this error.", type(self).__name__)
            self._end_all(error)

    async def _serve_or_recover(self) -> None:
        if self._recovery.is_needed:
            await self._recover_once()
            return
        try:
            reported, self._reported = self._reported, None
            if reported is not None:
                raise reported
            await self._serve()
        except WorkerGroupError as error:
            self._on_worker_failure(error)

    async def _recover_once(self) -> None:
        """One attempt. Raises if requests need not wait for the next one."""
        self._stats.recoveries += 1
        is_back, kv_cache = await self._recovery.attempt()
        if is_back:
            self._reported = None  # it was said of the workers before
            self._on_recovered(kv_cache)
            self._stats.healthy = True

    def _end_all(self, error: Exception) -> None:
        """Ends all requests with an error that no recovery helps against."""
        self._stats.healthy = self._stats.healthy and not isinstance(error, StaleLeaseError)
        self._fail_all(error)


def stopping_error() -> MaxRayError:
    """What open and new requests get when the server ends."""
    return ServerStoppingError("The server is stopping; send the request to another one.")
