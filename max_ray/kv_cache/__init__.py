"""The paged KV cache as a ledger: block pool, prefix cache, block tables. No tensors: those live with the workers."""

from max_ray.kv_cache.block_pool import BlockPool
from max_ray.kv_cache.client import LocalKVCacheClient
from max_ray.kv_cache.manager import KVCacheMetrics, PagedKVCacheManager, insufficient_blocks, tokens_to_cover
from max_ray.kv_cache.prefix_cache import (
    PrefixCache,
    commit_hashes,
    extend_block_hashes,
    hash_blocks,
    lookup_hashes,
)

__all__ = [
    "BlockPool",
    "KVCacheMetrics",
    "LocalKVCacheClient",
    "PagedKVCacheManager",
    "PrefixCache",
    "commit_hashes",
    "extend_block_hashes",
    "hash_blocks",
    "insufficient_blocks",
    "lookup_hashes",
    "tokens_to_cover",
]
