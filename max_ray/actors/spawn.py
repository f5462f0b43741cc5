"""Makes Ray actors of the plain classes: names, namespace, lifetime and resources in one place.

Members of a group are detached (they survive the registry and any driver) and never restarted by Ray: a worker that
came back by itself would have no place in its group.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from max_ray.actors.kv_manager import KVManagerActor
from max_ray.actors.messages import NAMESPACE, ActorHandle, Membership
from max_ray.actors.model_worker import ModelWorker
from max_ray.actors.placement import rank_resources
from max_ray.actors.priority import ORDINARY_PRIORITY

_CONTROL_THREADS = 4
_remote: Any = ray.remote  # its overloads do not know concurrency groups


def spawn_worker(membership: Membership, placement: PlacementGroup) -> ActorHandle:
    """Starts one rank in its bundle; returns before its process is up."""
    resources = rank_resources(membership.spec.plan)
    options = _member_options(membership, placement, membership.rank or 0)
    actor = _remote(concurrency_groups={"control": _CONTROL_THREADS})(ModelWorker)
    return actor.options(
        num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0), max_concurrency=1, **options
    ).remote(membership)


def spawn_kv_manager(membership: Membership, placement: PlacementGroup) -> ActorHandle:
    """Starts the group's KV manager beside rank 0."""
    options = _member_options(membership, placement, 0)
    actor = _remote(concurrency_groups={"control": _CONTROL_THREADS})(KVManagerActor)
    return actor.options(num_cpus=0, max_concurrency=1, **options).remote(membership)


def _member_options(membership: Membership, placement: PlacementGroup, bundle: int) -> dict[str, Any]:
    return {
        "name": membership.name,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "max_restarts": 0,
        "runtime_env": {"env_vars": ORDINARY_PRIORITY},
        "scheduling_strategy": PlacementGroupSchedulingStrategy(
            placement_group=placement, placement_group_bundle_index=bundle
        ),
    }
