"""Causal attention over a paged cache. Axes: T tokens, B rows, S keys, H query heads, KVH key heads, D head_dim."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from max_ray.interfaces.model import KVCacheInputs


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv: KVCacheInputs,
    qo_indptr: torch.Tensor,
    *,
    scale: float,
    sliding_window: int | None,
) -> torch.Tensor:
    out = torch.empty_like(q)
    indptr = qo_indptr.tolist()
    for row, cache_len in enumerate(kv.cache_lengths.tolist()):
        start, stop = indptr[row], indptr[row + 1]
        if start == stop:
            continue
        kv_len = cache_len + stop - start
        blocks = kv.block_tables[row, : -(-kv_len // kv.page_size)]
        k = k_cache[blocks].flatten(0, 1)[:kv_len]
        v = v_cache[blocks].flatten(0, 1)[:kv_len]
        mask = None
        if stop - start > 1 or sliding_window is not None:
            positions = torch.arange(cache_len, kv_len, device=q.device)[:, None]
            keys = torch.arange(kv_len, device=q.device)[None]
            mask = keys <= positions
            if sliding_window is not None:
                mask &= keys > positions - sliding_window
        out[start:stop] = F.scaled_dot_product_attention(
            q[None, start:stop].transpose(1, 2),
            k[None].transpose(1, 2),
            v[None].transpose(1, 2),
            attn_mask=mask,
            scale=scale,
            enable_gqa=True,
        )[0].transpose(0, 1)
    return out
