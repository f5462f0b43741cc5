"""LocalKVCacheClient: a KV manager of this process behind the interface that scheduling loops use."""

from __future__ import annotations

from max_ray.interfaces import CacheReply, CacheUpdate
from max_ray.kv_cache.manager import PagedKVCacheManager


class LocalKVCacheClient:
    """KVCacheClient over a PagedKVCacheManager, without a process border."""

    def __init__(self, manager: PagedKVCacheManager) -> None:
        self.manager = manager

    @property
    def page_size(self) -> int:
        return self.manager.page_size

    @property
    def num_blocks(self) -> int:
        return self.manager.total_num_blocks

    async def update(self, request: CacheUpdate) -> CacheReply:
        """See KVCacheClient. Never suspends."""
        return self.manager.update(request)
