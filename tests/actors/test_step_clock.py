"""A step's deadline: a worker that hangs is found in time, one without a processor is waited for."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from max_ray.actors import member_connections
from max_ray.actors.messages import GroupInfo
from max_ray.actors.network import NodeAddress
from max_ray.actors.scheduling_delay import SchedulingDelay
from max_ray.actors.step_clock import StepClock, StepTimeoutError
from max_ray.actors.worker_group import GroupExecutor
from tests.actors.helpers import make_run
from tests.actors.test_group_connection import Rank, info_of

LIMIT_S = 70.0
counts_delays = pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="the system counts no delays")

PROGRAM = """
import sys, threading, time
from max_ray.actors.scheduling_delay import SchedulingDelay
delay, lock = SchedulingDelay(), threading.Lock()
lock.acquire()

def compute():
    ids.append(threading.get_native_id())
    if sys.argv[1] == "hangs":
        lock.acquire()
    while True:
        pass

ids = []
threading.Thread(target=compute, daemon=True).start()
while not ids:
    time.sleep(0.001)
before, started = delay.read(ids[0]), time.monotonic()
for _ in range(4):
    time.sleep(0.5)
    now = delay.read(ids[0])
print((now - before) / (time.monotonic() - started))
"""


@counts_delays
@pytest.mark.parametrize(("kind", "lowest", "highest"), [("computes", 0.4, 1.05), ("hangs", -0.01, 0.2)])
def test_delays_of_a_real_process_between_busy_ones(kind: str, lowest: float, highest: float) -> None:
    """All share one processor with three busy loops: a thread that computes waits most of the time."""
    processor = str(min(os.sched_getaffinity(0)))
    pinned = ["taskset", "-c", processor, sys.executable, "-c"]
    busy = [subprocess.Popen([*pinned, "while True: pass"]) for _ in range(3)]
    try:
        run = subprocess.run([*pinned, PROGRAM, kind], capture_output=True, text=True, check=True)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert lowest <= float(run.stdout) <= highest


def test_a_thread_that_is_gone_has_no_delay() -> None:
    assert SchedulingDelay().read(2**22 + 1) == 0.0


class Machine:
    """Workers whose delays are set, and a clock."""

    def __init__(self, *delays: float) -> None:
        self.now_s = 0.0
        self.delays: list[float | Exception] = list(delays)
        self.num_questions = 0
        workers = [SimpleNamespace(scheduling_delay=SimpleNamespace(remote=self._asker(i))) for i in range(len(delays))]
        self.clock = StepClock(workers, LIMIT_S, lambda: self.now_s)

    def _asker(self, rank: int) -> Any:
        async def ask() -> float:
            self.num_questions += 1
            delay = self.delays[rank]
            if isinstance(delay, Exception):
                raise delay
            return delay

        return ask

    async def pass_time(self, seconds: float, *busy: float) -> StepTimeoutError | None:
        """Time passes by the second; a worker's delay grows by its share of it. The first error."""
        for _ in range(round(seconds)):
            self.now_s += 1
            self.delays = [d + b if isinstance(d, float) else d for d, b in zip(self.delays, busy, strict=True)]
            error = self.clock.check()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            if error is not None:
                return error
        return None


async def test_workers_that_hang_are_found_when_the_limit_is_over() -> None:
    machine = Machine(5.0, 7.0)
    assert await machine.pass_time(70, 0, 0) is None
    error = await machine.pass_time(1, 0, 0)
    assert str(error) == (
        "The workers have not finished a step for 71 s, in which they waited 0 s for a processor. "
        "A step may take 70 s: collective_timeout_s governs it."
    )


@pytest.mark.parametrize(("busy", "found_after_s"), [((0.9, 0.0), 500), ((0.0, 0.5), 121), ((1.0, 1.0), 561)])
async def test_time_without_a_processor_does_not_count(busy: tuple[float, float], found_after_s: int) -> None:
    """The slowest rank decides; in all eight limits are the most."""
    machine = Machine(5.0, 7.0)
    error = await machine.pass_time(found_after_s - 1, *busy)
    assert error is None
    assert await machine.pass_time(60, *busy) is not None


async def test_no_worker_is_asked_in_short_steps_and_each_step_counts_anew() -> None:
    machine = Machine(0.0, 0.0)
    for _ in range(20):
        assert await machine.pass_time(17, 1, 1) is None
        machine.clock.restart()
    assert machine.num_questions == 0
    assert await machine.pass_time(100, 1, 1) is None
    machine.clock.restart()
    assert await machine.pass_time(70, 0, 0) is None
    assert await machine.pass_time(1, 0, 0) is not None


async def test_a_worker_that_cannot_be_asked_gets_no_more_time() -> None:
    machine = Machine(0.0, 0.0)
    machine.delays[1] = ActorDiedError()
    assert await machine.pass_time(70, 1, 1) is None
    assert await machine.pass_time(1, 1, 1) is not None


def executor_of(*ranks: Rank, busy: bool) -> tuple[GroupExecutor, GroupInfo]:
    info = info_of(*ranks)
    started = asyncio.get_running_loop().time()

    async def delay() -> float:
        return asyncio.get_running_loop().time() - started if busy else 0.0

    for worker in info.workers:
        worker.scheduling_delay = SimpleNamespace(remote=delay)
    return GroupExecutor(info, step_timeout_s=0.2), info


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member_connections, "TICK_S", 0.02)
    monkeypatch.setattr(member_connections, "this_node", lambda: NodeAddress("here", "127.0.0.1"))


async def run_once(executor: GroupExecutor, run_id: int) -> float:
    """Seconds until the run has ended or failed."""
    started = asyncio.get_running_loop().time()
    try:
        async with aclosing(executor.stream(make_run(run_id, num_steps=1))) as steps:
            async for _ in steps:
                pass
    except StepTimeoutError:
        pass
    return asyncio.get_running_loop().time() - started


@pytest.mark.usefixtures("fast")
async def test_a_slow_group_is_waited_for_and_a_silent_one_is_not() -> None:
    for busy, least, most in ((False, 0.2, 1.0), (True, 1.6, 10.0)):
        executor, _ = executor_of(Rank(0, silent=True), busy=busy)
        assert least <= await run_once(executor, 1) <= most
        executor.close()


@pytest.mark.usefixtures("fast")
async def test_the_limit_doubles_until_a_run_has_ended_well() -> None:
    rank = Rank(0, silent=True)
    executor, info = executor_of(rank, busy=False)
    limits = []
    for number in range(5):
        limits.append(executor.step_timeout_s)
        await run_once(executor, number + 1)
        executor.adopt(info)
    assert limits == [0.2, 0.4, 0.8, 1.6, 1.6]
    rank.silent = False
    await run_once(executor, 6)
    assert executor.step_timeout_s == 0.2
    executor.close()
