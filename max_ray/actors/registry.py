"""RegistryActor: which worker groups there are, and which replica has which. One a cluster, named.

It records plans and places groups, and never builds a model (nor imports torch). Its table can be lost: the members of
a group know everything about it, and a restarted registry asks them. It ends itself when there has been no group for a
while.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import RayError

from max_ray.actors import groups
from max_ray.actors.groups import Group
from max_ray.actors.messages import NAMESPACE, REGISTRY_NAME, GroupInfo, GroupSpec, MemberStatus, RegistryStatus
from max_ray.actors.placement import placements_of_groups, remove_group_placement
from max_ray.errors import MaxRayError, StaleLeaseError
from max_ray.log import get_logger, setup_logging

_LOG = get_logger(__name__)
STALE_AFTER_S = 3.0
"""An owner that has not renewed for so long is taken for dead when a successor asks; owners renew every second."""
_IDLE_END_S = 5.0
_START_GRACE_S = 30.0


class RegistryActor:
    """The plain class; `spawn.get_registry` makes a Ray actor of it."""

    def __init__(self) -> None:
        setup_logging()
        self._groups: dict[str, Group] = {}
        self._snapshots: dict[str, dict[str, bytes]] = {}
        self._last_needed = time.monotonic() + _START_GRACE_S
        self._recovered: asyncio.Task[None] | None = None
        self._starting = 0
        self._janitor: asyncio.Task[None] | None = None

    async def acquire(self, spec: GroupSpec, replica_rank: int, owner_id: str) -> GroupInfo:
        """Leases a loaded group to `owner_id`: the warm one of a dead predecessor, else a new one.

        Raises ParallelismError when there is no room in time, the workers' own error when loading fails. Minutes for a
        large model: `status` says how it goes.
        """
        await self._recover()
        self._starting += 1
        try:
            for group in self._candidates(spec, replica_rank):
                if await self._take_over(group, spec, owner_id):
                    return group.info
            return await self._new_group(spec, replica_rank, owner_id)
        finally:
            self._starting -= 1

    async def renew(self, group_id: str, epoch: int, snapshot: bytes | None = None) -> dict[str, bytes]:
        """Renews a lease; keeps the replica's latest metrics snapshot (opaque here) and gives back all of its
        application, by owner.

        Raises StaleLeaseError when the group is unknown or has passed to another replica.
        """
        await self._recover()
        group = self._owned(group_id, epoch)
        group.renew()
        app = self._snapshots.setdefault(group.spec.app, {})
        if snapshot is not None:
            app[group.owner_id] = snapshot
        return dict(app)

    async def release(self, group_id: str, epoch: int) -> None:
        """The owner is done with the group: it ends. Idempotent; raises StaleLeaseError for an older owner."""
        await self._recover()
        if group_id not in self._groups:
            return
        group = self._owned(group_id, epoch)
        async with group.lock:
            await self._end(group)

    async def rebuild(self, group_id: str, epoch: int, spec: GroupSpec, replica_rank: int, owner_id: str) -> GroupInfo:
        """A whole group again, with an empty KV cache, after a member died or failed. The epoch grows.

        A group that nobody knows any more (all its members are gone) is replaced by a new one.
        """
        await self._recover()
        if group_id not in self._groups:
            return await self.acquire(spec, replica_rank, owner_id)
        group = self._owned(group_id, epoch)
        self._starting += 1
        try:
            async with group.lock:
                await groups.make_whole(group)
        finally:
            self._starting -= 1
            self._forget_ended()
        return group.info

    async def status(self) -> RegistryStatus:
        await self._recover()
        return RegistryStatus([group.status for group in self._groups.values()], os.getpid())

    def _owned(self, group_id: str, epoch: int) -> Group:
        group = self._groups.get(group_id)
        if group is None or group.epoch != epoch:
            raise StaleLeaseError(f"The worker group {group_id} is gone or has passed to another replica.")
        return group

    def _candidates(self, spec: GroupSpec, replica_rank: int) -> list[Group]:
        """Groups of this application that a successor may find abandoned, its own rank's first."""
        mine = [group for group in self._groups.values() if group.spec.app == spec.app and group.state == "ready"]
        return sorted(mine, key=lambda group: group.replica_rank != replica_rank)

    async def _take_over(self, group: Group, spec: GroupSpec, owner_id: str) -> bool:
        """Takes a group whose owner is dead; waits long enough to know. False: it is somebody's, or unfit and ended."""
        async with group.lock:
            if group.state != "ready" or not await _is_abandoned(group):
                return False
            if group.spec.fingerprint != spec.fingerprint:
                await self._end(group)
                return False
            self._snapshots.get(spec.app, {}).pop(group.owner_id, None)
            group.owner_id = owner_id
            try:
                await groups.make_whole(group)
            except (RayError, MaxRayError) as error:
                _LOG.warning("group %s could not be taken over: %s", group.group_id, error)
                self._forget_ended()
                return False
            return True

    async def _new_group(self, spec: GroupSpec, replica_rank: int, owner_id: str) -> GroupInfo:
        group = Group(f"{spec.app}-{replica_rank}-{uuid4().hex[:8]}", spec, replica_rank, owner_id)
        self._groups[group.group_id] = group
        try:
            async with group.lock:
                await groups.start(group)
        finally:
            self._forget_ended()
        return group.info

    async def _end(self, group: Group) -> None:
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
        names = [
            entry["name"]
            for entry in await asyncio.to_thread(ray.util.list_named_actors, True)
            if entry["namespace"] == NAMESPACE and entry["name"] != REGISTRY_NAME
        ]
        handles = [handle for name in names if (handle := _find(name)) is not None]
        found: dict[str, list[tuple[Any, MemberStatus]]] = {}
        for handle, status in zip(handles, await asyncio.gather(*map(groups.describe, handles)), strict=True):
            if status is not None:
                found.setdefault(status.membership.group_id, []).append((handle, status))
        self._groups = {name: _restored(members) for name, members in found.items()}
        for name, placement in (await asyncio.to_thread(placements_of_groups)).items():
            if name not in self._groups:
                await asyncio.to_thread(remove_group_placement, placement)

    async def _tidy(self) -> None:
        """Forgets groups whose members ended themselves; ends the registry when it is not needed."""
        while True:
            await asyncio.sleep(1)
            for group in list(self._groups.values()):
                if group.state == "ready" and group.lease_age_s > group.spec.lease_grace_s + 2:
                    await self._end(group)
            if self._groups or self._starting:
                self._last_needed = time.monotonic()
            elif time.monotonic() - self._last_needed > _IDLE_END_S:
                ray.kill(ray.get_runtime_context().current_actor, no_restart=True)


async def _is_abandoned(group: Group) -> bool:
    """True when the owner does not renew for STALE_AFTER_S."""
    before = group.renewed_at
    while group.renewed_at == before:
        if group.lease_age_s > STALE_AFTER_S:
            return True
        await asyncio.sleep(0.1)
    return False


def _find(name: str) -> Any:
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None


def _restored(members: list[tuple[Any, MemberStatus]]) -> Group:
    """A group's record from what its living members say; missing ones make it not whole."""
    epoch = max(status.epoch for _, status in members)
    newest = next(status for _, status in members if status.epoch == epoch)
    membership = newest.membership
    group = Group(
        membership.group_id,
        membership.spec,
        membership.replica_rank,
        newest.owner_id,
        epoch=epoch,
        state="ready",
        placement_id=membership.placement_group_id,
        num_blocks=max(status.num_blocks for _, status in members),
    )
    ranked = [(status.membership.rank, handle) for handle, status in members]
    group.workers = tuple(h for rank, h in sorted(((r, h) for r, h in ranked if r is not None), key=lambda x: x[0]))
    group.kv_manager = next((handle for rank, handle in ranked if rank is None), None)
    return group
