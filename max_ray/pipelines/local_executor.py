"""LocalExecutor: runs are run in this process, by one rank, on one thread of their own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor

from max_ray.interfaces import RunRequest, StepOutput
from max_ray.pipelines.runner import ModelRunner


class LocalExecutor:
    """An Executor around a ModelRunner. `interrupt` may come from any thread."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self._lock = threading.Lock()
        self._interrupted: set[int] = set()
        self._running: int | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="max_ray-model")

    def execute(self, request: RunRequest) -> Iterator[StepOutput]:
        with self._lock:
            self._running = request.run_id
            try:
                yield from self.runner.run(request, lambda: request.run_id in self._interrupted)
            finally:
                self._running = None
                self._interrupted.discard(request.run_id)

    async def stream(self, request: RunRequest) -> AsyncIterator[StepOutput]:
        steps = self.execute(request)
        loop = asyncio.get_running_loop()
        try:
            while (output := await loop.run_in_executor(self._thread, next, steps, None)) is not None:
                yield output
        finally:
            # a generator that is still inside a step cannot be closed from here: the thread does it after the step
            self.interrupt(request.run_id)
            self._thread.submit(steps.close)  # type: ignore[attr-defined]

    def interrupt(self, run_id: int) -> None:
        if self._running == run_id:
            self._interrupted.add(run_id)

    async def flush(self, released: list[str]) -> None:
        """Forgets the block tables of requests that ended, outside any run."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self.runner.release, released)
