"""The connection to the KV manager: its own answers, and what is raised when it cannot connect, dies or is taken over.

The KV manager is the plain class on a thread, behind an object that looks like Ray's handle; Ray itself is not needed.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import uvloop

from max_ray.actors import kv_manager as module
from max_ray.actors import member_connections
from max_ray.actors.kv_manager_client import KVManagerClient, KVManagerConnection
from max_ray.actors.messages import GroupInfo
from max_ray.actors.network import NodeAddress
from max_ray.errors import StaleLeaseError, WorkerGroupError
from max_ray.interfaces import BlockRequest, CacheUpdate, KVCacheParams
from max_ray.transport.address import Endpoint

HERE, THERE = NodeAddress("here", "127.0.0.1"), NodeAddress("there", "127.0.0.3")


@pytest.fixture(autouse=True)
def _this_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member_connections, "this_node", lambda: HERE)


class Manager:
    """node: where it says it is. can_reach: whether it can connect. tell_after_s: between the end of its connection and
    that of its actor call."""

    tell_after_s = 0.0

    def __init__(self, monkeypatch: pytest.MonkeyPatch, node: NodeAddress = HERE, can_reach: bool = True) -> None:
        monkeypatch.setattr(module, "watch", lambda *args, **kwargs: None)
        monkeypatch.setattr(module, "setup_logging", lambda: None)
        params = KVCacheParams(dtype="float32", num_layers=1, num_kv_heads=1, head_dim=8, page_size=4)
        plan = SimpleNamespace(kv_params=params, config=SimpleNamespace(enable_prefix_caching=True))
        times = {"lease_grace_s": 30.0, "start_timeout_s": 30.0, "collective_timeout_s": 10.0}
        self.spec: Any = SimpleNamespace(plan=plan, worker_port_range=None, **times)
        membership: Any = SimpleNamespace(epoch=5, owner_id="me", spec=self.spec, placement_group_id=None, name="kv")
        self.actor = module.KVManagerActor(membership)
        self.actor.open(10)
        self.node = node
        self.can_reach = can_reach

    def info(self, epoch: int = 5) -> GroupInfo:
        async def serve(endpoint: Endpoint, epoch: int) -> None:
            reached = endpoint if self.can_reach else replace(endpoint, path="/nowhere/socket")
            await asyncio.to_thread(self.actor.serve, reached, epoch)
            await asyncio.sleep(self.tell_after_s)

        async def locate(epoch: int) -> NodeAddress:
            self.actor._lease.check(epoch)
            return self.node

        handle = SimpleNamespace(serve=SimpleNamespace(remote=serve), locate=SimpleNamespace(remote=locate))
        return GroupInfo("g", epoch, (), kv_manager=handle, num_blocks=10, spec=self.spec)

    @property
    def num_free_blocks(self) -> int:
        return self.actor._opened.num_free_blocks


def wants(name: str, num_tokens: int) -> CacheUpdate:
    return CacheUpdate(requests=[BlockRequest(name, num_tokens)])


@pytest.mark.parametrize("node", [HERE, THERE], ids=["same node", "another node"])
async def test_updates_are_answered(monkeypatch: pytest.MonkeyPatch, node: NodeAddress) -> None:
    manager = Manager(monkeypatch, node)
    client = KVManagerClient(manager.info())
    for number in range(3):
        reply = await client.update(wants(f"r{number}", 8))
        grant = reply.grants[f"r{number}"]
        assert grant is not None
        assert len(grant.block_ids) == 2
    assert reply.num_free_blocks == 4
    assert (await client.update(wants("big", 100))).grants["big"] is None
    assert (await client.update(CacheUpdate(releases=["r0", "r1", "r2"]))).num_free_blocks == 10
    client.close()
    assert (await client.update(CacheUpdate())).num_free_blocks == 10, "a new connection is opened"
    client.close()


async def test_commits_reach_the_prefix_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    client = KVManagerClient(Manager(monkeypatch).info())
    hashes = [bytes([i]) * 16 for i in range(2)]
    await client.update(wants("a", 8))
    await client.update(CacheUpdate(commits=[("a", 0, hashes)]))
    reply = await client.update(CacheUpdate(requests=[BlockRequest("b", 9, hashes)]))
    client.close()
    grant = reply.grants["b"]
    assert grant is not None
    assert grant.cached_tokens == 8
    assert reply.prefix_cache_hits == 2


async def test_a_manager_that_cannot_connect_says_where_to(monkeypatch: pytest.MonkeyPatch) -> None:
    client = KVManagerClient(Manager(monkeypatch, can_reach=False).info())
    with pytest.raises(WorkerGroupError, match="KV manager cannot reach its replica at /nowhere/socket"):
        await client.update(CacheUpdate())


async def test_a_lease_that_passes_on_ends_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = Manager(monkeypatch)
    client = KVManagerClient(manager.info())
    await client.update(wants("a", 8))
    manager.actor.adopt(6, "other")
    with pytest.raises(StaleLeaseError):
        await client.update(wants("b", 8))
    with pytest.raises(StaleLeaseError):
        await client.update(wants("b", 8))
    assert manager.num_free_blocks == 10


async def test_a_manager_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = Manager(monkeypatch)
    connection = await KVManagerConnection.connect(manager.info(), 10.0)
    monkeypatch.setattr(manager.actor, "_update", lambda epoch, request: 1 / 0)
    with pytest.raises(WorkerGroupError, match="ZeroDivisionError"):
        await connection.update(CacheUpdate())
    assert not connection.is_open
    with pytest.raises(WorkerGroupError):
        await connection.update(CacheUpdate())


async def test_a_manager_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member_connections, "TICK_S", 0.02)
    manager = Manager(monkeypatch)
    client = KVManagerClient(manager.info(), answer_timeout_s=0.1)
    await client.update(CacheUpdate())
    with manager.actor._one_at_a_time, pytest.raises(WorkerGroupError, match="has not answered"):
        await client.update(CacheUpdate())


def test_a_manager_whose_connection_closes_before_ray_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be sent then: uvloop, which replicas run on, raises for that."""

    async def run() -> None:
        manager = Manager(monkeypatch)
        manager.tell_after_s = 0.2
        connection = await KVManagerConnection.connect(manager.info(), 10.0)
        connection._connections[0]._transport.abort()
        await asyncio.sleep(0.05)
        assert connection.is_open
        with pytest.raises(WorkerGroupError, match="hung up"):
            await connection.update(CacheUpdate())

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


async def test_an_answer_that_nobody_waits_for_any_more_is_not_the_next_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    connection = await KVManagerConnection.connect(Manager(monkeypatch).info(), 10.0)
    given_up = asyncio.create_task(connection.update(wants("a", 8)))
    await asyncio.sleep(0)
    given_up.cancel()
    await asyncio.gather(given_up, return_exceptions=True)
    reply = await connection.update(wants("b", 4))
    assert list(reply.grants) == ["b"]
    assert reply.num_free_blocks == 7
    connection.close()
