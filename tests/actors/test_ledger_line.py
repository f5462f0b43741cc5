"""The direct line to the KV manager: the ledger's own answers, and what is told when it cannot call, dies or is taken
over.

The KV manager is the plain class on a thread, behind an object that looks like Ray's handle; Ray itself is not needed.
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import uvloop

from max_ray.actors import kv_manager as module
from max_ray.actors.ledger_line import LedgerLine
from max_ray.actors.messages import GroupInfo
from max_ray.actors.worker_group import ActorKVLedger
from max_ray.errors import StaleLeaseError, WorkerGroupError
from max_ray.interfaces import KVCacheParams, LeaseReply, LeaseRequest, LeaseWant


class Manager:
    """reach: False on another node. num_calls: exchanges that came as Ray calls. tell_after_s: between the end of the
    line and that of the actor's call."""

    tell_after_s = 0.0

    def __init__(self, monkeypatch: pytest.MonkeyPatch, reach: bool = True) -> None:
        monkeypatch.setattr(module, "watch", lambda *args, **kwargs: None)
        monkeypatch.setattr(module, "setup_logging", lambda: None)
        params = KVCacheParams(dtype="float32", num_layers=1, num_kv_heads=1, head_dim=8, page_size=4)
        plan = SimpleNamespace(kv_params=params, config=SimpleNamespace(enable_prefix_caching=True))
        spec = SimpleNamespace(plan=plan, lease_grace_s=30.0, start_timeout_s=30.0)
        membership: Any = SimpleNamespace(epoch=5, owner_id="me", spec=spec, placement_group_id=None, name="kv")
        self.actor = module.KVManagerActor(membership)
        self.actor.open(10)
        self.reach = reach
        self.num_calls = 0

    def info(self, epoch: int = 5) -> GroupInfo:
        async def serve(path: str, epoch: int) -> None:
            await asyncio.to_thread(self.actor.serve, path if self.reach else path + ".elsewhere", epoch)
            await asyncio.sleep(self.tell_after_s)

        async def exchange(epoch: int, request: LeaseRequest) -> LeaseReply:
            self.num_calls += 1
            return self.actor.exchange(epoch, request)

        handle = SimpleNamespace(serve=SimpleNamespace(remote=serve), exchange=SimpleNamespace(remote=exchange))
        spec: Any = SimpleNamespace(plan=self.actor._membership.spec.plan)
        return GroupInfo("g", epoch, (), kv_manager=handle, num_blocks=10, spec=spec)


def wants(name: str, num_tokens: int) -> LeaseRequest:
    return LeaseRequest(wants=[LeaseWant(name, num_tokens)])


async def test_exchanges_go_over_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = Manager(monkeypatch)
    ledger = ActorKVLedger(manager.info())
    for number in range(3):
        reply = await ledger.exchange(wants(f"r{number}", 8))
        grant = reply.grants[f"r{number}"]
        assert grant is not None
        assert len(grant.block_ids) == 2
    assert reply.free_blocks == 4
    assert (await ledger.exchange(wants("big", 100))).grants["big"] is None
    assert (await ledger.exchange(LeaseRequest(releases=["r0", "r1", "r2"]))).free_blocks == 10
    assert manager.num_calls == 0
    ledger.hang_up()
    assert (await ledger.exchange(LeaseRequest())).free_blocks == 10, "a new line is opened"
    ledger.hang_up()


async def test_a_manager_on_another_node_is_asked_by_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = Manager(monkeypatch, reach=False)
    ledger = ActorKVLedger(manager.info())
    for _ in range(2):
        await ledger.exchange(LeaseRequest())
    assert manager.num_calls == 2


async def test_a_lease_that_passes_on_ends_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = Manager(monkeypatch)
    ledger = ActorKVLedger(manager.info())
    await ledger.exchange(wants("a", 8))
    manager.actor.adopt(6, "other")
    with pytest.raises(StaleLeaseError):
        await ledger.exchange(wants("b", 8))
    with pytest.raises(StaleLeaseError):
        await ledger.exchange(wants("b", 8))
    assert manager.actor.exchange(6, LeaseRequest()).free_blocks == 10


async def test_a_manager_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = Manager(monkeypatch)
    line = await LedgerLine.open(manager.info())
    assert line is not None
    monkeypatch.setattr(manager.actor, "_exchange", lambda epoch, request: 1 / 0)
    with pytest.raises(WorkerGroupError, match="hung up"):
        await line.exchange(LeaseRequest())
    assert not line.is_open
    with pytest.raises(WorkerGroupError):
        await line.exchange(LeaseRequest())


def test_a_manager_whose_line_closes_before_ray_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be sent then: uvloop, which replicas run on, raises for that."""

    async def run() -> None:
        manager = Manager(monkeypatch)
        manager.tell_after_s = 0.2
        line = await LedgerLine.open(manager.info())
        assert line is not None
        line._transport.abort()
        await asyncio.sleep(0.05)
        assert line.is_open
        with pytest.raises(WorkerGroupError, match="hung up"):
            await line.exchange(LeaseRequest())

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


async def test_an_answer_that_nobody_waits_for_any_more_is_not_the_next_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = Manager(monkeypatch)
    line = await LedgerLine.open(manager.info())
    assert line is not None
    given_up = asyncio.create_task(line.exchange(wants("a", 8)))
    await asyncio.sleep(0)
    given_up.cancel()
    await asyncio.gather(given_up, return_exceptions=True)
    reply = await line.exchange(wants("b", 4))
    assert list(reply.grants) == ["b"]
    assert reply.free_blocks == 7
    line.close()
