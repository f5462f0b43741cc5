"""The direct line: frames however they are cut, runs in order, and what is told when a rank cannot call or fails.

The ranks are threads of this process behind objects that look like Ray's handles; Ray itself is not needed.
"""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import uvloop

from max_ray.actors.group_line import GroupLine
from max_ray.actors.line import FrameReader, WorkerLine, encode_frame, encode_step
from max_ray.actors.messages import GroupInfo
from max_ray.errors import StaleLeaseError, WorkerGroupError
from max_ray.interfaces import LogProbabilities, RunExtension, RunRequest, StepOutput
from tests.actors.helpers import make_run

MESSAGES = [3, ["a", "b"], "x" * 1000, [], 2**40]


@pytest.mark.parametrize("size", [1, 3, 4, 5, 500, 10_000])
def test_frames_cut_anywhere(size: int) -> None:
    data = b"".join(map(encode_frame, MESSAGES))
    reader = FrameReader()
    got = [message for i in range(0, len(data), size) for message in reader.feed(data[i : i + size])]
    assert got == MESSAGES


@pytest.mark.parametrize("num_rows", [1, 3, 64])
@pytest.mark.parametrize("last", [False, True])
def test_frames_of_steps(num_rows: int, last: bool) -> None:
    tokens = np.arange(num_rows) * 2**40 - 1
    indptr = np.arange(num_rows + 1)
    indptr[1:-1] -= 1  # the first row gained nothing, the last one two tokens, or one where it is alone
    entry = LogProbabilities(token_id=5, log_probability=-0.5, top=[])
    told = StepOutput(
        3, tokens, indptr, last, log_probabilities={0: [entry]}, prompt_log_probabilities={0: [None, entry]}
    )
    steps = [(2**40, StepOutput(2**31, tokens, indptr, last)), (7, told), (8, StepOutput(0, tokens, indptr, last))]
    data = b"".join(encode_step(*step) for step in steps)
    reader = FrameReader()
    got = [message for i in range(0, len(data), 7) for message in reader.feed(data[i : i + 7])]
    for (run_id, output), (sent_id, sent) in zip(got, steps, strict=True):
        assert (run_id, output.step, output.last, output.tokens.dtype) == (sent_id, sent.step, sent.last, tokens.dtype)
        assert output.tokens.tolist() == tokens.tolist()
        assert output.indptr.tolist() == indptr.tolist()
        assert output.log_probabilities == sent.log_probabilities
        assert output.prompt_log_probabilities == sent.prompt_log_probabilities


def test_interrupts_overtake_the_orders_that_wait() -> None:
    ours, theirs = socket.socketpair()
    stopped: list[int] = []
    line = WorkerLine(theirs, stopped.append)
    with ours:
        ours.sendall(encode_frame(["a"]) + encode_frame(7) + encode_frame(["b"]))
        line.look()
        assert stopped == [7]
        assert [line.next_order(0), line.next_order(0), line.next_order(0)] == [["a"], ["b"], None]
        assert not line.is_closed
    line.look()
    assert line.is_closed
    assert line.next_order(1.0) is None
    line.close()


def test_the_vectors_of_a_step_travel() -> None:
    vectors = np.arange(6, dtype=np.float32).reshape(2, 3)
    none = np.empty(0, np.int64)
    (message,) = FrameReader().feed(
        encode_step(9, StepOutput(0, none, np.zeros(3, np.int64), True, embeddings=vectors))
    )
    run_id, output = message
    assert (run_id, output.last, output.embeddings.tolist()) == (9, True, vectors.tolist())


def extension(run_id: int, number: int) -> RunExtension:
    return RunExtension(run_id, number, 8 * number, np.array([8 * number]), {0: np.arange(number, dtype=np.int32)})


def test_extensions_are_found_by_their_run_and_those_that_come_too_late_are_dropped() -> None:
    ours, theirs = socket.socketpair()
    line = WorkerLine(theirs, print)
    with ours:
        ours.sendall(encode_frame(extension(3, 1)) + encode_frame(extension(4, 1)) + encode_frame(["a"]))
        assert line.num_arrived(4) == 0, "it looks only when it is told to"
        line.look()
        assert line.num_arrived(4) == 1
        assert line.num_arrived(3) == 0
        ours.sendall(encode_frame(extension(4, 2)))
        assert line.get(4, 2).num_steps == 16, "waits for what another rank has got"
        assert line.get(4, 1).block_tables[0].tolist() == [0]
        assert line.next_order(0) == ["a"]
    with pytest.raises(WorkerGroupError, match="hung up"):
        line.get(4, 3)
    line.close()


def test_nobody_listens(tmp_path: Path) -> None:
    assert WorkerLine.call(str(tmp_path / "line"), 0, print) is None


@dataclass
class Rank:
    """A rank on a thread. A run makes `num_steps` steps unless it is interrupted. reach: False on another node.
    tell_after_s: between its line's end and its call's."""

    rank: int
    reach: bool = True
    fail_in_run: int = 0
    silent: bool = False
    stopped: int = 0
    orders: list[Any] = field(default_factory=list)
    folder_mode: int = 0
    tell_after_s: float = 0.0

    def handle(self) -> Any:
        async def serve(path: str, epoch: int) -> None:
            assert epoch == 5
            try:
                await asyncio.to_thread(self.run, path)
            finally:
                await asyncio.sleep(self.tell_after_s)

        async def check_lease(epoch: int) -> None:
            await asyncio.sleep(0)

        return SimpleNamespace(serve=_remote(serve), check_lease=_remote(check_lease))

    def run(self, path: str) -> None:
        self.folder_mode = stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode)
        line = WorkerLine.call(path, self.rank, self.stop) if self.reach else None
        if line is None:
            return
        try:
            self.take_orders(line)
        finally:
            line.close()

    def take_orders(self, line: WorkerLine) -> None:
        while not line.is_closed:
            order = line.next_order(0.02)
            if order is None:
                continue
            self.orders.append(order)
            if not self.silent:
                self.answer(order, line)

    def stop(self, run_id: int) -> None:
        self.stopped = max(self.stopped, run_id)

    def answer(self, request: RunRequest, line: WorkerLine) -> None:
        if self.fail_in_run == request.run_id:
            raise WorkerGroupError("rank is out of luck")
        for step in range(request.num_steps if self.rank == 0 else 0):
            line.look(0.001)
            last = step + 1 == request.num_steps or request.run_id <= self.stopped or line.is_closed
            line.send_step(request.run_id, StepOutput(step, np.array([step, request.run_id]), np.arange(3), last))
            if last:
                return


def _remote(call: Callable[..., Awaitable[None]]) -> Any:
    return SimpleNamespace(remote=call)


def info_of(*ranks: Rank) -> GroupInfo:
    workers = tuple(rank.handle() for rank in ranks)
    spec: Any = None
    return GroupInfo("g", 5, workers, kv_manager=None, num_blocks=1, spec=spec)


async def opened(*ranks: Rank, step_timeout_s: float = 10.0) -> GroupLine:
    line = await GroupLine.open(info_of(*ranks), step_timeout_s)
    assert line is not None
    return line


async def steps_of(line: GroupLine, run_id: int, num_steps: int = 4) -> list[list[int]]:
    return [output.tokens.tolist() async for output in line.run(make_run(run_id, num_steps=num_steps))]


async def test_runs_reach_all_ranks_and_steps_come_back_in_order() -> None:
    ranks = Rank(0), Rank(1)
    line = await opened(*ranks)
    assert await steps_of(line, 1) == [[i, 1] for i in range(4)]
    both = await asyncio.gather(steps_of(line, 2), steps_of(line, 3))  # the second is handed over early
    assert both == [[[i, run] for i in range(4)] for run in (2, 3)]
    assert await steps_of(line, 4, num_steps=1) == [[0, 4]]
    async with asyncio.timeout(10):
        while len(ranks[1].orders) < 4:  # it answers nothing that could be waited for
            await asyncio.sleep(0.001)
    line.close()
    assert [[order.run_id for order in rank.orders] for rank in ranks] == [[1, 2, 3, 4]] * 2
    assert all(rank.folder_mode == 0o700 for rank in ranks), "others must not be able to call"


async def test_a_reader_that_leaves_interrupts_its_run() -> None:
    rank = Rank(0)
    line = await opened(rank)
    async with aclosing(line.run(make_run(1, num_steps=10_000))) as steps:
        await anext(steps)
    assert await steps_of(line, 2) == [[i, 2] for i in range(4)]
    assert rank.stopped == 1
    line.interrupt(3)
    assert await steps_of(line, 3) == [[0, 3]]
    line.close()


async def test_no_line_where_one_rank_is_on_another_node() -> None:
    here = Rank(0)
    assert await GroupLine.open(info_of(here, Rank(1, reach=False)), 10.0) is None
    assert here.orders == []


async def test_a_rank_that_fails_ends_all_runs() -> None:
    line = await opened(Rank(0), Rank(1, fail_in_run=2))
    assert len(await steps_of(line, 1)) == 4
    with pytest.raises(WorkerGroupError, match="out of luck"):
        await steps_of(line, 2, num_steps=100_000)
    assert not line.is_open
    with pytest.raises(WorkerGroupError, match="out of luck"):
        await steps_of(line, 3)
    await asyncio.sleep(0.05)  # the dead rank's connection is closed by now
    line.close()
    line.close()


@pytest.mark.parametrize("new_event_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_the_first_rank_fails_and_its_line_closes_before_ray_tells(new_event_loop: Callable[[], Any]) -> None:
    """Nothing can be sent then: uvloop, which replicas run on, raises for that. The reason is the worker's."""

    async def run() -> None:
        rank = Rank(0, fail_in_run=2, tell_after_s=0.2)
        line = await opened(rank, Rank(1))
        try:
            assert len(await steps_of(line, 1)) == 4
            running = asyncio.create_task(steps_of(line, 2, num_steps=100_000))
            await asyncio.sleep(0.1)
            line.interrupt(2)  # closed by now, and not known to have failed
            with pytest.raises(WorkerGroupError, match="out of luck"):
                await running
        finally:
            line.close()

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(run())


async def test_a_silent_worker_is_found_out() -> None:
    line = await opened(Rank(0, silent=True), step_timeout_s=0.1)
    with pytest.raises(WorkerGroupError, match="have not finished a step"):
        await asyncio.wait_for(steps_of(line, 1), 10)
    line.close()


async def test_a_lease_that_has_passed_on_is_told_at_once() -> None:
    async def refuse(epoch: int) -> None:
        raise StaleLeaseError("passed on")

    worker = SimpleNamespace(check_lease=_remote(refuse))
    spec: Any = None
    with pytest.raises(StaleLeaseError):
        await GroupLine.open(GroupInfo("g", 1, (worker,), kv_manager=None, num_blocks=1, spec=spec), 10.0)
