"""The connections to a group: runs in order, and what is raised when a rank cannot connect, fails or is silent.

The ranks are threads of this process behind objects that look like Ray's handles; Ray itself is not needed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import uvloop

from max_ray.actors import member_connections
from max_ray.actors.group_connection import GroupConnection
from max_ray.actors.messages import GroupInfo
from max_ray.actors.network import NodeAddress
from max_ray.actors.worker_group import GroupExecutor
from max_ray.errors import StaleLeaseError, WorkerGroupError
from max_ray.interfaces import RunExtension, StepOutput
from max_ray.transport.address import Endpoint
from max_ray.transport.worker_connection import WorkerConnection
from tests.actors.helpers import make_run

HERE, THERE = NodeAddress("here", "127.0.0.1"), NodeAddress("there", "127.0.0.3")


@pytest.fixture(autouse=True)
def _this_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member_connections, "this_node", lambda: HERE)


@dataclass
class Rank:
    """A rank on a thread. A run makes `num_steps` steps unless it is interrupted.

    Args:
        rank: Its number.
        node: Where it says it is.
        can_reach: Whether it can connect.
        fail_in_run: The run that it fails in.
        silent: Takes runs and answers none.
        deaf: Does not even read what arrives.
        tell_after_s: Between the end of its connection and that of its actor call.
    """

    rank: int
    node: NodeAddress = HERE
    can_reach: bool = True
    fail_in_run: int = 0
    silent: bool = False
    deaf: bool = False
    tell_after_s: float = 0.0
    stopped: int = 0
    runs: list[int] = field(default_factory=list)
    extensions: list[RunExtension] = field(default_factory=list)
    endpoint: Endpoint | None = None
    is_ended: bool = False

    def handle(self) -> Any:
        async def serve(endpoint: Endpoint, epoch: int) -> None:
            assert epoch == 5
            try:
                await asyncio.to_thread(self.run, endpoint)
            finally:
                await asyncio.sleep(self.tell_after_s)

        async def locate(epoch: int) -> NodeAddress:
            await asyncio.sleep(0)
            return self.node

        return SimpleNamespace(serve=_remote(serve), locate=_remote(locate))

    def run(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        reached = endpoint if self.can_reach else replace(endpoint, path="/nowhere/socket")
        try:
            connection = WorkerConnection.connect(reached, self.rank, self.stop)
            try:
                self.take_runs(connection)
            finally:
                connection.close()
        finally:
            self.is_ended = True

    def take_runs(self, connection: WorkerConnection) -> None:
        while not connection.is_closed:
            if self.deaf:
                time.sleep(0.05)
                continue
            request = connection.next_run(0.02)
            if request is None:
                continue
            self.runs.append(request.run_id)
            if not self.silent:
                self.answer(request.run_id, request.num_steps, connection)

    def stop(self, run_id: int) -> None:
        self.stopped = max(self.stopped, run_id)

    def answer(self, run_id: int, num_steps: int, connection: WorkerConnection) -> None:
        if self.fail_in_run == run_id:
            raise WorkerGroupError("rank is out of luck")
        step = 0
        while self.rank == 0:
            connection.look(0.001)
            for number in range(len(self.extensions), connection.num_arrived(run_id)):
                self.extensions.append(connection.get(run_id, number + 1))
                num_steps = self.extensions[-1].num_steps
            last = step + 1 >= num_steps or run_id <= self.stopped or connection.is_closed
            connection.send_step(run_id, StepOutput(step, np.array([step, run_id]), np.arange(3), last))
            if last:
                return
            step += 1


def _remote(call: Callable[..., Awaitable[Any]]) -> Any:
    return SimpleNamespace(remote=call)


def info_of(*ranks: Rank) -> GroupInfo:
    spec: Any = SimpleNamespace(worker_port_range=None, collective_timeout_s=10.0)
    return GroupInfo("g", 5, tuple(rank.handle() for rank in ranks), kv_manager=None, num_blocks=1, spec=spec)


async def connected(*ranks: Rank, step_timeout_s: float = 10.0) -> GroupConnection:
    return await GroupConnection.connect(info_of(*ranks), step_timeout_s)


async def steps_of(connection: GroupConnection, run_id: int, num_steps: int = 4) -> list[list[int]]:
    return [output.tokens.tolist() async for output in connection.run(make_run(run_id, num_steps=num_steps))]


@pytest.mark.parametrize("node", [HERE, THERE], ids=["same node", "another node"])
async def test_runs_reach_all_ranks_and_steps_come_back_in_order(node: NodeAddress) -> None:
    ranks = Rank(0, node), Rank(1, node)
    connection = await connected(*ranks)
    assert ranks[0].endpoint is not None
    assert (ranks[0].endpoint.path is None) == (node is THERE)
    assert await steps_of(connection, 1) == [[i, 1] for i in range(4)]
    both = await asyncio.gather(steps_of(connection, 2), steps_of(connection, 3))  # the second is handed over early
    assert both == [[[i, run] for i in range(4)] for run in (2, 3)]
    assert await steps_of(connection, 4, num_steps=1) == [[0, 4]]
    async with asyncio.timeout(10):
        while len(ranks[1].runs) < 4:  # it answers nothing that could be waited for
            await asyncio.sleep(0.001)
    connection.close()
    assert [rank.runs for rank in ranks] == [[1, 2, 3, 4]] * 2


@pytest.mark.parametrize("node", [HERE, THERE], ids=["same node", "another node"])
async def test_a_run_is_extended(node: NodeAddress) -> None:
    rank = Rank(0, node)
    executor = GroupExecutor(info_of(rank))
    assert executor.can_extend
    extension = RunExtension(1, 1, 2000, np.array([2000, 2000]), {1: np.arange(3, dtype=np.int32)})
    num_steps = 0
    async for output in executor.stream(make_run(1, num_steps=1000)):
        num_steps += 1
        if output.step == 0:
            executor.extend(extension)
    assert num_steps == 2000
    assert rank.extensions[0].block_tables[1].tolist() == [0, 1, 2]
    executor.close()
    executor.extend(extension)  # of a run that is over: nothing happens


async def test_a_run_that_was_interrupted_before_there_was_a_connection() -> None:
    rank = Rank(0)
    executor = GroupExecutor(info_of(rank))
    executor.interrupt(1)
    assert len([output async for output in executor.stream(make_run(1, num_steps=50))]) == 1
    assert len([output async for output in executor.stream(make_run(2, num_steps=5))]) == 5
    executor.close()


async def test_a_reader_that_leaves_interrupts_its_run() -> None:
    rank = Rank(0)
    connection = await connected(rank)
    async with aclosing(connection.run(make_run(1, num_steps=10_000))) as steps:
        await anext(steps)
    assert await steps_of(connection, 2) == [[i, 2] for i in range(4)]
    assert rank.stopped == 1
    connection.interrupt(3)
    assert await steps_of(connection, 3) == [[0, 3]]
    connection.close()


async def test_a_rank_that_cannot_connect_says_where_to() -> None:
    here = Rank(0)
    with pytest.raises(WorkerGroupError, match="Worker 1 cannot reach its replica at /nowhere/socket"):
        await connected(here, Rank(1, can_reach=False))
    async with asyncio.timeout(5):
        while not here.is_ended:  # its connection was closed
            await asyncio.sleep(0.01)


async def test_members_on_several_nodes_are_refused() -> None:
    with pytest.raises(WorkerGroupError, match="several nodes"):
        await connected(Rank(0, HERE), Rank(1, THERE))


async def test_a_rank_that_fails_ends_all_runs() -> None:
    connection = await connected(Rank(0), Rank(1, fail_in_run=2))
    assert len(await steps_of(connection, 1)) == 4
    with pytest.raises(WorkerGroupError, match="out of luck"):
        await steps_of(connection, 2, num_steps=100_000)
    assert not connection.is_open
    with pytest.raises(WorkerGroupError, match="out of luck"):
        await steps_of(connection, 3)
    await asyncio.sleep(0.05)  # the dead rank's connection is closed by now
    connection.close()
    connection.close()


@pytest.mark.parametrize("new_event_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_the_first_rank_fails_and_its_connection_closes_before_ray_tells(new_event_loop: Callable[[], Any]) -> None:
    """Nothing can be sent then: uvloop, which replicas run on, raises for that. The reason is the worker's."""

    async def run() -> None:
        rank = Rank(0, fail_in_run=2, tell_after_s=0.2)
        connection = await connected(rank, Rank(1))
        try:
            assert len(await steps_of(connection, 1)) == 4
            running = asyncio.create_task(steps_of(connection, 2, num_steps=100_000))
            await asyncio.sleep(0.1)
            connection.interrupt(2)  # closed by now, and not known to have failed
            with pytest.raises(WorkerGroupError, match="out of luck"):
                await running
        finally:
            connection.close()

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(run())


async def test_a_lost_connection_is_found_though_the_actor_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member_connections, "_TELL_S", 0.1)
    connection = await connected(Rank(0, fail_in_run=2, tell_after_s=20.0))
    with pytest.raises(WorkerGroupError, match="was lost"):
        await asyncio.wait_for(steps_of(connection, 2), 10)
    connection.close()


async def test_a_silent_worker_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member_connections, "TICK_S", 0.02)
    connection = await connected(Rank(0, silent=True), step_timeout_s=0.1)
    with pytest.raises(WorkerGroupError, match="have not finished a step"):
        await asyncio.wait_for(steps_of(connection, 1), 10)
    connection.close()


async def test_idle_members_are_pinged_and_one_that_does_not_answer_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(member_connections, "TICK_S", 0.02)
    monkeypatch.setattr(member_connections, "IDLE_TICKS", 2)
    monkeypatch.setattr(member_connections, "SILENT_PINGS", 20)
    well = await connected(Rank(0))
    await asyncio.sleep(1.0)
    assert well.is_open, "its pings are answered"
    assert len(await steps_of(well, 1)) == 4
    well.close()
    deaf = Rank(0, deaf=True)
    connection = await connected(deaf)
    async with asyncio.timeout(10):
        while connection.is_open:
            await asyncio.sleep(0.02)
    deaf.deaf = False
    assert "answers no ping" in str(connection.error)


async def test_a_lease_that_has_passed_on_is_told_at_once() -> None:
    async def refuse(epoch: int) -> None:
        raise StaleLeaseError("passed on")

    worker = SimpleNamespace(locate=_remote(refuse))
    spec: Any = SimpleNamespace(worker_port_range=None)
    with pytest.raises(StaleLeaseError):
        await GroupConnection.connect(GroupInfo("g", 1, (worker,), kv_manager=None, num_blocks=1, spec=spec), 10.0)
