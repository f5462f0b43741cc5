"""KVManagerActor: which request has which KV blocks of one worker group, as an actor of its own.

It outlives the replica that uses it: a successor starts a new epoch, and all blocks of the old owner come back. It is
asked once a scheduling decision, never once a token, over a connection that it opens in `serve`.
"""

from __future__ import annotations

import os
import threading

import ray

from max_ray.actors.lease import LOOK_S, Lease, watch
from max_ray.actors.messages import Membership, MemberStatus
from max_ray.actors.network import NodeAddress, this_node, tls_files
from max_ray.actors.placement import remove_group_placement
from max_ray.interfaces import CacheReply, CacheUpdate
from max_ray.kv_cache import PagedKVCacheManager
from max_ray.log import setup_logging
from max_ray.transport.address import Endpoint
from max_ray.transport.blocking import MemberConnection
from max_ray.transport.codec import decode_update, encode_error, encode_reply
from max_ray.transport.frames import TO_KV_MANAGER, MessageType
from max_ray.transport.handshake import KV_MANAGER, Member


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

    def serve(self, endpoint: Endpoint, epoch: int) -> None:
        """Connects to the replica and answers its updates until it closes. Raises StaleLeaseError when the lease passes
        on, TransportError when the replica cannot be reached or breaks the protocol."""
        self._lease.check(epoch)
        connection = MemberConnection.connect(endpoint, Member(KV_MANAGER, 0), TO_KV_MANAGER, tls_files())
        try:
            while not connection.is_closed:
                self._lease.check(epoch)
                for _, payload in connection.receive(LOOK_S):
                    number, request = decode_update(payload)
                    connection.send(MessageType.CACHE_REPLY, encode_reply(number, self._update(epoch, request)))
        except Exception as error:
            connection.send(MessageType.ERROR, encode_error(error))
            raise
        finally:
            connection.close()

    @ray.method(concurrency_group="control")
    def locate(self, epoch: int) -> NodeAddress:
        """The node of the KV manager. Raises StaleLeaseError for an older owner."""
        self._lease.check(epoch)
        return this_node()

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
        lease, manager = self._lease, self._manager
        num_blocks, num_free = (0, 0) if manager is None else (manager.total_num_blocks, manager.num_free_blocks)
        healthy = manager is not None
        return MemberStatus(
            self._membership, lease.epoch, lease.owner_id, healthy, lease.age_s, os.getpid(), num_blocks, num_free
        )

    def _update(self, epoch: int, request: CacheUpdate) -> CacheReply:
        with self._one_at_a_time:
            self._lease.check(epoch)
            return self._opened.update(request)

    @property
    def _opened(self) -> PagedKVCacheManager:
        assert self._manager is not None, "a KV manager was used before open()"
        return self._manager
