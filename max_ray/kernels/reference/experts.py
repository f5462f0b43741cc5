"""The weighted sum of a token's experts, choice by choice."""

from __future__ import annotations

import torch

from max_ray.kernels.reference.lookup import sum_rows


def sum_choices(y: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    summands = weighted_choices(y, places, weights)
    total = torch.empty_like(summands[0])
    sum_rows(summands, total)
    return total.view(len(places), y.shape[1]).to(y.dtype)


def weighted_choices(y: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """float32 [K, T * D]: what `sum_choices` adds, first choices first."""
    num_tokens, top_k = places.shape
    chosen = y.index_select(0, places.t().flatten()).view(top_k, num_tokens, y.shape[1])
    return (chosen * weights.t().float().unsqueeze(-1)).view(top_k, num_tokens * y.shape[1])
