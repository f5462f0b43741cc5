"""Attention with sinks: a learned score a head that takes part in the softmax and has no value, so that a query may
attend to nothing. Scores are made, a slice of the queries at a time.

Axes: B rows, N queries of a row, S keys, H query heads, KVH key heads, D head_dim.
"""

from __future__ import annotations

import torch

_SCORES = 2**22  # held at once


def attention_with_sinks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    sinks: torch.Tensor,
) -> torch.Tensor:
    """q [B, H, N, D], k and v [B, KVH, S, D] -> [B, H, N, D], computed in float32.

    mask: bool, broadcastable to [B, H, N, S], True where a query sees a key. is_causal: query i sees keys 0 .. i.
    sinks: [H, N] or [H, 1].
    """
    num_rows, num_heads, num_queries, _ = q.shape
    num_keys, group = k.shape[2], num_heads // k.shape[1]
    k, v = (x.float().repeat_interleave(group, dim=1) for x in (k, v))
    if is_causal:
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device).tril_()
    sinks = sinks.float().expand(num_heads, num_queries)
    out = torch.empty_like(q)
    step = max(1, _SCORES // (num_rows * num_heads * num_keys))
    for start in range(0, num_queries, step):
        some = slice(start, min(start + step, num_queries))
        scores = q[:, :, some].float() @ k.mT * scale
        if mask is not None:
            visible = mask if mask.dim() < 2 or mask.shape[-2] == 1 else mask[..., some, :]
            scores.masked_fill_(~visible, -torch.inf)
        extra = sinks[:, some].expand(num_rows, -1, -1).unsqueeze(-1)  # [B, H, n, 1]
        weights = torch.cat((scores, extra), dim=-1).softmax(-1)[..., :-1]
        out[:, :, some] = weights @ v
    return out
