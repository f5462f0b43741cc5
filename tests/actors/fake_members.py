"""Members of worker groups without Ray: handles, and a cluster that spawns, kills, stops and lists them.

The registry's code runs as it is; only the calls that leave its process are replaced. A registry process is known by a
context variable, which its tasks inherit: once it is dead its calls have no effect, and are never answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from max_ray.actors import groups, read_back, registry
from max_ray.actors.lease import Lease
from max_ray.actors.messages import Membership, MemberStatus
from max_ray.errors import MaxRayError

_PROCESS: ContextVar[int] = ContextVar("the registry process that calls", default=0)


class FakeMember:
    """A worker or a KV manager. `loading`: its setup waits for it. While `stopped` it answers nothing."""

    def __init__(self, cluster: FakeCluster, membership: Membership) -> None:
        spec = membership.spec
        self.membership = membership
        self.lease = Lease(membership.epoch, membership.owner_id, spec.lease_grace_s, spec.start_timeout_s)
        self.loaded = membership.rank is None
        self.is_dead = False
        self.running = asyncio.Event()
        self.running.set()
        self.num_adoptions = 0
        self._cluster = cluster

    def __getattr__(self, name: str) -> Any:
        method = getattr(self, f"do_{name}")

        class Method:
            @staticmethod
            def remote(*arguments: Any) -> asyncio.Task[Any]:
                return asyncio.ensure_future(self._answer(method, *arguments))

        return Method

    async def _answer(self, method: Callable[..., Coroutine[Any, Any, Any]], *arguments: Any) -> Any:
        await asyncio.sleep(0)
        await self.running.wait()
        try:
            if self.is_dead:
                raise ActorDiedError
            result = await method(*arguments)
            if self.is_dead:
                raise ActorDiedError
            return result
        except MaxRayError as error:
            raise RayTaskError("f", "traceback", error) from None
        finally:
            await self._cluster.if_alive()

    def end(self) -> None:
        self.is_dead = True
        self.running.set()

    async def do_setup(self, address: str | None) -> int:
        await self._cluster.loading.wait()
        self.loaded = True
        return 64

    async def do_reserve_address(self) -> str:
        return "tcp://127.0.0.1:1"

    async def do_startup_phases(self) -> dict[str, float]:
        return {}

    async def do_open(self, num_blocks: int) -> None:
        return None

    async def do_renew(self, owner_id: str) -> None:
        self.lease.renew(owner_id)

    async def do_adopt(self, epoch: int, owner_id: str) -> None:
        self.lease.pass_to(epoch, owner_id)
        self.num_adoptions += 1

    async def do_describe(self) -> MemberStatus:
        lease = self.lease
        return MemberStatus(self.membership, lease.epoch, lease.owner_id, self.loaded, lease.age_s, 1, 64)


class FakeCluster:
    """All members that were ever spawned, by name. Made by `install`."""

    def __init__(self) -> None:
        self.members: dict[str, FakeMember] = {}
        self.placements: dict[str, str] = {}
        self.nodes: dict[str, str] = {}
        self.loading = asyncio.Event()
        self.loading.set()
        self.process = 0

    def new_process(self) -> None:
        """From now on this task and its own are the registry's; one before it is dead."""
        self.process += 1
        _PROCESS.set(self.process)

    @property
    def caller_is_alive(self) -> bool:
        return _PROCESS.get() == self.process

    async def if_alive(self) -> None:
        """Never returns in a dead process."""
        if not self.caller_is_alive:
            await asyncio.Event().wait()

    @property
    def living(self) -> list[str]:
        return sorted(name for name, member in self.members.items() if not member.is_dead)

    def kill(self, member: FakeMember, no_restart: bool) -> None:
        if self.caller_is_alive:
            member.end()

    def spawn(self, membership: Membership, placement: Any) -> FakeMember:
        if not self.caller_is_alive:
            return FakeMember(self, membership)
        assert membership.name not in self.living, "two actors of one name"
        self.members[membership.name] = FakeMember(self, membership)
        return self.members[membership.name]

    def list_names(self, everywhere: bool) -> list[dict[str, str]]:
        return [{"name": name, "namespace": "max_ray"} for name in self.living]

    async def place(self, group_id: str, spec: Any, progress: Any, preferred_node: str = "") -> Any:
        await self.if_alive()

        class Placement:
            class id:
                hex = staticmethod(lambda: f"placement of {group_id}")

        self.placements[group_id] = Placement.id.hex()
        self.nodes[Placement.id.hex()] = preferred_node
        return Placement

    def remove_placement(self, placement_id: str) -> None:
        if not self.caller_is_alive:
            return
        self.placements = {group: found for group, found in self.placements.items() if found != placement_id}
        for member in self.members.values():
            if member.membership.placement_group_id == placement_id:
                member.end()


def install(monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    """Replaces what leaves the registry's process, for one test."""
    cluster = FakeCluster()
    monkeypatch.setattr(groups, "spawn_worker", cluster.spawn)
    monkeypatch.setattr(groups, "spawn_kv_manager", cluster.spawn)
    monkeypatch.setattr(groups, "place_group", cluster.place)
    monkeypatch.setattr(groups, "placement_of", lambda placement_id: placement_id)
    monkeypatch.setattr(groups, "_is_placed", lambda placement_id: placement_id in cluster.placements.values())
    monkeypatch.setattr(groups, "remove_group_placement", cluster.remove_placement)
    monkeypatch.setattr(groups.ray, "kill", cluster.kill)
    monkeypatch.setattr(groups, "_PING_S", 0.3)
    monkeypatch.setattr(registry, "placements_of_groups", lambda: dict(cluster.placements))
    monkeypatch.setattr(registry, "nodes_of_placements", lambda: dict(cluster.nodes))
    monkeypatch.setattr(registry, "remove_group_placement", cluster.remove_placement)
    monkeypatch.setattr(registry, "STALE_AFTER_S", 0.1)
    monkeypatch.setattr(registry, "_LOOK_EVERY_S", 0.005)
    monkeypatch.setattr(registry, "_TIDY_EVERY_S", 0.01)
    monkeypatch.setattr(registry, "_ASK_AGAIN_EVERY_S", 0.05)
    monkeypatch.setattr(read_back.ray.util, "list_named_actors", cluster.list_names)
    monkeypatch.setattr(read_back.ray, "get_actor", lambda name, namespace: cluster.members[name])
    return cluster
