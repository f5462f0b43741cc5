"""Attention over a paged cache of latents, in two ways that give the same.

Absorbed, for decode rows and short chunks: W_uk goes into the query and W_uv into the result, and the heads attend
to the latents themselves. Expanded, for rows with many queries: the keys and values of every head are made from the
latents once, which is less work from some number of queries on (see `_is_expanded`).

Axes: T tokens, B rows, N queries of a row, S keys, H heads, L latent width, R width of the rope key, P width of the
part of a head without position, V of its value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from max_ray.kernels.reference.attention import _Call, _gather, _plan

if TYPE_CHECKING:
    from max_ray.interfaces.model_inputs import KVCacheInputs

_GROUP_BYTES = 2 * 2**20  # of gathered latents in one call
_MAX_NUMBERS = 2**22  # made at once, of scores, keys and values: long prompts go in pieces


def append_latent(latent: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    cache.view(-1, cache.shape[-1]).index_copy_(0, slot_mapping, latent)


def latent_attention(
    q: torch.Tensor, cache: torch.Tensor, kv: KVCacheInputs, qo_indptr: torch.Tensor, *, up: torch.Tensor, scale: float
) -> torch.Tensor:
    heads = _Heads(up, q.shape[2] - cache.shape[3] + up.shape[2], scale)
    key_bytes = cache.shape[3] * cache.element_size()
    calls = kv.plans.get(("latent", key_bytes))
    if calls is None:  # the first layer of a step plans for all
        calls = kv.plans["latent", key_bytes] = _plan(kv, qo_indptr, None, _GROUP_BYTES // key_bytes)
    out = torch.empty(*q.shape[:2], heads.value_dim, dtype=q.dtype, device=q.device)
    for call in calls:
        latents = _gather(cache, call.slots)[:, 0]  # [B, S, L + R]
        if call.queries is not None:
            rows = q.index_select(0, call.queries)
            out.index_copy_(0, call.queries, heads.absorbed(rows.unsqueeze(1), latents, call.mask).squeeze(1))
        else:
            out[call.row.start : call.row.stop] = _prefill(q[call.row.start : call.row.stop], latents, heads, call)
    return out


@dataclass(frozen=True, slots=True)
class _Heads:
    """up: [H, P + V, L], W_uk rows before W_uv rows in each head. plain_dim: P."""

    up: torch.Tensor
    plain_dim: int
    scale: float

    @property
    def value_dim(self) -> int:
        return self.up.shape[1] - self.plain_dim

    def absorbed(self, q: torch.Tensor, latents: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """q [B, N, H, P + R], latents [B, S, L + R] -> [B, N, H, V]. mask: bool, broadcastable to [B, 1, N * H, S]."""
        num_rows, num_queries, num_heads, _ = q.shape
        latent_dim = self.up.shape[2]
        plain = torch.einsum("bnhp,hpl->bnhl", q[..., : self.plain_dim], self.up[:, : self.plain_dim])
        flat = torch.cat((plain, q[..., self.plain_dim :]), dim=-1).view(num_rows, 1, num_queries * num_heads, -1)
        keys = latents.unsqueeze(1)
        attended = F.scaled_dot_product_attention(flat, keys, keys[..., :latent_dim], attn_mask=mask, scale=self.scale)
        attended = attended.view(num_rows, num_queries, num_heads, latent_dim)
        return torch.einsum("bnhl,hvl->bnhv", attended, self.up[:, self.plain_dim :])

    def expanded(self, q: torch.Tensor, latents: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """q [N, H, P + R], latents [S, L + R] of one row -> [N, H, V]. mask: bool [N, S]; None: query i sees 0 .. i."""
        latent_dim, num_heads = self.up.shape[2], q.shape[1]
        latent, rope = latents[:, :latent_dim], latents[:, latent_dim:]
        out = torch.empty(*q.shape[:2], self.value_dim, dtype=q.dtype, device=q.device)
        step = max(1, _MAX_NUMBERS // (len(latents) * max(self.up.shape[1] + rope.shape[1], len(q))))
        for start in range(0, num_heads, step):
            some = slice(start, min(start + step, num_heads))
            made = latent @ self.up[some].transpose(1, 2)  # [h, S, P + V]
            keys = torch.cat((made[..., : self.plain_dim], rope.expand(len(made), -1, -1)), dim=-1)[None]
            values, queries = made[None, ..., self.plain_dim :], q[:, some].transpose(0, 1)[None]
            attended = F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, is_causal=mask is None, scale=self.scale
            )
            out[:, some] = attended[0].transpose(0, 1)
        return out


def _prefill(q: torch.Tensor, latents: torch.Tensor, heads: _Heads, call: _Call) -> torch.Tensor:
    """Several queries of one row: q [N, H, P + R], latents [1, S, L + R] -> [N, H, V]."""
    (num_queries, num_heads, _), num_keys = q.shape, latents.shape[1]
    if _is_expanded(num_queries, num_keys, heads):
        return heads.expanded(q, latents[0], None if call.is_causal else call.mask)
    mask = call.mask
    if mask is None:
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device).tril_(num_keys - num_queries)
    piece = max(1, _MAX_NUMBERS // (num_heads * num_keys))
    pieces = [
        heads.absorbed(
            q[None, start : start + piece], latents, mask[start : start + piece].repeat_interleave(num_heads, 0)
        )[0]
        for start in range(0, num_queries, piece)
    ]
    return torch.cat(pieces)


def _is_expanded(num_queries: int, num_keys: int, heads: _Heads) -> bool:
    """Whether making the heads' keys and values is less work: multiplications a head are, with M = L (P + V),
    absorbed N S (2 L + R) + N M, expanded N S (P + R + V) + S M."""
    size, latent_dim = heads.up.shape[1:]
    return num_queries * num_keys * (2 * latent_dim - size) > (num_keys - num_queries) * latent_dim * size
