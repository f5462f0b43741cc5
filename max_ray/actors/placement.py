"""Where a worker group is placed: one detached placement group, all ranks on one node."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import ray
from ray import PlacementGroupID
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from max_ray.actors.messages import GroupSpec
from max_ray.errors import ParallelismError
from max_ray.log import get_logger
from max_ray.planning.plan import PipelinePlan

_LOG = get_logger(__name__)
_CPU_SHARE = 0.01
"""CPUs that a CPU worker asks for: it uses many more, but whole ones would leave no room for a second group, or for
Serve, on a small machine."""


def rank_resources(plan: PipelinePlan) -> dict[str, float]:
    """What one rank asks Ray for."""
    return {"CPU": 1.0, "GPU": 1.0} if plan.device == "cuda" else {"CPU": _CPU_SHARE}


async def place_group(
    group_id: str, spec: GroupSpec, progress: Callable[[str], None], preferred_node: str = ""
) -> PlacementGroup:
    """A placement group with one bundle a rank.

    Args:
        group_id: The group that it is for.
        spec: Its order.
        progress: Called with what the order waits for.
        preferred_node: Ray's id of the node to take when it has room; "" for any.

    Raises ParallelismError when the cluster has no room in time.
    """
    bundles = [rank_resources(spec.plan)] * spec.size
    name = f"max_ray:{group_id}"
    group: PlacementGroup = placement_group(
        bundles, "STRICT_PACK", name, "detached", _soft_target_node_id=preferred_node or None
    )
    deadline = time.monotonic() + spec.start_timeout_s
    while not await asyncio.to_thread(group.wait, 2):
        message = _waiting_message(bundles)
        progress(message)
        if time.monotonic() > deadline:
            remove_placement_group(group)
            raise ParallelismError(f"{message} Gave up after {spec.start_timeout_s:.0f} s.")
    return group


def _waiting_message(bundles: list[dict[str, float]]) -> str:
    wanted = {name: sum(bundle[name] for bundle in bundles) for name in bundles[0]}
    cluster: Any = ray  # Ray leaves these two without types
    free = {name: round(cluster.available_resources().get(name, 0.0), 2) for name in wanted}
    total = {name: round(cluster.cluster_resources().get(name, 0.0), 2) for name in wanted}
    return (
        f"A worker group needs {wanted} on one node; the cluster has {total} in all and {free} free. "
        "Add a node, lower tensor_parallel_size, or end another application."
    )


def remove_group_placement(placement_group_id: str) -> None:
    """Removes a placement group, and with it every actor in it; one that is gone already is fine."""
    remove_placement_group(placement_of(placement_group_id))


def placement_of(placement_group_id: str) -> PlacementGroup:
    """The handle for an id in hex."""
    return PlacementGroup(PlacementGroupID(bytes.fromhex(placement_group_id)))


def nodes_of_placements() -> dict[str, str]:
    """Placement group id (hex) -> Ray's id of its node, of those that are placed; all bundles are on one node."""
    return {
        row["placement_group_id"]: next(iter(row["bundles_to_node_id"].values()))
        for row in placement_group_table().values()
        if row["state"] == "CREATED" and row["bundles_to_node_id"]
    }


def placements_of_groups() -> dict[str, str]:
    """Group id -> placement group id (hex) of all groups of max_ray that still have a placement."""
    return {
        row["name"].removeprefix("max_ray:"): row["placement_group_id"]
        for row in placement_group_table().values()
        if row["name"].startswith("max_ray:") and row["state"] != "REMOVED"
    }
