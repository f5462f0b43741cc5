"""Attention over a paged cache of latents: one vector a token serves all heads, as key whole and as value in part.

Axes: T tokens, B rows, N queries of a row, S keys, H heads, L latent width, C = L + width of the rope key.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from max_ray.kernels.cpu.attention import _Call, _gather, _plan

if TYPE_CHECKING:
    from max_ray.interfaces.model import KVCacheInputs

_GROUP_BYTES = 2 * 2**20  # of gathered latents in one call
_MAX_SCORES = 2**22  # scores of one call: queries of long prompts go in pieces


def append_latent(latent: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    cache.view(-1, cache.shape[-1]).index_copy_(0, slot_mapping, latent)


def latent_attention(
    q: torch.Tensor, cache: torch.Tensor, kv: KVCacheInputs, qo_indptr: torch.Tensor, *, scale: float, latent_dim: int
) -> torch.Tensor:
    key_bytes = cache.shape[-1] * cache.element_size()
    calls = kv.plans.get(("latent", key_bytes))
    if calls is None:  # the first layer of a step plans for all
        calls = kv.plans["latent", key_bytes] = _plan(kv, qo_indptr, None, _GROUP_BYTES // key_bytes)
    out = torch.empty(*q.shape[:2], latent_dim, dtype=q.dtype, device=q.device)
    for call in calls:
        keys = _gather(cache, call.slots)  # [B, 1, S, C]
        if call.queries is not None:
            rows = q.index_select(0, call.queries).unsqueeze(1)  # [B, 1, H, C]: the heads stand where queries do
            values = keys[..., :latent_dim]
            attended = F.scaled_dot_product_attention(rows, keys, values, attn_mask=call.mask, scale=scale)
            out.index_copy_(0, call.queries, attended.squeeze(1))
        else:
            _prefill(out, q, keys, call, scale)
    return out


def _prefill(out: torch.Tensor, q: torch.Tensor, keys: torch.Tensor, call: _Call, scale: float) -> None:
    """Several queries of one row, N * H of them to one key head, a piece at a time."""
    row, num_heads, num_keys = call.row, q.shape[1], keys.shape[2]
    positions = torch.arange(num_keys, device=q.device)
    piece = max(1, _MAX_SCORES // (num_heads * num_keys))
    for start in range(row.start, row.stop, piece):
        stop = min(start + piece, row.stop)
        last_keys = torch.arange(start, stop, device=q.device) - row.stop + num_keys  # that each query sees
        mask = (positions <= last_keys.unsqueeze(1)).repeat_interleave(num_heads, 0)  # [n * H, S]
        queries = q[start:stop].reshape(1, 1, -1, q.shape[2])
        values = keys[..., : out.shape[2]]
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
        out[start:stop] = attended.view(stop - start, num_heads, -1)
