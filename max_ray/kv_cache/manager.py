"""PagedKVCacheManager: the ledger of which request has which blocks. Counts and tables only; the tensors live with
the workers.

Regions of one request's block table (P = page size):

    [0, num_committed)      full, computed, offered as a prefix (or reused from one); shared, never written again
    [num_committed, n)      the request's own: being filled, or leased ahead for the next run

Two ways in, one state: `claim/alloc/step/release` with contexts (the library), and `update` with messages
(a scheduling loop, here or across a process border). Every operation costs O(blocks touched). Not thread-safe.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from max_ray.errors import ConfigError, InputError, InsufficientBlocksError
from max_ray.interfaces import BlockGrant, BlockRequest, CacheReply, CacheUpdate, KVCacheParams, RequestID, TextContext
from max_ray.kv_cache.block_pool import BlockPool
from max_ray.kv_cache.prefix_cache import PrefixCache, commit_hashes, lookup_hashes


@dataclass(slots=True)
class KVCacheMetrics:
    """Counts since the start or the last `reset_metrics`. A hit or a miss is a full block looked up at a request's
    first lease; `cache_hit_tokens` is hits in tokens; an eviction is a cached block handed out for new contents."""

    cache_hits: int = 0
    cache_misses: int = 0
    cache_hit_tokens: int = 0
    evictions: int = 0

    @property
    def cache_hit_rate(self) -> float:
        looked_up = self.cache_hits + self.cache_misses
        return self.cache_hits / looked_up if looked_up else 0.0


@dataclass(slots=True)
class _Table:
    blocks: list[int] = field(default_factory=list)
    num_committed: int = 0


def tokens_to_cover(context: TextContext, num_steps: int) -> int:
    """Tokens that have keys and values after a run that gives `context` up to `num_steps` new tokens.

    These are the active tokens, those before them, and the new tokens but for the last one.
    """
    if context.prompt_in_chunks:
        return context.active_end
    return context.active_end + max(0, min(num_steps, context.remaining_new_tokens) - 1)


def insufficient_blocks(num_tokens: int, page_size: int, total_blocks: int) -> InsufficientBlocksError:
    """The error of a request that the whole cache cannot hold."""
    return InsufficientBlocksError(
        f"The request needs {-(-num_tokens // page_size)} KV cache blocks for {num_tokens} tokens, but the cache has "
        f"{total_blocks} blocks of {page_size} tokens. Shorten the request, or serve with a larger "
        f"--kv-cache-memory or --device-memory-utilization, or a larger --tensor-parallel-size."
    )


class PagedKVCacheManager:
    """Block pool, prefix cache and block tables of one worker group.

    params: shape of the cache; only `page_size` matters here. num_blocks: blocks that every rank has.
    """

    def __init__(self, params: KVCacheParams, num_blocks: int, enable_prefix_caching: bool = True) -> None:
        assert params.page_size >= 1, f"page_size must be at least 1, not {params.page_size}"
        self.params = params
        self.page_size = params.page_size
        self.enable_prefix_caching = enable_prefix_caching
        self.metrics = KVCacheMetrics()
        self._pool = BlockPool(num_blocks)
        self._prefix = PrefixCache()
        self._tables: dict[str, _Table] = {}

    # The verbs of the library.

    def claim(self, request: RequestID | TextContext | str, replica_idx: int | None = None) -> None:
        """Makes a request known, with no blocks yet. Raises InputError when it is known already."""
        _check_replica(replica_idx)
        key = _key(request)
        if key in self._tables:
            raise InputError(f"Request {key} has been claimed before; release it first.", param="request_id")
        self._tables[key] = _Table()

    def alloc(self, context: TextContext, num_steps: int = 1, replica_idx: int | None = None) -> None:
        """Gives a claimed request room for its active tokens and `num_steps` steps.

        The first time it reuses the longest cached prefix (whole blocks, at least one token left to run) and sets
        `processed_length` and `cached_prefix_length`. Always leaves `context.block_table` equal to the table here.
        Raises InsufficientBlocksError, and then changes nothing.
        """
        _check_replica(replica_idx)
        table = self._tables.get(context.request_id.value)
        if table is None:
            raise InputError(f"Request {context.request_id} is unknown; call claim() first.", param="request_id")
        if not len(context.block_table):
            self._alloc_first(context, table, num_steps)
            return
        added = self._extend(table, tokens_to_cover(context, num_steps), [])
        if added is None:
            raise self._no_room(tokens_to_cover(context, num_steps), table)
        _append_blocks(context, added)

    def step(self, contexts: Iterable[TextContext]) -> None:
        """After a run: the blocks that are full now may serve as a prefix. A block whose tokens another one holds
        already is given back, and the context's table names that other one."""
        for context in contexts:
            table = self._tables[context.request_id.value]
            hashes = commit_hashes(context, self.page_size, table.num_committed)
            if self._commit(table, table.num_committed, hashes, replace=True):
                context.block_table = np.array(table.blocks, dtype=np.int32)

    def release(self, request: RequestID | TextContext | str) -> None:
        """Gives back all blocks of a request. Idempotent; unknown ids are fine."""
        table = self._tables.pop(_key(request), None)
        if table is not None:
            self._free_blocks(table)

    def release_all(self) -> None:
        """Gives back all blocks of all requests; the prefix cache stays."""
        for key in list(self._tables):
            self.release(key)

    def reset_prefix_cache(self) -> None:
        """Forgets what the blocks hold; requests keep theirs."""
        self._prefix.clear()

    def reset(self) -> None:
        """Forgets all requests and the prefix cache: the workers' tensors are new."""
        self._prefix.clear()
        self.release_all()

    def reset_metrics(self) -> None:
        self.metrics = KVCacheMetrics()

    # Questions.

    def contains(self, request: RequestID | TextContext | str, replica_idx: int | None = None) -> bool:
        _check_replica(replica_idx)
        return _key(request) in self._tables

    def get_req_blocks(self, request: RequestID | TextContext | str, replica_idx: int | None = None) -> list[int]:
        """Block ids of a request, in order. Raises InputError for one that is not claimed."""
        _check_replica(replica_idx)
        table = self._tables.get(_key(request))
        if table is None:
            raise InputError(f"Request {_key(request)} holds no blocks: it is not claimed.", param="request_id")
        return list(table.blocks)

    @property
    def request_ids(self) -> list[str]:
        return list(self._tables)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no request holds; cached ones among them are given up when needed."""
        return self._pool.num_free

    @property
    def total_num_blocks(self) -> int:
        return self._pool.num_blocks

    @property
    def used_blocks_pct(self) -> float:
        """Share of the blocks that requests hold, from 0 to 1."""
        return 1.0 - self._pool.num_free / self._pool.num_blocks

    # The message of a scheduling loop.

    def update(self, request: CacheUpdate) -> CacheReply:
        """Applies commits, releases and block requests, in this order; see CacheUpdate."""
        assert request.cache_group == 0, f"cache group {request.cache_group} of a cache that has one"
        for request_id, first_block, hashes in request.commits:
            assert request_id in self._tables, f"commit for request {request_id}, which holds no blocks"
            self._commit(self._tables[request_id], first_block, hashes, replace=False)
        for request_id in request.releases:
            self.release(request_id)
        grants = {wanted.request_id: self._grant(wanted) for wanted in request.requests}
        assert len(grants) == len(request.requests), "two block requests for one request in one update"
        return CacheReply(
            grants=grants,
            num_free_blocks=self._pool.num_free,
            num_blocks=self._pool.num_blocks,
            prefix_cache_hits=self.metrics.cache_hits,
            prefix_cache_misses=self.metrics.cache_misses,
            prefix_cache_evictions=self.metrics.evictions,
        )

    def assert_invariants(self) -> None:
        """Every block is free or counted once a table that names it; no table names one twice; the hashes agree."""
        refs = Counter(block for table in self._tables.values() for block in table.blocks)
        self._pool.assert_invariants(refs)
        self._prefix.assert_invariants()
        for key, table in self._tables.items():
            assert len(set(table.blocks)) == len(table.blocks), f"request {key} holds a block twice"
            assert table.num_committed <= len(table.blocks), f"request {key} committed blocks it has not"

    # Helpers.

    def _alloc_first(self, context: TextContext, table: _Table, num_steps: int) -> None:
        """First lease of a request, or of one that was reset since (its old blocks go back first)."""
        assert context.processed_length == 0, "a context that comes from another cache must be reset() first"
        self._free_blocks(table)
        hashes = lookup_hashes(context, self.page_size)
        added = self._extend(table, tokens_to_cover(context, num_steps), hashes)
        if added is None:
            raise self._no_room(tokens_to_cover(context, num_steps), table)
        context.processed_length = table.num_committed * self.page_size
        if not context.tokens.generated_length:
            context.cached_prefix_length = context.processed_length
        _append_blocks(context, added)

    def _grant(self, wanted: BlockRequest) -> BlockGrant | None:
        table = self._tables.get(wanted.request_id)
        is_new = table is None
        table = table or _Table()
        added = self._extend(table, wanted.num_tokens, wanted.block_hashes or [])
        if added is None:
            return None
        self._tables[wanted.request_id] = table
        cached_tokens = table.num_committed * self.page_size if is_new else 0
        return BlockGrant(block_ids=np.array(added, dtype=np.int32), cached_tokens=cached_tokens)

    def _extend(self, table: _Table, num_tokens: int, hashes: list[bytes]) -> list[int] | None:
        """Makes `table` cover `num_tokens`, an empty one from the prefix cache first. The blocks added; None when
        there is no room, and then nothing has changed."""
        hashes = hashes[: (num_tokens - 1) // self.page_size] if not table.blocks else []
        reused = self._prefix.lookup(hashes) if self.enable_prefix_caching else []
        num_new = max(0, -(-num_tokens // self.page_size) - len(table.blocks) - len(reused))
        if num_new > self._pool.num_free - sum(map(self._pool.is_free, reused)):
            return None
        for block in reused:
            self._pool.touch(block)
        if self.enable_prefix_caching:
            self._count(len(reused), len(hashes) - len(reused))
        added = reused + [self._take() for _ in range(num_new)]
        table.blocks += added
        table.num_committed += len(reused)
        return added

    def _take(self) -> int:
        block = self._pool.alloc()
        self.metrics.evictions += self._prefix.evict(block)
        return block

    def _commit(self, table: _Table, first_block: int, hashes: list[bytes], *, replace: bool) -> bool:
        """Offers blocks as a prefix. With `replace` a duplicate gives way to the block that was there first; True
        when the table changed."""
        changed = False
        assert first_block + len(hashes) <= len(table.blocks), "commit beyond the block table"
        for index, key in enumerate(hashes if self.enable_prefix_caching else [], start=first_block):
            block = table.blocks[index]
            holder = self._prefix.insert(key, block)
            if holder != block and replace:
                self._pool.touch(holder)
                self._pool.free(block, keep=False)
                table.blocks[index] = holder
                changed = True
        table.num_committed = max(table.num_committed, first_block + len(hashes))
        return changed

    def _free_blocks(self, table: _Table) -> None:
        """The tail goes first, so that it is reused before the blocks that more prompts can begin with."""
        for block in reversed(table.blocks):
            self._pool.free(block, keep=block in self._prefix)
        table.blocks.clear()
        table.num_committed = 0

    def _count(self, hits: int, misses: int) -> None:
        self.metrics.cache_hits += hits
        self.metrics.cache_misses += misses
        self.metrics.cache_hit_tokens += hits * self.page_size

    def _no_room(self, num_tokens: int, table: _Table) -> InsufficientBlocksError:
        needed = -(-num_tokens // self.page_size)
        if needed > self.total_num_blocks:
            return insufficient_blocks(num_tokens, self.page_size, self.total_num_blocks)
        return InsufficientBlocksError(
            f"The request needs {needed} KV cache blocks for {num_tokens} tokens and has {len(table.blocks)}; "
            f"{self.num_free_blocks} of {self.total_num_blocks} blocks are free. Release other requests first, or "
            f"serve with a larger --kv-cache-memory or --device-memory-utilization, or a smaller --max-batch-size."
        )


def _append_blocks(context: TextContext, added: list[int]) -> None:
    if added:
        context.block_table = np.concatenate([context.block_table, np.array(added, dtype=np.int32)])


def _key(request: RequestID | TextContext | str) -> str:
    if isinstance(request, TextContext):
        return request.request_id.value
    return request.value if isinstance(request, RequestID) else request


def _check_replica(replica_idx: int | None) -> None:
    if replica_idx not in (None, 0):
        raise ConfigError(
            f"replica_idx must be None or 0, not {replica_idx}: a cache manager serves one worker group. "
            f"Run more replicas of the deployment instead."
        )
