"""Words of the paged KV cache: its shape, and the lease messages between a scheduling loop and the block ledger.

A *block* holds `page_size` consecutive tokens of one request, for all layers. The ledger (PagedKVCacheManager, in
this process or in the KV manager actor) owns which request has which block; a loop asks for blocks in bulk, at most
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
class LeaseWant:
    """Room for `num_tokens` tokens in all (not additional) for one request.

    A request the ledger does not know is claimed first. `block_hashes`, only at that time: hashes of its full prompt
    blocks, to be looked up in the prefix cache; at least one token is always left to run.
    """

    request_id: str
    num_tokens: int
    block_hashes: list[bytes] | None = None


@dataclass(slots=True)
class LeaseGrant:
    """`block_ids`: the blocks added to the end of the request's table. `cached_tokens`: how many leading tokens
    already have keys and values (a multiple of the page size; only at claim)."""

    block_ids: npt.NDArray[np.int32]
    cached_tokens: int = 0


@dataclass(slots=True)
class LeaseRequest:
    """One scheduling decision's worth of news for the ledger; applied in the order of the fields.

    commits: (request id, index of the first block, hashes of that and the following full blocks): these blocks hold
    computed keys and values now and may serve as a prefix to others.
    wants: granted in order; a want that does not fit is refused (None) and leaves no trace, later ones are tried.
    """

    commits: list[tuple[str, int, list[bytes]]] = field(default_factory=list)
    releases: list[str] = field(default_factory=list)
    wants: list[LeaseWant] = field(default_factory=list)


@dataclass(slots=True)
class LeaseReply:
    """The ledger's answer. All counts are of blocks, after the exchange.

    Args:
        grants: One entry a want; None where it was refused.
        free_blocks: Blocks that no request holds; cached ones are among them.
        total_blocks: Size of the cache.
        prefix_cache_hits: Blocks found in the prefix cache since the ledger was made.
        prefix_cache_misses: Blocks looked up there and not found.
        prefix_cache_evictions: Cached blocks that were given out for other tokens.
    """

    grants: dict[str, LeaseGrant | None]
    free_blocks: int
    total_blocks: int
    prefix_cache_hits: int = 0
    prefix_cache_misses: int = 0
    prefix_cache_evictions: int = 0


class KVLedger(Protocol):
    """What a scheduling loop knows of the KV manager, wherever it lives."""

    @property
    def page_size(self) -> int: ...

    @property
    def total_blocks(self) -> int: ...

    async def exchange(self, request: LeaseRequest) -> LeaseReply:
        """Applies commits, releases and wants. Raises StaleLeaseError when the lease went to another replica."""
