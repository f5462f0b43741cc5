"""Ragged batches over a paged cache of random keys, for the tests of attention on any backend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from max_ray import kernels
from max_ray.interfaces import KVCacheInputs
from tests.kernels import naive

SCALE = 0.3


@dataclass
class Batch:
    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    kv: KVCacheInputs
    qo_indptr: torch.Tensor

    def run(self, sliding_window: int | None = None, softcap: float | None = None) -> torch.Tensor:
        """As the first layer of a step, which plans anew: tests change the batch between runs."""
        self.kv.plans.clear()
        args = (self.q, self.k_cache, self.v_cache, self.kv, self.qo_indptr)
        return kernels.paged_attention(*args, scale=SCALE, sliding_window=sliding_window, logit_softcap=softcap)

    def expected(self, sliding_window: int | None = None, softcap: float | None = None) -> torch.Tensor:
        args = (self.q, self.k_cache, self.v_cache, self.kv, self.qo_indptr)
        return naive.attention(*args, SCALE, sliding_window, softcap)


def make_batch(
    rows: Sequence[tuple[int, int]],
    *,
    page_size: int = 4,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 8,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Batch:
    """rows: (tokens in the cache before, new tokens). Blocks are handed out in random order; whatever no row owns,
    inside a row's last block too, is NaN."""
    torch.manual_seed(seed)
    num_heads, num_kv_heads = heads
    num_blocks = [math.ceil((cached + new) / page_size) for cached, new in rows]
    order = (torch.randperm(sum(num_blocks)) + 1).tolist()
    cache_shape = (sum(num_blocks) + 1, page_size, num_kv_heads, head_dim)
    k_cache, v_cache = (torch.full(cache_shape, math.nan, dtype=dtype) for _ in range(2))
    tables = torch.zeros(len(rows), max(num_blocks, default=0), dtype=torch.int32)
    for row, (cached, new) in enumerate(rows):
        tables[row, : num_blocks[row]] = torch.tensor([order.pop() for _ in range(num_blocks[row])])
        for position in range(cached + new):
            slot = (int(tables[row, position // page_size]), position % page_size)
            k_cache[slot] = torch.randn(num_kv_heads, head_dim).to(dtype)
            v_cache[slot] = torch.randn(num_kv_heads, head_dim).to(dtype)
    indptr = torch.tensor([0, *(new for _, new in rows)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    kv = KVCacheInputs(
        keys=[k_cache],
        values=[v_cache],
        block_tables=tables,
        cache_lengths=torch.tensor([cached for cached, _ in rows], dtype=torch.int32),
        slot_mapping=torch.empty(0, dtype=torch.int64),
        max_kv_length=max((cached + new for cached, new in rows), default=0),
        page_size=page_size,
    )
    q = torch.randn(int(indptr[-1]), num_heads, head_dim).to(dtype)
    return Batch(q, k_cache, v_cache, kv, indptr)
