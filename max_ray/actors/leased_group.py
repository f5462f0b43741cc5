"""LeasedGroup: a replica's hold on its worker group: take it, keep it, repair it, give it back.

Calls to the registry are repeated when it has died meanwhile: a new one reads back who has what.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayTaskError

from max_ray.actors.messages import NAMESPACE, REGISTRY_NAME, ActorHandle, GroupInfo, GroupSpec
from max_ray.actors.priority import ORDINARY_PRIORITY
from max_ray.actors.registry import RegistryActor
from max_ray.actors.worker_group import ActorKVLedger, GroupExecutor
from max_ray.errors import MaxRayError, WorkerGroupError
from max_ray.log import get_logger

_LOG = get_logger(__name__)
_ATTEMPTS = 20
_PAUSE_S = 0.25
_remote: Any = ray.remote
_Answer = TypeVar("_Answer")


def get_registry() -> ActorHandle:
    """The cluster's registry; started when there is none. Ray restarts it when it crashes."""
    return (
        _remote(RegistryActor)
        .options(
            name=REGISTRY_NAME,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            runtime_env={"env_vars": ORDINARY_PRIORITY},
            max_concurrency=1000,
        )
        .remote()
    )


class LeasedGroup:
    """`executor` and `ledger` stay the same objects when the group is rebuilt."""

    def __init__(self, info: GroupInfo, replica_rank: int, owner_id: str) -> None:
        self.executor = GroupExecutor(info)
        self.ledger = ActorKVLedger(info)
        self._replica_rank = replica_rank
        self._owner_id = owner_id
        self._repairing = asyncio.Lock()

    @classmethod
    async def acquire(cls, spec: GroupSpec, replica_rank: int, owner_id: str) -> LeasedGroup:
        """Waits until a loaded group is leased. Raises ParallelismError, WeightsError and what else loading raises."""
        info: GroupInfo = await ask_registry(lambda registry: registry.acquire.remote(spec, replica_rank, owner_id))
        return cls(info, replica_rank, owner_id)

    @property
    def info(self) -> GroupInfo:
        return self.executor.info

    @property
    def is_repairing(self) -> bool:
        return self._repairing.locked()

    async def renew(self, snapshot: bytes | None = None) -> dict[str, bytes]:
        """Renews the lease with the members and the registry; gives back the application's metrics snapshots.

        Raises WorkerGroupError when a member is dead, StaleLeaseError when the group has passed on.
        """
        info = self.info
        await self.executor.renew()
        answer: dict[str, bytes] = await ask_registry(
            lambda registry: registry.renew.remote(info.group_id, info.epoch, snapshot)
        )
        return answer

    async def rebuild(self) -> ActorKVLedger:
        """A whole group with an empty KV cache again, after a WorkerGroupError."""
        async with self._repairing:
            info = self.info
            fresh: GroupInfo = await ask_registry(
                lambda registry: registry.rebuild.remote(
                    info.group_id, info.epoch, info.spec, self._replica_rank, self._owner_id
                )
            )
            self.executor.adopt(fresh)
            self.ledger.adopt(fresh)
            return self.ledger

    async def release(self) -> None:
        """Ends the group."""
        await ask_registry(lambda registry: registry.release.remote(self.info.group_id, self.info.epoch))


async def ask_registry(call: Callable[[ActorHandle], Awaitable[_Answer]]) -> _Answer:
    """Calls the registry, again when it is dead or restarting. Raises the registry's own typed errors as such."""
    for _ in range(_ATTEMPTS):
        try:
            return await call(get_registry())
        except RayActorError as error:
            _LOG.warning("the registry does not answer (%s); trying again", type(error).__name__)
            await asyncio.sleep(_PAUSE_S)
        except RayTaskError as error:
            if isinstance(error.cause, MaxRayError):
                raise error.cause from None
            raise
    raise WorkerGroupError("The registry actor does not come up: look into Ray's logs.")
