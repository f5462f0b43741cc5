"""Rotary embedding and the cache write as one operation: here, the two after each other."""

from __future__ import annotations

import torch

from max_ray.kernels.reference.paged_cache import append_paged_kv_cache
from max_ray.kernels.reference.rope import apply_rope


def rope_and_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor | None,
    slot_mapping: torch.Tensor,
    *,
    interleaved: bool,
) -> torch.Tensor:
    q, k = apply_rope(q, k, cos_sin_cache, positions, interleaved=interleaved)
    append_paged_kv_cache(k, v, k_cache, v_cache, slot_mapping)
    return q
