"""RegistryActor: which worker groups there are, and which replica has which. One a cluster, named.

It records plans and places groups, and never builds a model (nor imports torch). Its table can be lost: the members of
a group know everything about it, and a restarted registry asks them. Nor does anything depend on its being there
between two orders: a group belongs to the owner that its members know. It ends itself when there has been no group for
a while.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence

import ray
from ray.exceptions import RayError

from max_ray.actors import groups
from max_ray.actors.groups import Group
from max_ray.actors.messages import GroupInfo, GroupSpec, RegistryStatus, new_group_id
from max_ray.actors.placement import nodes_of_placements, placements_of_groups, remove_group_placement
from max_ray.actors.read_back import FoundGroup, find_groups
from max_ray.errors import MaxRayError, StaleLeaseError, WorkerGroupError
from max_ray.log import get_logger, setup_logging

_LOG = get_logger(__name__)
STALE_AFTER_S = 4.0
"""An owner of whom neither the registry nor a member has heard for so long is taken for dead when a successor asks;
owners renew every second."""
_IDLE_END_S = 5.0
_START_GRACE_S = 30.0
_TIDY_EVERY_S = 1.0
_ASK_AGAIN_EVERY_S = 10.0
_LOOK_EVERY_S = 0.1


class RegistryActor:
    """The plain class; `registry_calls.get_registry` makes a Ray actor of it.

    `_silent`: groups of which no member has answered yet.
    """

    def __init__(self) -> None:
        setup_logging()
        self._groups: dict[str, Group] = {}
        self._silent: dict[str, FoundGroup] = {}
        self._snapshots: dict[str, dict[str, bytes]] = {}
        self._last_needed = time.monotonic() + _START_GRACE_S
        self._asked_again_at = time.monotonic()
        self._recovered: asyncio.Task[None] | None = None
        self._starting = 0
        self._janitor: asyncio.Task[None] | None = None

    async def acquire(self, spec: GroupSpec, replica_rank: int, owner_id: str, node_id: str = "") -> GroupInfo:
        """Leases a loaded group to `owner_id`: its own one, the warm one of a dead predecessor, else a new one.

        node_id: Ray's id of the owner's node. Groups on it come first, and a new one is placed on it when it has room:
        then messages stay on the node.

        Raises ParallelismError when there is no room in time, the workers' own error when loading fails. Minutes for a
        large model: `status` says how it goes.
        """
        await self._recover()
        self._starting += 1
        try:
            for group in await self._candidates(spec, replica_rank, owner_id, node_id):
                if await self._take_over(group, spec, owner_id):
                    group.preferred_node = node_id
                    return group.info
            return await self._new_group(spec, replica_rank, owner_id, node_id)
        finally:
            self._starting -= 1

    async def renew(self, group_id: str, owner_id: str, snapshot: bytes | None = None) -> dict[str, bytes]:
        """Notes that the owner lives; keeps the replica's latest metrics snapshot (opaque here) and gives back all of
        its application, by owner. Only metrics depend on it: the lease itself is the members'.

        Raises WorkerGroupError when the group is unknown, StaleLeaseError when it has passed to another replica.
        """
        await self._recover()
        group = self._owned(group_id, owner_id)
        group.renew()
        app = self._snapshots.setdefault(group.spec.app, {})
        if snapshot is not None:
            app[group.owner_id] = snapshot
        return dict(app)

    async def snapshots(self, apps: Sequence[str]) -> dict[str, dict[str, bytes]]:
        """The replicas' latest metrics snapshots (opaque here), by application and owner."""
        return {app: dict(self._snapshots.get(app, {})) for app in apps}

    async def release(self, group_id: str, owner_id: str) -> None:
        """The owner is done with the group: it ends. Idempotent; raises StaleLeaseError for another than the owner."""
        await self._recover()
        if group_id not in self._groups:
            return
        group = self._owned(group_id, owner_id)
        async with group.lock:
            await self._end(group)

    async def rebuild(
        self, group_id: str, epoch: int, spec: GroupSpec, replica_rank: int, owner_id: str, node_id: str = ""
    ) -> GroupInfo:
        """A whole group again, with an empty KV cache, after a member died or failed. The epoch grows.

        `epoch`: the one that the owner knows. An order that the owner repeats, because its answer was lost, is the same
        order: whatever came of it, the owner gets a whole group. A group that is unknown by now (all its members
        are gone) is replaced by a new one. Raises StaleLeaseError when the group is another owner's.
        """
        await self._recover()
        self._starting += 1
        try:
            if group_id in self._silent:
                await self._trust_owner(group_id, epoch, spec, replica_rank, owner_id)
            if group_id in self._groups:
                group = self._owned(group_id, owner_id)
                async with group.lock:
                    if group.state == "ready":
                        await _rebuild_from(group, epoch)
                        return group.info
        finally:
            self._starting -= 1
            self._forget_ended()
        return await self.acquire(spec, replica_rank, owner_id, node_id)

    async def ping(self) -> None:
        """Answers as long as this process runs."""

    async def status(self) -> RegistryStatus:
        await self._recover()
        return RegistryStatus([group.status for group in self._groups.values()], os.getpid())

    def _owned(self, group_id: str, owner_id: str) -> Group:
        group = self._groups.get(group_id)
        if group is None:
            raise WorkerGroupError(f"The registry does not know the worker group {group_id}.")
        if group.owner_id != owner_id:
            raise StaleLeaseError(f"The worker group {group_id} has passed to another replica.")
        return group

    async def _candidates(self, spec: GroupSpec, replica_rank: int, owner_id: str, node_id: str) -> list[Group]:
        """Groups of this application that may be leased: the owner's own, then those that a successor may find
        abandoned, those on its node first, its own rank's before others."""
        mine = [group for group in self._groups.values() if group.spec.app == spec.app and group.state == "ready"]
        nodes = await asyncio.to_thread(nodes_of_placements) if mine else {}

        def distance(group: Group) -> tuple[bool, bool, bool]:
            is_far = nodes.get(group.placement_id) != node_id
            return group.owner_id != owner_id, is_far, group.replica_rank != replica_rank

        return sorted(mine, key=distance)

    async def _take_over(self, group: Group, spec: GroupSpec, owner_id: str) -> bool:
        """Takes a group whose owner is dead; waits long enough to know. False: it has one, or was unfit and ended."""
        async with group.lock:
            if group.state != "ready" or not (group.owner_id == owner_id or await _is_abandoned(group)):
                return False
            if group.spec.fingerprint != spec.fingerprint:
                await self._end(group)
                return False
            self._snapshots.get(spec.app, {}).pop(group.owner_id, None)
            group.owner_id, group.rebuilt_from = owner_id, 0
            try:
                await groups.make_whole(group)
            except (RayError, MaxRayError) as error:
                _LOG.warning("group %s could not be taken over: %s", group.group_id, error)
                self._forget_ended()
                return False
            return True

    async def _new_group(self, spec: GroupSpec, replica_rank: int, owner_id: str, node_id: str) -> GroupInfo:
        group = Group(new_group_id(spec, replica_rank), spec, replica_rank, owner_id, preferred_node=node_id)
        self._groups[group.group_id] = group
        try:
            async with group.lock:
                await groups.start(group)
        finally:
            self._forget_ended()
        return group.info

    async def _end(self, group: Group) -> None:
        """Under the group's lock."""
        await groups.end(group)
        self._snapshots.get(group.spec.app, {}).pop(group.owner_id, None)
        self._forget_ended()

    def _forget_ended(self) -> None:
        self._groups = {name: group for name, group in self._groups.items() if group.state != "ended"}

    async def _recover(self) -> None:
        """Once: reads back the groups that were there before this process."""
        if self._recovered is None:
            self._recovered = asyncio.create_task(self._read_back())
            self._janitor = asyncio.create_task(self._tidy())
        await self._recovered

    async def _read_back(self) -> None:
        found = await find_groups()
        self._groups |= {name: group.record() for name, group in found.items() if group.statuses}
        self._silent = {name: group for name, group in found.items() if not group.statuses}
        for name, placement in (await asyncio.to_thread(placements_of_groups)).items():
            if name not in found and name not in self._groups:
                await asyncio.to_thread(remove_group_placement, placement)

    async def _trust_owner(self, group_id: str, epoch: int, spec: GroupSpec, replica_rank: int, owner_id: str) -> None:
        """A group whose members do not answer gets its record from its owner's order."""
        placement_id = (await asyncio.to_thread(placements_of_groups)).get(group_id)
        found = self._silent.pop(group_id, None)
        if found is not None and placement_id is not None:
            self._groups[group_id] = found.record_of(spec, replica_rank, owner_id, epoch, placement_id)

    async def _tidy(self) -> None:
        """Forgets groups whose members ended themselves; ends the registry when it is not needed."""
        while True:
            await asyncio.sleep(_TIDY_EVERY_S)
            for group in list(self._groups.values()):
                if _is_stale(group) and not group.lock.locked():
                    await self._end_if_unowned(group)
            if self._silent and time.monotonic() - self._asked_again_at > _ASK_AGAIN_EVERY_S:
                await self._ask_silent_again()
            if self._groups or self._starting or self._silent:
                self._last_needed = time.monotonic()
            elif time.monotonic() - self._last_needed > _IDLE_END_S:
                ray.kill(ray.get_runtime_context().current_actor, no_restart=True)

    async def _end_if_unowned(self, group: Group) -> None:
        """The registry may have been stopped, or out of the owner's reach: what the members heard counts."""
        async with group.lock:
            group.renew(await groups.lease_age_s(group))
            if _is_stale(group):
                await self._end(group)

    async def _ask_silent_again(self) -> None:
        self._asked_again_at = time.monotonic()
        found = await find_groups()
        for name in list(self._silent):
            group = found.get(name)
            if group is not None and not group.statuses:
                continue
            if self._silent.pop(name, None) is None:
                continue  # its owner was first
            if group is not None:
                self._groups[name] = group.record()
            elif placement_id := (await asyncio.to_thread(placements_of_groups)).get(name):
                await asyncio.to_thread(remove_group_placement, placement_id)


async def _rebuild_from(group: Group, epoch: int) -> None:
    """Answers the owner's order of that epoch, unless it has been answered. Under the group's lock."""
    if group.rebuilt_from != epoch:
        await groups.make_whole(group)
        group.rebuilt_from = epoch


def _is_stale(group: Group) -> bool:
    return group.state == "ready" and group.lease_age_s > group.spec.lease_grace_s + 2


async def _is_abandoned(group: Group) -> bool:
    """True when the owner does not renew for STALE_AFTER_S, neither here nor with any member.

    The owner renews here and with the members at different moments, so the members may have heard it last, and still
    before this question: only a sign of life after the question shows an owner that lives.
    """
    asked_at = time.monotonic()
    while group.renewed_at <= asked_at:
        if group.lease_age_s > STALE_AFTER_S:
            before = time.monotonic()
            age_s = await groups.lease_age_s(group)
            if age_s > STALE_AFTER_S:
                return True
            group.renew(age_s + time.monotonic() - before)  # never later than it was: the answer took time
        await asyncio.sleep(_LOOK_EVERY_S)
    return False
