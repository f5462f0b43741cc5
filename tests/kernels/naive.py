"""Naive kernels: one number at a time where that is bearable, float64, no batching. Backends are held against them."""

from __future__ import annotations

import math

import torch

from max_ray.interfaces import KVCacheInputs


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv: KVCacheInputs,
    qo_indptr: torch.Tensor,
    scale: float,
    sliding_window: int | None = None,
    logit_softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Every query, every head, every key by the definition; [T, H, D] float64."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    group = q.shape[1] // k_cache.shape[2]
    for row in range(len(kv.cache_lengths)):
        start, stop = int(qo_indptr[row]), int(qo_indptr[row + 1])
        for token in range(start, stop):
            position = int(kv.cache_lengths[row]) + token - start
            first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
            where = [
                (int(kv.block_tables[row, p // kv.page_size]), p % kv.page_size) for p in range(first, position + 1)
            ]
            for head in range(q.shape[1]):
                keys = torch.stack([k_cache[block, offset, head // group] for block, offset in where]).double()
                values = torch.stack([v_cache[block, offset, head // group] for block, offset in where]).double()
                scores = keys @ q[token, head].double() * scale
                if logit_softcap is not None:
                    scores = logit_softcap * torch.tanh(scores / logit_softcap)
                if sinks is not None:
                    scores = torch.cat((scores, sinks[head].double().view(1)))
                out[token, head] = torch.softmax(scores, 0)[: len(values)] @ values
    return out


def rope(x: torch.Tensor, angles: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Each pair as a complex number, turned by its angle. x [T, H, D], angles [T, P]; float64."""
    out = x.double().clone()
    num_pairs = angles.shape[1]
    for token in range(x.shape[0]):
        for pair in range(num_pairs):
            a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + num_pairs)
            cos, sin = math.cos(angles[token, pair]), math.sin(angles[token, pair])
            first, second = x[token, :, a].double(), x[token, :, b].double()
            out[token, :, a] = first * cos - second * sin
            out[token, :, b] = first * sin + second * cos
    return out


def naive_rounded_to_bytes(x: torch.Tensor) -> torch.Tensor:
    """x [T, K] as the kernels of bytes see it: groups of 32 columns, each a scale times whole numbers -127..127."""
    groups = x.float().unflatten(-1, (-1, 32))
    top = groups.abs().amax(-1, keepdim=True)
    times = torch.where(top > 1e-30, torch.full_like(top, 127) / top, 0.0)  # 127 / top is 127 * (1 / top) to torch
    codes = (groups.double() * times.double()).round()
    return (codes * (top / 127).double()).float().flatten(-2)
