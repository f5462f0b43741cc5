"""Faults: which process, what happens to it, and when all is well again. The schedule follows from a seed."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from time import perf_counter

import psutil  # type: ignore[import-untyped]

from max_ray.chaos.processes import ProcessesOfKind
from max_ray.errors import ServerFailedError

_LOOK_EVERY_S = 0.02
_REPLACED_WITHIN_S = 180.0
_STOPS_S = (1.0, 3.0, 5.0)
_PAUSE_S = (1.0, 4.0)
_CUTTING = ("replica", "haproxy")


@dataclass(frozen=True)
class Fault:
    """What is done.

    Args:
        kind: Kind of the process.
        stopped_s: Seconds for which it is stopped; None: it is killed.
        pause_s: Seconds before it.
    """

    kind: str
    stopped_s: float | None
    pause_s: float

    @property
    def action(self) -> str:
        return "kill" if self.stopped_s is None else "stop"

    @property
    def may_cut(self) -> bool:
        """Whether open streams may break: their connection ends with the process."""
        return self.stopped_s is None and self.kind in _CUTTING


@dataclass(frozen=True)
class Injected:
    """A fault that was injected.

    Args:
        fault: What was done.
        begin: When, in seconds of `perf_counter`.
        answered: When a request that was sent after it was answered.
        end: When the process was there again, too.
    """

    fault: Fault
    begin: float
    answered: float
    end: float


def schedule(seed: int, kinds: Sequence[str]) -> Iterator[Fault]:
    """Faults without end, the same for the same seed: each kind once in an order by chance, killed or stopped."""
    random = Random(seed)
    while True:
        for kind in random.sample(list(kinds), len(kinds)):
            stopped_s = random.choice((None, random.choice(_STOPS_S)))
            yield Fault(kind, stopped_s, random.uniform(*_PAUSE_S))


async def inject(
    fault: Fault, number: int, processes: ProcessesOfKind, answers: Callable[[], Awaitable[bool]]
) -> Injected | None:
    """Does it, and waits until all is well again.

    Args:
        fault: What to do.
        number: Chooses the process where there are several.
        processes: Gives the living processes of a kind.
        answers: Sends a short request; whether it was answered.

    Returns:
        What happened; None where no process of the kind runs.

    Raises:
        ServerFailedError: The process was not replaced, or nothing answered, for three minutes.
    """
    await asyncio.sleep(fault.pause_s)
    found = processes(fault.kind)
    if not found:
        return None
    process, begin = found[number % len(found)], perf_counter()
    before = {other.pid for other in found}
    await _harm(process, fault.stopped_s)
    while not await answers():
        _check(fault, begin)
        await asyncio.sleep(_LOOK_EVERY_S)
    answered = perf_counter()
    while fault.stopped_s is None and not _is_replaced(processes(fault.kind), process, before):
        _check(fault, begin)
        await asyncio.sleep(_LOOK_EVERY_S)
    while not await answers():
        _check(fault, begin)
    return Injected(fault, begin, answered, perf_counter())


async def _harm(process: psutil.Process, stopped_s: float | None) -> None:
    try:
        if stopped_s is None:
            process.send_signal(signal.SIGKILL)
            return
        process.send_signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(stopped_s)
        finally:
            process.send_signal(signal.SIGCONT)
    except psutil.NoSuchProcess:
        return


def _is_replaced(now: Sequence[psutil.Process], killed: psutil.Process, before: set[int]) -> bool:
    pids = {process.pid for process in now}
    return killed.pid not in pids and bool(pids - before) and len(pids) >= len(before)


def _check(fault: Fault, begin: float) -> None:
    if perf_counter() - begin > _REPLACED_WITHIN_S:
        raise ServerFailedError(
            f"After the {fault.action} of a {fault.kind} not all was well again within {_REPLACED_WITHIN_S:.0f} s."
        )
