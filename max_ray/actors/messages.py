"""What the actors tell each other: the order for a worker group, and the description of a living one.

    GroupSpec    what a replica orders: which model, how many ranks, how long a lease lasts
    Membership   what every member of a group knows about it, so that a restarted registry can read it back
    GroupInfo    what a replica gets: handles, and the epoch under which it may use them

An *epoch* counts the owners of a group. Every call of a replica carries the epoch it was given; members refuse older
ones, so a replica that was taken for dead cannot disturb its successor.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

from max_ray.planning.plan import PipelinePlan

NAMESPACE = "max_ray"
REGISTRY_NAME = "registry"
_KV_MANAGER, _WORKER = "kv_manager", "worker_"
_MEMBER = re.compile(rf"(.+):(?:{_KV_MANAGER}|{_WORKER}(\d+)):(\d+)", re.DOTALL)

ActorHandle = Any
"""Ray's handle of an actor; its methods exist only at run time."""


@dataclass(frozen=True)
class GroupSpec:
    """An order for a worker group. Times in seconds.

    plan: resolved by the deployer, against the cluster's hardware; custom architectures travel inside it.
    lease_grace_s: a group that is not renewed for so long ends itself.
    start_timeout_s: placing and loading may take so long.
    collective_timeout_s: a step or a collective that takes longer counts as a dead group.
    phases: seconds of the phases of the start that lie before the order.
    worker_port_range: TCP ports for connections between nodes; None for any free one.
    """

    app: str
    plan: PipelinePlan
    lease_grace_s: float = 60.0
    start_timeout_s: float = 600.0
    collective_timeout_s: float = 120.0
    phases: Mapping[str, float] = field(default_factory=dict)
    worker_port_range: tuple[int, int] | None = None

    @property
    def fingerprint(self) -> str:
        """Equal for two orders that the same loaded group can serve."""
        plan = self.plan
        parts = [plan.config.model_dump_json(), plan.model_dir, plan.architecture, repr(plan.values)]
        parts += [code.module_name for code in plan.custom_code]
        return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()

    @property
    def has_kv_manager(self) -> bool:
        """False for embeddings: nothing is kept, so there is nothing to hand out."""
        return self.plan.kv_params.has_cache

    @property
    def size(self) -> int:
        """Ranks of the group."""
        return self.plan.tensor_parallel_size


@dataclass(frozen=True)
class Membership:
    """A member's place in its group. `rank` is None for the KV manager."""

    group_id: str
    spec: GroupSpec
    replica_rank: int
    owner_id: str
    placement_group_id: str
    rank: int | None = None
    epoch: int = 1

    def of_rank(self, rank: int) -> Membership:
        return replace(self, rank=rank)

    @property
    def name(self) -> str:
        """The member's actor name; the epoch of its birth is in it, as the name of a killed actor is freed late."""
        part = _KV_MANAGER if self.rank is None else f"{_WORKER}{self.rank}"
        return f"{self.group_id}:{part}:{self.epoch}"


def member_place(name: str) -> tuple[str, int | None, int] | None:
    """(group id, rank or None, epoch of its birth) of a member, from `Membership.name`; None for the name of another
    actor, such as an application's store."""
    match = _MEMBER.fullmatch(name)
    return None if match is None else (match[1], None if match[2] is None else int(match[2]), int(match[3]))


def new_group_id(spec: GroupSpec, replica_rank: int) -> str:
    """Unique; begins with the application's name."""
    return f"{spec.app}-{replica_rank}-{uuid4().hex[:8]}"


@dataclass(frozen=True)
class MemberStatus:
    """A member's answer to `describe`.

    Args:
        membership: Its place in the group.
        epoch: The owner's.
        owner_id: The replica that has the lease.
        healthy: False before it is loaded, and after a failed run.
        lease_age_s: Since the last renewal.
        pid: Of its process.
        num_blocks: KV blocks, of a worker those of its device.
        num_free_blocks: KV blocks that no request holds; of the KV manager only.
    """

    membership: Membership
    epoch: int
    owner_id: str
    healthy: bool
    lease_age_s: float
    pid: int
    num_blocks: int
    num_free_blocks: int = 0


@dataclass(frozen=True)
class GroupInfo:
    """A leased group. `workers[i]` is rank i; `num_blocks` is what the KV manager has, known once the group is loaded.
    `kv_manager` is None for a task without a KV cache.

    phases: seconds of the phases of its start, those of rank 0 included; those of the order alone after a restart of
    the registry.
    """

    group_id: str
    epoch: int
    workers: tuple[ActorHandle, ...]
    kv_manager: ActorHandle
    num_blocks: int
    spec: GroupSpec
    phases: Mapping[str, float] = field(default_factory=dict)


@dataclass
class GroupStatus:
    """One group in the registry's status."""

    group_id: str
    app: str
    replica_rank: int
    owner_id: str
    epoch: int
    state: str
    message: str
    lease_age_s: float


@dataclass
class RegistryStatus:
    """What the registry knows, for people and tests."""

    groups: list[GroupStatus] = field(default_factory=list)
    pid: int = 0
