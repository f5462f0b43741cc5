"""What a new registry learns of the groups that were there before it: from the names of living actors, and from what
their members say.

The name of a member says its place (`Membership.name`). A member that does not answer in time is not dead: it may be
starting, stopped or slow. So it keeps its place in the record, and the next caller that needs it asks it again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import ray

from max_ray.actors import groups
from max_ray.actors.groups import Group
from max_ray.actors.messages import NAMESPACE, REGISTRY_NAME, ActorHandle, GroupSpec, MemberStatus, member_place


@dataclass(frozen=True)
class FoundMember:
    """A living actor of a group. `rank` is None for the KV manager, `epoch` that of its birth."""

    group_id: str
    rank: int | None
    epoch: int
    handle: ActorHandle


@dataclass(frozen=True)
class FoundGroup:
    """Its living members, and what those say who answered."""

    members: Sequence[FoundMember]
    statuses: Sequence[MemberStatus]

    def record(self) -> Group:
        """The group's record, from what a member knows of it. Some member has answered."""
        epoch = max(status.epoch for status in self.statuses)
        newest = next(status for status in self.statuses if status.epoch == epoch)
        known = newest.membership
        return self.record_of(known.spec, known.replica_rank, newest.owner_id, epoch, known.placement_group_id)

    def record_of(self, spec: GroupSpec, replica_rank: int, owner_id: str, epoch: int, placement_id: str) -> Group:
        """The group's record. Of several members for one place, of which the registry that died was replacing one, the
        younger has it."""
        by_place = {member.rank: member for member in sorted(self.members, key=lambda member: member.epoch)}
        workers = [by_place[rank].handle for rank in range(spec.size) if rank in by_place]
        return Group(
            self.members[0].group_id,
            spec,
            replica_rank,
            owner_id,
            epoch=max(epoch, *(member.epoch for member in self.members)),
            state="ready",
            placement_id=placement_id,
            workers=tuple(workers),
            kv_manager=by_place[None].handle if None in by_place else None,
            strays=[member.handle for member in self.members if by_place[member.rank] is not member],
            num_blocks=max((status.num_blocks for status in self.statuses), default=0),
        )


async def find_groups() -> dict[str, FoundGroup]:
    """All groups with a living member, by id. Seconds where members do not answer."""
    members = await asyncio.to_thread(_find_members)
    statuses = await asyncio.gather(*[groups.describe(member.handle) for member in members])
    found: dict[str, FoundGroup] = {}
    for group_id in {member.group_id for member in members}:
        own = [(m, s) for m, s in zip(members, statuses, strict=True) if m.group_id == group_id]
        found[group_id] = FoundGroup([m for m, _ in own], [s for _, s in own if s is not None])
    return found


def _find_members() -> list[FoundMember]:
    names = [
        entry["name"]
        for entry in ray.util.list_named_actors(True)
        if entry["namespace"] == NAMESPACE and entry["name"] != REGISTRY_NAME
    ]
    places = [(name, place) for name in names if (place := member_place(name)) is not None]
    return [FoundMember(*place, handle) for name, place in places if (handle := _handle(name)) is not None]


def _handle(name: str) -> ActorHandle | None:
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None
