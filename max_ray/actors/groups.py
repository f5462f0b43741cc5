"""One worker group as the registry sees it: its record, and how it is started, taken over, rebuilt and ended."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import placement_group_table

from max_ray.actors.messages import ActorHandle, GroupInfo, GroupSpec, GroupStatus, Membership, MemberStatus
from max_ray.actors.placement import place_group, placement_of, remove_group_placement
from max_ray.actors.ray_errors import DEATHS
from max_ray.actors.spawn import spawn_kv_manager, spawn_worker
from max_ray.errors import MaxRayError, WorkerGroupError
from max_ray.log import get_logger
from max_ray.phases import phase

_LOG = get_logger(__name__)
_PROGRESS_S = 5.0
_PING_S = 5.0
_CALL_S = 60.0
"""Limit of a call that a member answers at once, on however busy a machine."""


@dataclass(eq=False)
class Group:
    """The registry's record of a group. `lock` serializes starting, taking over, rebuilding and ending.

    rebuilt_from: the epoch of the order that the present epoch is the answer to; 0 when it answers none.
    strays: members whose places others have, to be ended.
    preferred_node: Ray's id of the node to be placed on when it has room: its owner's. "" for any.
    """

    group_id: str
    spec: GroupSpec
    replica_rank: int
    owner_id: str
    epoch: int = 1
    rebuilt_from: int = 0
    state: str = "placing"
    message: str = ""
    placement_id: str = ""
    workers: tuple[ActorHandle, ...] = ()
    kv_manager: ActorHandle = None
    strays: list[ActorHandle] = field(default_factory=list)
    num_blocks: int = 0
    preferred_node: str = ""
    phases: dict[str, float] = field(default_factory=dict)
    renewed_at: float = field(default_factory=time.monotonic)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def info(self) -> GroupInfo:
        handles = (self.workers, self.kv_manager)
        phases = {**self.spec.phases, **self.phases}
        return GroupInfo(self.group_id, self.epoch, *handles, self.num_blocks, self.spec, phases)

    @property
    def lease_age_s(self) -> float:
        return time.monotonic() - self.renewed_at

    @property
    def status(self) -> GroupStatus:
        return GroupStatus(
            self.group_id,
            self.spec.app,
            self.replica_rank,
            self.owner_id,
            self.epoch,
            self.state,
            self.message,
            self.lease_age_s,
        )

    @property
    def members(self) -> list[ActorHandle]:
        return [*self.workers, *([] if self.kv_manager is None else [self.kv_manager])]

    def renew(self, age_s: float = 0.0) -> None:
        """The owner was heard of `age_s` seconds ago."""
        self.renewed_at = max(self.renewed_at, time.monotonic() - age_s)

    def progress(self, message: str) -> None:
        self.message = message
        _LOG.info("group %s: %s", self.group_id, message)


async def start(group: Group) -> None:
    """Places the group, spawns its members side by side, waits until all are loaded.

    Raises ParallelismError when it cannot be placed, the workers' own error when loading fails; then nothing is left.
    """
    try:
        if not group.placement_id or not _is_placed(group.placement_id):
            group.state = "placing"
            with phase("place", durations=group.phases):
                placement = await place_group(group.group_id, group.spec, group.progress, group.preferred_node)
            group.placement_id = placement.id.hex()
        group.state = "loading"
        _spawn_members(group)
        with phase("workers: start and load", durations=group.phases):
            await _load(group)
        await _renew_members(group)
    except (RayError, MaxRayError, TimeoutError, asyncio.CancelledError) as error:
        await end(group)
        raise _cause_of(error) from error
    group.renew()
    group.state, group.message = "ready", ""


def _is_placed(placement_id: str) -> bool:
    row = placement_group_table().get(placement_id)
    return row is not None and row["state"] == "CREATED"


def _spawn_members(group: Group) -> None:
    placement, membership = placement_of(group.placement_id), _membership(group)
    group.workers = tuple(spawn_worker(membership.of_rank(rank), placement) for rank in range(group.spec.size))
    if group.spec.has_kv_manager:
        group.kv_manager = spawn_kv_manager(membership, placement)


def _membership(group: Group) -> Membership:
    return Membership(
        group_id=group.group_id,
        spec=group.spec,
        replica_rank=group.replica_rank,
        owner_id=group.owner_id,
        placement_group_id=group.placement_id,
        epoch=group.epoch,
    )


async def _load(group: Group) -> None:
    """Loads all ranks at once, saying how it goes."""
    address = None
    if len(group.workers) > 1:
        address = await group.workers[0].reserve_address.remote()  # once its process is up
    work = asyncio.gather(*[worker.setup.remote(address) for worker in group.workers])
    started = time.monotonic()
    while not work.done():
        await asyncio.wait([work], timeout=_PROGRESS_S)
        elapsed = time.monotonic() - started
        if not work.done() and elapsed > group.spec.start_timeout_s:
            work.cancel()
            raise WorkerGroupError(
                f"The workers did not load the model within {group.spec.start_timeout_s:.0f} s: "
                "raise worker_start_timeout_s, or look into the workers' logs."
            )
        if not work.done():
            group.progress(f"loading on {len(group.workers)} worker(s) for {elapsed:.0f} s")
    group.num_blocks = min(await work)
    async with asyncio.timeout(_CALL_S):
        group.phases |= await group.workers[0].startup_phases.remote()
        if group.kv_manager is not None:
            await group.kv_manager.open.remote(group.num_blocks)


async def _renew_members(group: Group) -> None:
    """Puts all members on the grace period at once, in the name of an owner who will renew from now on."""
    async with asyncio.timeout(_CALL_S):
        await asyncio.gather(*[member.renew.remote(group.owner_id) for member in group.members])


def _cause_of(error: BaseException) -> BaseException:
    """The worker's own typed error where there is one: a user reads a sentence, not a Ray traceback."""
    cause = error.cause if isinstance(error, RayTaskError) else None
    if isinstance(cause, MaxRayError):
        return cause
    if isinstance(error, DEATHS):
        return WorkerGroupError(f"A worker died while it was starting: {str(error).splitlines()[0]}")
    if isinstance(error, TimeoutError):
        return WorkerGroupError(f"A member of the group did not answer for {_CALL_S:.0f} s.")
    return error


async def make_whole(group: Group) -> None:
    """Puts a group under a new epoch, with an empty KV cache: living members stay, dead or failed ones are replaced.

    Used when a replica takes over and when a member has died. The old owner's run ends before its blocks come back.
    Raises what `start` raises; then nothing is left of the group.
    """
    group.epoch += 1
    _kill(group.strays)
    group.strays = []
    try:
        async with asyncio.timeout(group.spec.collective_timeout_s + _CALL_S):
            await _adopt(group)
        await _renew_members(group)
    except (RayError, WorkerGroupError, TimeoutError) as error:
        group.progress(f"starting new workers: {error}")
        _kill(group.members)
        await start(group)
    group.renew()


async def _adopt(group: Group) -> None:
    """Hands the living members to the owner. Raises when a worker is dead, has failed, or does not stop its run."""
    statuses = await asyncio.gather(*[describe(worker) for worker in group.workers])
    if len(statuses) < group.spec.size or not all(status is not None and status.healthy for status in statuses):
        raise WorkerGroupError("a worker died or failed")
    group.num_blocks = min(status.num_blocks for status in statuses if status is not None)
    await asyncio.gather(*[worker.adopt.remote(group.epoch, group.owner_id) for worker in group.workers])
    if not group.spec.has_kv_manager:
        return
    manager = None if group.kv_manager is None else await describe(group.kv_manager)
    if manager is not None and manager.healthy:
        await group.kv_manager.adopt.remote(group.epoch, group.owner_id)
        return
    _kill([] if group.kv_manager is None else [group.kv_manager])
    group.kv_manager = spawn_kv_manager(_membership(group), placement_of(group.placement_id))
    await group.kv_manager.open.remote(group.num_blocks)


async def describe(member: ActorHandle) -> MemberStatus | None:
    """A member's own word; None when it is dead or does not answer in time."""
    try:
        return await asyncio.wait_for(_ask(member), _PING_S)
    except (RayError, TimeoutError):
        return None


async def lease_age_s(group: Group) -> float:
    """Seconds since the owner was heard of, by the member that heard of it last; infinite when no member answers."""
    statuses = await asyncio.gather(*map(describe, group.members))
    return min((status.lease_age_s for status in statuses if status is not None), default=math.inf)


async def _ask(member: ActorHandle) -> MemberStatus:
    status: MemberStatus = await member.describe.remote()
    return status


async def end(group: Group) -> None:
    """Ends every member and frees the placement. Idempotent."""
    group.state = "ended"
    _kill([*group.members, *group.strays])
    if group.placement_id:
        await asyncio.to_thread(remove_group_placement, group.placement_id)


def _kill(members: Sequence[ActorHandle]) -> None:
    for member in members:
        ray.kill(member, no_restart=True)
