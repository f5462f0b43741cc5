"""LocalExecutor: runs are run in this process, one thread a rank.

With one rank the run happens in the caller's thread. With more, rank 0 stays there and the others have threads of
their own; they meet in the collectives, exactly as worker processes do.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from max_ray.interfaces import RunExtension, Runner, RunRequest, StepOutput


class LocalExecutor:
    """A BlockingExecutor around the Runners of all ranks, rank 0 first. `interrupt` may come from any thread."""

    def __init__(self, runners: Sequence[Runner]) -> None:
        self.runners = list(runners)
        self._one_run = threading.Lock()
        self._interrupted: set[int] = set()
        self._extensions = _ExtensionLists()
        self._steps = ThreadPoolExecutor(max_workers=1, thread_name_prefix="max_ray-steps")
        self._ranks = ThreadPoolExecutor(max_workers=max(1, len(runners) - 1), thread_name_prefix="max_ray-rank")

    @property
    def forward_calls(self) -> int:
        """Forward passes since the start."""
        return self.runners[0].forward_calls

    def execute(self, request: RunRequest) -> Generator[StepOutput]:
        with self._one_run:
            others = [self._ranks.submit(_drain, runner, request, self._extensions) for runner in self.runners[1:]]
            steps = self.runners[0].run(request, lambda: request.run_id in self._interrupted, self._extensions)
            try:
                yield from steps
            finally:
                self._end(request.run_id, steps, others)

    async def stream(self, request: RunRequest) -> AsyncIterator[StepOutput]:
        steps = self.execute(request)
        loop = asyncio.get_running_loop()
        try:
            while (output := await loop.run_in_executor(self._steps, next, steps, None)) is not None:
                yield output
        finally:
            # a generator that is still inside a step cannot be closed from here: its thread does it after the step
            self.interrupt(request.run_id)
            self._steps.submit(steps.close)

    def interrupt(self, run_id: int) -> None:
        self._interrupted.add(run_id)

    @property
    def can_extend(self) -> bool:
        return True

    def extend(self, extension: RunExtension) -> None:
        self._extensions.put(extension)

    def _end(self, run_id: int, steps: Generator[StepOutput], others: list[Future[None]]) -> None:
        """Also when the caller stops early: the other ranks are in the run until rank 0 tells them that it is over."""
        self._interrupted.add(run_id)
        if others:
            for _ in steps:
                pass
        for rank in others:
            rank.result()
        self._interrupted = {i for i in self._interrupted if i > run_id}
        self._extensions.forget(run_id)


class _ExtensionLists:
    """Extensions by run, put by the caller's thread and read by those of the ranks. Rank 0 announces only what is
    here, so no caller ever waits."""

    def __init__(self) -> None:
        self._lists: dict[int, list[RunExtension]] = {}

    def put(self, extension: RunExtension) -> None:
        self._lists.setdefault(extension.run_id, []).append(extension)

    def num_arrived(self, run_id: int) -> int:
        return len(self._lists.get(run_id, ()))

    def get(self, run_id: int, number: int) -> RunExtension:
        return self._lists[run_id][number - 1]

    def forget(self, through_run_id: int) -> None:
        for run_id in [run_id for run_id in list(self._lists) if run_id <= through_run_id]:
            self._lists.pop(run_id, None)


def _drain(runner: Runner, request: RunRequest, extensions: _ExtensionLists) -> None:
    for _ in runner.run(request, extensions=extensions):
        pass
