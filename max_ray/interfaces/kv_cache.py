"""Words of the paged KV cache: its shape, and the messages between a scheduling loop and the KV manager.

A *block* holds `page_size` consecutive tokens of one request, for all layers. The manager (PagedKVCacheManager,
in this process or in the KV manager actor) knows which request has which block. A loop asks for blocks in bulk: at most
one message a scheduling decision.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class KVCacheParams:
    """Shape of one rank's cache: per layer, keys and values of [num_blocks, page_size, num_kv_heads, head_dim].

    `num_kv_heads` counts the heads that one rank holds. `value_dim`: size of a value head, by default head_dim; 0 where
    the keys serve as values too (latent attention).
    """

    dtype: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    value_dim: int | None = None

    @property
    def value_head_dim(self) -> int:
        """Size of one value head."""
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def has_cache(self) -> bool:
        """False for a task that keeps no keys and values: it has no cache, no blocks and no KV manager."""
        return self.num_layers > 0

    @property
    def bytes_per_token(self) -> int:
        numbers = self.num_layers * self.num_kv_heads * (self.head_dim + self.value_head_dim)
        return numbers * _DTYPE_BYTES[self.dtype]

    @property
    def bytes_per_block(self) -> int:
        return self.bytes_per_token * self.page_size


@dataclass(slots=True)
class BlockRequest:
    """Blocks for one request: room for `num_tokens` tokens in all, not additional ones.

    Args:
        request_id: The request. One that the manager does not know is claimed first.
        num_tokens: Tokens that its block table must cover.
        block_hashes: Hashes of the full blocks of its prompt, only at the claim; the manager reuses the longest cached
            prefix of them.
    """

    request_id: str
    num_tokens: int
    block_hashes: list[bytes] | None = None


@dataclass(slots=True)
class BlockGrant:
    """The answer to one BlockRequest.

    Args:
        block_ids: int32 [n], the blocks added to the end of the request's table.
        cached_tokens: Leading tokens that already have keys and values: a multiple of the page size, only at the claim.
    """

    block_ids: npt.NDArray[np.int32]
    cached_tokens: int = 0


@dataclass(slots=True)
class CacheUpdate:
    """The message of one scheduling decision to the KV manager; applied in the order of the fields.

    Args:
        commits: (request id, index of the first block, hashes of that and the following full blocks). These blocks
            hold computed keys and values now and may serve as a prefix to other requests.
        releases: Ids of requests whose blocks are free again.
        requests: Granted in order. One that does not fit is refused and changes nothing; later ones are tried.
        cache_group: Kind of layers whose blocks these are. There is one kind today: 0.
    """

    commits: list[tuple[str, int, list[bytes]]] = field(default_factory=list)
    releases: list[str] = field(default_factory=list)
    requests: list[BlockRequest] = field(default_factory=list)
    cache_group: int = 0


@dataclass(slots=True)
class CacheReply:
    """The KV manager's answer to a CacheUpdate. All counts are of blocks, after the update.

    Args:
        grants: An entry for every BlockRequest, None where it was refused.
        num_free_blocks: Blocks that no request holds; cached ones are among them.
        num_blocks: Size of the cache.
        prefix_cache_hits: Blocks found in the prefix cache since the manager was made.
        prefix_cache_misses: Blocks looked up there and not found.
        prefix_cache_evictions: Cached blocks that were given out for other tokens.
    """

    grants: dict[str, BlockGrant | None]
    num_free_blocks: int
    num_blocks: int
    prefix_cache_hits: int = 0
    prefix_cache_misses: int = 0
    prefix_cache_evictions: int = 0


class KVCacheClient(Protocol):
    """What a scheduling loop knows of the KV manager, in this process or in another one."""

    @property
    def page_size(self) -> int: ...

    @property
    def num_blocks(self) -> int: ...

    async def update(self, request: CacheUpdate) -> CacheReply:
        """Applies commits, releases and requests. Raises StaleLeaseError when the lease went to another replica."""
