"""KVManagerClient: a group's KV manager behind the contract that scheduling loops know.

Updates travel on a connection of their own: a Ray call costs some milliseconds, as much as a whole decode step, and the
workers wait for the answer to each scheduling decision.
"""

from __future__ import annotations

import asyncio
import time

from max_ray.actors.member_client import MemberClient
from max_ray.actors.member_connections import MemberConnections
from max_ray.actors.messages import GroupInfo
from max_ray.errors import WorkerGroupError
from max_ray.interfaces import CacheReply, CacheUpdate
from max_ray.transport.codec import decode_reply, encode_update
from max_ray.transport.frames import FROM_KV_MANAGER, MessageType
from max_ray.transport.handshake import KV_MANAGER, Member


class KVManagerConnection(MemberConnections):
    """An open connection. Made by `connect`; one event loop; one update at a time. After the KV manager's failure every
    update raises `error`."""

    def __init__(self, info: GroupInfo, answer_timeout_s: float) -> None:
        super().__init__(info)
        self._answer_timeout_s = answer_timeout_s
        self._number = 0
        self._sent_at = 0.0
        self._answer: asyncio.Future[CacheReply] | None = None

    @classmethod
    async def connect(cls, info: GroupInfo, answer_timeout_s: float) -> KVManagerConnection:
        """Asks the KV manager to connect. Raises WorkerGroupError, or StaleLeaseError when the lease has passed on."""
        connection = cls(info, answer_timeout_s)
        await connection.open({Member(KV_MANAGER, 0): info.kv_manager}, FROM_KV_MANAGER)
        return connection

    @property
    def is_busy(self) -> bool:
        return self._answer is not None

    async def update(self, request: CacheUpdate) -> CacheReply:
        """See KVCacheClient."""
        assert self._answer is None, "two updates at a time"
        if self.error is not None:
            raise self.error
        self._number += 1
        self._sent_at = time.monotonic()
        self._answer = asyncio.get_running_loop().create_future()
        try:
            self.send(MessageType.CACHE_UPDATE, encode_update(self._number, request))
            return await self._answer
        finally:
            self._answer = None

    def on_message(self, kind: int, payload: bytes) -> None:
        number, reply = decode_reply(payload)
        if number == self._number and self._answer is not None and not self._answer.done():
            self._answer.set_result(reply)  # else its caller has given up

    def on_failure(self) -> None:
        if self._answer is not None and not self._answer.done() and self.error is not None:
            self._answer.set_exception(self.error)

    def check_clock(self) -> None:
        if self._answer is not None and time.monotonic() - self._sent_at > self._answer_timeout_s:
            self.close(WorkerGroupError(f"The KV manager has not answered for {self._answer_timeout_s:.0f} s."))


class KVManagerClient(MemberClient[KVManagerConnection]):
    """A KVCacheClient over the group's KV manager actor; one update at a time.

    Args:
        info: The leased group.
        answer_timeout_s: A KV manager that does not answer for so long counts as dead. By default 10 s more than the
            group's collective timeout.
    """

    def __init__(self, info: GroupInfo, *, answer_timeout_s: float | None = None) -> None:
        super().__init__(info)
        self._answer_timeout_s = answer_timeout_s or info.spec.collective_timeout_s + 10

    @property
    def page_size(self) -> int:
        return self._info.spec.plan.kv_params.page_size

    @property
    def num_blocks(self) -> int:
        return self._info.num_blocks

    async def update(self, request: CacheUpdate) -> CacheReply:
        """Raises StaleLeaseError when the lease has passed on, WorkerGroupError when the manager is dead or cannot be
        reached."""
        return await (await self._connected()).update(request)

    async def _connect(self) -> KVManagerConnection:
        return await KVManagerConnection.connect(self._info, self._answer_timeout_s)
