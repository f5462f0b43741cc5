"""LocalKVLedger: a KV manager of this process behind the interface that scheduling loops use."""

from __future__ import annotations

from max_ray.interfaces import LeaseReply, LeaseRequest
from max_ray.kv_cache.manager import PagedKVCacheManager


class LocalKVLedger:
    """KVLedger over a PagedKVCacheManager, without a process border."""

    def __init__(self, manager: PagedKVCacheManager) -> None:
        self.manager = manager

    @property
    def page_size(self) -> int:
        return self.manager.page_size

    @property
    def total_blocks(self) -> int:
        return self.manager.total_num_blocks

    async def exchange(self, request: LeaseRequest) -> LeaseReply:
        """See KVLedger. Never suspends."""
        return self.manager.exchange(request)
