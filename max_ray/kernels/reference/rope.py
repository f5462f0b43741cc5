"""Rotary position embedding. Axes: T tokens, H heads, R rotated width (at most head_dim D), P = R / 2 pairs."""

from __future__ import annotations

import torch


def apply_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor | None,
    *,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = cos_sin_cache if positions is None else cos_sin_cache[positions]
    cos, sin = rows.to(q.dtype).unsqueeze(1).chunk(2, dim=-1)  # [T, 1, P] each
    return _rotate(q, cos, sin, interleaved), _rotate(k, cos, sin, interleaved)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    num_pairs = cos.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if interleaved:
        first, second = slice(0, 2 * num_pairs, 2), slice(1, 2 * num_pairs, 2)
    else:
        first, second = slice(0, num_pairs), slice(num_pairs, 2 * num_pairs)
    a, b = x[..., first], x[..., second]
    torch.sub(a * cos, b * sin, out=out[..., first])
    torch.add(b * cos, a * sin, out=out[..., second])
    out[..., 2 * num_pairs :] = x[..., 2 * num_pairs :]
    return out
