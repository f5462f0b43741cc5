"""KVManagerActor: the block ledger of one worker group, as an actor of its own.

It outlives the replica that uses it: a successor starts a new epoch, and all blocks of the old owner come back. It is
asked once a scheduling decision, never once a token: over a direct line (`serve`), or by Ray calls from another node.
"""

from __future__ import annotations

import os
import threading

import ray

from max_ray.actors.lease import LOOK_S, Lease, watch
from max_ray.actors.line import WorkerLine
from max_ray.actors.messages import Membership, MemberStatus
from max_ray.actors.placement import remove_group_placement
from max_ray.interfaces import LeaseReply, LeaseRequest
from max_ray.kv_cache import PagedKVCacheManager
from max_ray.log import setup_logging


class KVManagerActor:
    """The plain class; `spawn.spawn_kv_manager` makes a Ray actor of it."""

    def __init__(self, membership: Membership) -> None:
        setup_logging()
        self._membership = membership
        self._manager: PagedKVCacheManager | None = None
        self._one_at_a_time = threading.Lock()  # of those who use the manager
        spec = membership.spec
        self._lease = Lease(membership.epoch, membership.owner_id, spec.lease_grace_s, spec.start_timeout_s)
        watch(self._lease, lambda: remove_group_placement(membership.placement_group_id), what=membership.name)

    def open(self, num_blocks: int) -> None:
        """Sets up the pool once the workers know how many blocks their devices hold."""
        plan = self._membership.spec.plan
        self._manager = PagedKVCacheManager(
            plan.kv_params, num_blocks, enable_prefix_caching=plan.config.enable_prefix_caching
        )

    def serve(self, path: str, epoch: int) -> None:
        """Answers exchanges on a line to the replica that listens at `path`, until that hangs up; returns at once where
        it cannot be reached. Raises StaleLeaseError when the lease passes on."""
        self._lease.check(epoch)
        line = WorkerLine.call(path, rank=None)
        if line is None:
            return
        try:
            while not line.is_closed:
                self._lease.check(epoch)
                order = line.next_order(LOOK_S)
                if order is not None:
                    number, request = order
                    line.send((number, self._exchange(epoch, request)))
        finally:
            line.close()

    @ray.method(concurrency_group="control")
    def exchange(self, epoch: int, request: LeaseRequest) -> LeaseReply:
        """One scheduling decision's commits, releases and wants. Raises StaleLeaseError for an older owner."""
        return self._exchange(epoch, request)

    @ray.method(concurrency_group="control")
    def renew(self, owner_id: str) -> None:
        """Raises StaleLeaseError for another than the present owner."""
        self._lease.renew(owner_id)

    @ray.method(concurrency_group="control")
    def adopt(self, epoch: int, owner_id: str) -> None:
        """A new owner, or new workers: every block comes back and the prefix cache is empty.

        Called only after the old owner's run has ended, so that no worker writes to a block that is given away.
        """
        with self._one_at_a_time:
            self._lease.pass_to(epoch, owner_id)
            self._opened.reset()

    @ray.method(concurrency_group="control")
    def describe(self) -> MemberStatus:
        lease = self._lease
        num_blocks = 0 if self._manager is None else self._manager.total_num_blocks
        healthy = self._manager is not None
        return MemberStatus(
            self._membership, lease.epoch, lease.owner_id, healthy, lease.age_s, os.getpid(), num_blocks
        )

    def _exchange(self, epoch: int, request: LeaseRequest) -> LeaseReply:
        with self._one_at_a_time:
            self._lease.check(epoch)
            return self._opened.exchange(request)

    @property
    def _opened(self) -> PagedKVCacheManager:
        assert self._manager is not None, "a KV manager was used before open()"
        return self._manager
