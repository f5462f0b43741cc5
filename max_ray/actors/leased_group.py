"""LeasedGroup: a replica's hold on its worker group: take it, keep it, repair it, give it back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from max_ray.actors.kv_manager_client import KVManagerClient
from max_ray.actors.lease_keeper import LeaseKeeper
from max_ray.actors.messages import GroupInfo, GroupSpec
from max_ray.actors.network import this_node
from max_ray.actors.registry_calls import ask_registry, order_from_registry
from max_ray.actors.worker_group import GroupExecutor
from max_ray.errors import MaxRayError

_RELEASE_LIMIT_S = 10.0
_RENEW_LIMIT_S = 5.0


class LeasedGroup:
    """`executor` and `kv_cache` stay the same objects when the group is rebuilt."""

    def __init__(self, info: GroupInfo, replica_rank: int, owner_id: str) -> None:
        self.executor = GroupExecutor(info)
        self.kv_cache = KVManagerClient(info)
        self._replica_rank = replica_rank
        self._owner_id = owner_id
        self._repairing = asyncio.Lock()
        self._keeper: LeaseKeeper | None = None

    @classmethod
    async def acquire(cls, spec: GroupSpec, replica_rank: int, owner_id: str) -> LeasedGroup:
        """Waits until a loaded group is leased; `keep` it then. Raises ParallelismError, WeightsError and what else
        loading raises."""
        node_id = this_node().node_id
        info: GroupInfo = await order_from_registry(
            lambda registry: registry.acquire.remote(spec, replica_rank, owner_id, node_id)
        )
        return cls(info, replica_rank, owner_id)

    @property
    def info(self) -> GroupInfo:
        return self.executor.info

    @property
    def silence_s(self) -> float:
        """Seconds since the last sign of life of the member that has been silent longest."""
        return 0.0 if self._keeper is None else self._keeper.silence_s

    def keep(self, report: Callable[[MaxRayError], None]) -> None:
        """Renews the lease with all members from now on, whatever else goes on here.

        report: called on this event loop with WorkerGroupError when a member of the present group is dead or silent,
        and with StaleLeaseError when the group has passed to another replica. What waits for the group gets the error.
        """
        loop = asyncio.get_running_loop()

        def found(info: GroupInfo, error: MaxRayError) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._on_failure, info, error, report)

        self._keeper = LeaseKeeper(self.info, self._owner_id, found)

    async def renew(self, snapshot: bytes | None = None) -> dict[str, bytes]:
        """Tells the registry that the owner lives; gives back the application's metrics snapshots, by owner.

        Raises WorkerGroupError when the registry does not answer or does not know the group, StaleLeaseError when the
        group has passed on.
        """
        answer: dict[str, bytes] = await ask_registry(
            lambda registry: registry.renew.remote(self.info.group_id, self._owner_id, snapshot), _RENEW_LIMIT_S
        )
        return answer

    async def rebuild(self) -> KVManagerClient:
        """A whole group with an empty KV cache again, after a WorkerGroupError. Raises what loading raises,
        WorkerGroupError when no registry comes up, StaleLeaseError when the group is another replica's."""
        async with self._repairing:
            info, node_id = self.info, this_node().node_id
            fresh: GroupInfo = await order_from_registry(
                lambda registry: registry.rebuild.remote(
                    info.group_id, info.epoch, info.spec, self._replica_rank, self._owner_id, node_id
                )
            )
            self.executor.adopt(fresh)
            self.kv_cache.adopt(fresh)
            if self._keeper is not None:
                self._keeper.adopt(fresh)
            return self.kv_cache

    async def release(self) -> None:
        """Ends the group. Raises WorkerGroupError when the registry does not answer: then the group ends by itself."""
        self.let_go()
        await ask_registry(
            lambda registry: registry.release.remote(self.info.group_id, self._owner_id), _RELEASE_LIMIT_S
        )

    def let_go(self) -> None:
        """Renews no more: the group is a successor's, or ends itself. Idempotent."""
        if self._keeper is not None:
            self._keeper.stop()

    def _on_failure(self, info: GroupInfo, error: MaxRayError, report: Callable[[MaxRayError], None]) -> None:
        """Of the present group only: what was found out about the one before has been mended, or is just being."""
        if info is self.info and not self._repairing.locked():
            self.executor.fail(error)
            self.kv_cache.fail(error)
            report(error)
