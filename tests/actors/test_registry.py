"""The registry's decisions, without Ray: orders that are repeated, hangs, deaths at any moment, and who owns what."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from max_ray.actors import groups
from max_ray.actors import registry as registry_module
from max_ray.actors.messages import GroupInfo, GroupSpec
from max_ray.actors.registry import RegistryActor
from max_ray.errors import MaxRayError, StaleLeaseError, WorkerGroupError
from tests.actors.fake_members import FakeCluster, install
from tests.actors.helpers import make_spec


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    return install(monkeypatch)


@pytest.fixture
def spec(tiny_llama: Path) -> GroupSpec:
    return make_spec(tiny_llama, "app", size=2, lease_grace_s=5.0)


class Registries:
    """Registry processes, one after another."""

    def __init__(self, cluster: FakeCluster) -> None:
        self._cluster = cluster
        self._cluster.new_process()
        self.now = RegistryActor()

    def die(self) -> None:
        """What it was doing goes no further; a new one is there."""
        self.stop()
        self._cluster.new_process()
        self.now = RegistryActor()

    def stop(self) -> None:
        if self.now._janitor is not None:
            self.now._janitor.cancel()


@pytest.fixture
async def registries(cluster: FakeCluster) -> AsyncIterator[Registries]:
    found = Registries(cluster)
    yield found
    found.stop()


def renewed(cluster: FakeCluster, owner: str) -> None:
    """What the owner's keeper does in a second."""
    for member in cluster.members.values():
        if not member.is_dead and member.running.is_set() and member.lease.owner_id == owner:
            member.lease.renew(owner)


async def keep(cluster: FakeCluster) -> None:
    while True:
        renewed(cluster, "owner")
        await asyncio.sleep(0.01)


def rebuild(registries: Registries, info: GroupInfo, owner: str = "owner") -> asyncio.Task[GroupInfo]:
    return asyncio.create_task(registries.now.rebuild(info.group_id, info.epoch, info.spec, 0, owner))


def is_whole(cluster: FakeCluster, info: GroupInfo) -> bool:
    members = [*info.workers, info.kv_manager]
    return [m.is_dead for m in members] == [False] * 3 and all(m.lease.epoch == info.epoch for m in members)


async def test_a_repeated_order_of_the_same_owner_is_the_same_order(
    cluster: FakeCluster, spec: GroupSpec, registries: Registries
) -> None:
    info = await registries.now.acquire(spec, 0, "owner")
    cluster.members[f"{info.group_id}:worker_1:1"].end()
    orders = [rebuild(registries, info) for _ in range(3)]
    answers = await asyncio.gather(*orders)
    assert {answer.epoch for answer in answers} == {2}
    assert is_whole(cluster, answers[0])
    again = await rebuild(registries, info)
    assert again.epoch == 2
    assert (await rebuild(registries, again)).epoch == 3, "another order"


@pytest.mark.parametrize("later_s", [0.0, 0.03, 0.06, 0.09])
async def test_a_successor_takes_the_group_whoever_heard_the_owner_last(
    cluster: FakeCluster, spec: GroupSpec, registries: Registries, monkeypatch: pytest.MonkeyPatch, later_s: float
) -> None:
    """The owner renews with its members up to a second after it does here, and dies between two renewals."""
    monkeypatch.setattr(registry_module, "STALE_AFTER_S", 0.25)
    info = await registries.now.acquire(spec, 0, "owner")
    await registries.now.renew(info.group_id, "owner")
    await asyncio.sleep(later_s)
    renewed(cluster, "owner")
    successor = await registries.now.acquire(spec, 0, "successor")
    assert (successor.group_id, successor.epoch) == (info.group_id, info.epoch + 1)
    assert is_whole(cluster, successor)
    assert len(cluster.living) == 3, "one group"


async def test_an_owner_that_only_its_members_hear_keeps_its_group(
    cluster: FakeCluster, spec: GroupSpec, registries: Registries
) -> None:
    info = await registries.now.acquire(spec, 0, "owner")
    keeper = asyncio.create_task(keep(cluster))
    other = await registries.now.acquire(spec, 1, "other")
    keeper.cancel()
    assert other.group_id != info.group_id
    assert len(cluster.living) == 6


@pytest.mark.parametrize("moment", ["before the new workers", "while they load", "after"])
async def test_a_registry_that_dies_while_it_rebuilds_is_asked_again(
    cluster: FakeCluster, spec: GroupSpec, registries: Registries, moment: str
) -> None:
    info = await registries.now.acquire(spec, 0, "owner")
    cluster.members[f"{info.group_id}:worker_0:1"].end()
    cluster.loading.clear()
    order = rebuild(registries, info)
    while moment != "before the new workers" and f"{info.group_id}:worker_0:2" not in cluster.living:
        await asyncio.sleep(0.001)
    if moment == "after":
        cluster.loading.set()
        await order
    registries.die()
    cluster.loading.set()
    fresh = await rebuild(registries, info)
    assert fresh.epoch > info.epoch
    assert is_whole(cluster, fresh)
    assert len(cluster.living) == 3, "nothing of the unfinished start is left"
    assert await registries.now.renew(fresh.group_id, "owner") == {}


async def test_members_that_do_not_answer_a_new_registry_are_not_taken_for_dead(
    cluster: FakeCluster, spec: GroupSpec, registries: Registries
) -> None:
    """A busy machine at the moment of a restart costs no healthy group, and its owner's order finds it."""
    info = await registries.now.acquire(spec, 0, "owner")
    for member in cluster.members.values():
        member.running.clear()
    registries.die()
    await registries.now.status()
    assert len(cluster.living) == 3
    assert info.group_id in cluster.placements
    cluster.members[f"{info.group_id}:worker_0:1"].running.set()
    while not (await registries.now.status()).groups:
        await asyncio.sleep(0.01)
    registries.die()
    cluster.members[f"{info.group_id}:worker_0:1"].running.clear()
    await registries.now.status()
    fresh = await rebuild(registries, info)
    assert fresh.group_id == info.group_id
    assert is_whole(cluster, fresh)
    assert len(cluster.living) == 3


async def test_a_group_that_is_being_rebuilt_is_not_tidied_away(
    cluster: FakeCluster, spec: GroupSpec, registries: Registries, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The registry was stopped: by its clock nobody has renewed for longer than the grace period."""
    info = await registries.now.acquire(spec, 0, "owner")
    cluster.members[f"{info.group_id}:kv_manager:1"].running.clear()
    group = registries.now._groups[info.group_id]
    group.renewed_at -= 60
    fresh = await rebuild(registries, info)
    await asyncio.sleep(0.1)
    assert [row.group_id for row in (await registries.now.status()).groups] == [info.group_id]
    assert is_whole(cluster, fresh)
    await registries.now.renew(fresh.group_id, "owner")


async def test_a_registry_that_was_stopped_ends_no_group_whose_owner_lives(
    cluster: FakeCluster, spec: GroupSpec, registries: Registries
) -> None:
    info = await registries.now.acquire(spec, 0, "owner")
    group = registries.now._groups[info.group_id]
    for _ in range(5):
        renewed(cluster, "owner")
        group.renewed_at -= 60
        await asyncio.sleep(0.03)
        assert len(cluster.living) == 3
    keeping = asyncio.create_task(keep(cluster))
    second = await registries.now.acquire(spec, 1, "second")
    keeping.cancel()
    assert second.group_id != info.group_id, "a living owner is not robbed"


async def test_a_group_is_placed_on_its_owners_node_and_successors_prefer_their_own(
    cluster: FakeCluster, spec: GroupSpec, registries: Registries
) -> None:
    first = await registries.now.acquire(spec, 0, "owner", "node a")
    keeping = asyncio.create_task(keep(cluster))
    second = await registries.now.acquire(spec, 1, "second", "node b")
    keeping.cancel()
    assert [cluster.nodes[f"placement of {info.group_id}"] for info in (first, second)] == ["node a", "node b"]
    for group in registries.now._groups.values():
        group.renewed_at -= 60
    for member in cluster.members.values():
        member.lease._renewed_at -= 60
    successor = await registries.now.acquire(spec, 0, "third", "node b")
    assert successor.group_id == second.group_id, "its own node's, though the other one was its rank's"


async def test_a_group_without_an_owner_ends(cluster: FakeCluster, spec: GroupSpec, registries: Registries) -> None:
    info = await registries.now.acquire(spec, 0, "owner")
    registries.now._groups[info.group_id].renewed_at -= 60
    for member in cluster.members.values():
        member.lease._renewed_at -= 60
    deadline = time.monotonic() + 5
    while cluster.living:
        await asyncio.sleep(0.01)
        assert time.monotonic() < deadline
    assert cluster.placements == {}
    assert (await registries.now.status()).groups == []


async def test_members_are_put_on_the_grace_period_together(
    cluster: FakeCluster, spec: GroupSpec, registries: Registries
) -> None:
    """A rank that has loaded waits for the others as long as a start may take."""
    cluster.loading.clear()
    order = asyncio.create_task(registries.now.acquire(spec, 0, "owner"))
    while len(cluster.members) < 3:
        await asyncio.sleep(0.001)
    first, *_ = cluster.members.values()
    first.loaded = True
    first.lease._renewed_at -= spec.lease_grace_s * 3
    assert not first.lease.is_expired
    cluster.loading.set()
    await order
    assert all(member.lease.age_s < 1 and not member.lease.is_expired for member in cluster.members.values())
    for member in cluster.members.values():
        member.lease._renewed_at -= spec.lease_grace_s * 3
        assert member.lease.is_expired


async def test_orders_of_another_owner_are_refused(
    cluster: FakeCluster, spec: GroupSpec, registries: Registries
) -> None:
    info = await registries.now.acquire(spec, 0, "owner")
    with pytest.raises(StaleLeaseError):
        await rebuild(registries, info, owner="other")
    with pytest.raises(StaleLeaseError):
        await registries.now.release(info.group_id, "other")
    with pytest.raises(StaleLeaseError):
        await registries.now.renew(info.group_id, "other")
    with pytest.raises(WorkerGroupError, match="does not know"):
        await registries.now.renew("no such group", "owner")
    await registries.now.release(info.group_id, "owner")
    assert cluster.living == []


@pytest.mark.parametrize("seed", [*range(50), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(50, 400))])
async def test_random_histories(
    cluster: FakeCluster, spec: GroupSpec, registries: Registries, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """One owner that lives all the time, whatever happens to members and registry: its order is always answered with a
    whole group, its epoch never goes back, and nothing else is left."""
    monkeypatch.setattr(registry_module, "_TIDY_EVERY_S", 0.001)
    monkeypatch.setattr(groups, "_PING_S", 0.01)
    rng = random.Random(seed)
    info = await registries.now.acquire(spec, 0, "owner")
    for _ in range(rng.randrange(2, 7)):
        for _ in range(rng.randrange(1, 4)):
            _happens(rng, cluster, registries, info)
        order = rebuild(registries, info)
        for _ in range(rng.randrange(3)):
            await asyncio.sleep(rng.choice([0, 0, 0.001, 0.005, 0.015]))
            _happens(rng, cluster, registries, info)
            if rng.random() < 0.5:
                registries.die()
                order = rebuild(registries, info)
        fresh = await _answered(order, cluster, registries, info)
        assert fresh.epoch > info.epoch or fresh.group_id != info.group_id
        info = fresh
        renewed(cluster, "owner")
    fresh = await rebuild(registries, info)
    assert is_whole(cluster, fresh)
    assert cluster.living == sorted(member.membership.name for member in [*fresh.workers, fresh.kv_manager])
    assert list(cluster.placements) == [fresh.group_id]


def _happens(rng: random.Random, cluster: FakeCluster, registries: Registries, info: GroupInfo) -> None:
    living = [cluster.members[name] for name in cluster.living]
    kind = rng.choice(["kill", "stop", "go on", "slow load", "load", "registry stopped"])
    if kind in ("kill", "stop") and living:
        member = rng.choice(living)
        member.end() if kind == "kill" else member.running.clear()
    elif kind == "go on":
        for member in living:
            member.running.set()
    elif kind in ("slow load", "load"):
        cluster.loading.clear() if kind == "slow load" else cluster.loading.set()
    elif kind == "registry stopped" and info.group_id in registries.now._groups:
        registries.now._groups[info.group_id].renewed_at -= 60


async def _answered(
    order: asyncio.Task[GroupInfo], cluster: FakeCluster, registries: Registries, info: GroupInfo
) -> GroupInfo:
    """As the loop does it: again when it failed. What was stopped goes on, for a start waits for its members."""
    cluster.loading.set()
    for member in cluster.members.values():
        member.running.set()
    for _ in range(10):
        try:
            return await asyncio.wait_for(asyncio.shield(order), 5)
        except StaleLeaseError:
            raise
        except MaxRayError:
            order = rebuild(registries, info)
    raise AssertionError("the order was never answered")
