"""Attention whose scores are soft-capped, which torch's own operation cannot do: scores are made, a slice at a time.

Axes: B rows, N queries of a row, S keys, H query heads, KVH key heads, D head_dim.
"""

from __future__ import annotations

import torch

_SCORES = 2**22  # held at once


def softcapped_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """softmax(softcap * tanh(scale * q k^T / softcap)) v in float32; q [B, H, N, D], k and v [B, KVH, S, D].

    mask: bool, broadcastable to [B, H, N, S], True where a query sees a key. is_causal: query i sees keys 0 .. i.
    """
    num_rows, num_heads, num_queries, _ = q.shape
    num_keys, group = k.shape[2], num_heads // k.shape[1]
    k, v = (x.float().repeat_interleave(group, dim=1) for x in (k, v))
    out = torch.empty_like(q)
    step = max(1, _SCORES // (num_rows * num_heads * num_keys))
    for start in range(0, num_queries, step):
        some = slice(start, min(start + step, num_queries))
        scores = torch.tanh(q[:, :, some].float() @ k.mT * (scale / softcap)) * softcap
        visible = _visible(mask, some, num_keys, q.device) if mask is not None or is_causal else None
        if visible is not None:
            scores.masked_fill_(~visible, -torch.inf)
        out[:, :, some] = scores.softmax(-1) @ v
    return out


def _visible(mask: torch.Tensor | None, queries: slice, num_keys: int, device: torch.device) -> torch.Tensor:
    """Rows `queries` of the mask, or of the causal one."""
    if mask is None:
        return (
            torch.arange(num_keys, device=device) <= torch.arange(queries.start, queries.stop, device=device)[:, None]
        )
    return mask if mask.shape[-2] == 1 else mask[..., queries, :]
