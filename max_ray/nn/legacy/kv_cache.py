"""`max_ray.nn.legacy.kv_cache`: cache strategies, under the name the pipeline page uses."""

from max_ray.interfaces import KVCacheParams, KVCacheStrategy

__all__ = ["KVCacheParams", "KVCacheStrategy"]
