"""The C++ backend: the same signatures as the reference, for float32, bfloat16 and float16 on a CPU.

What a C++ kernel does not take (another dtype, mixed dtypes, a head size that is no multiple of 16) goes to the
reference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from max_ray.kernels import reference
from max_ray.kernels.native.calls import AttentionShape, LatentShape, RopeShape, kernel
from max_ray.kernels.reference.experts import weighted_choices

if TYPE_CHECKING:
    from max_ray.interfaces.model_inputs import KVCacheInputs

_MAX_ROTATED = 1024


def rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    run = kernel("rmsnorm", x.dtype)
    if run is None or weight.dtype != x.dtype:
        return reference.rmsnorm(x, weight, eps)
    x = x.contiguous()
    y = torch.empty_like(x)
    width = x.shape[-1]
    rows = x.numel() // width
    run(x.data_ptr(), weight.data_ptr(), y.data_ptr(), rows, width, eps, torch.get_num_threads())
    return y


def fused_add_rmsnorm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    run = kernel("add_rmsnorm", x.dtype)
    if run is None or weight.dtype != x.dtype or residual.dtype != x.dtype:
        return reference.fused_add_rmsnorm(x, residual, weight, eps)
    x, residual = x.contiguous(), residual.contiguous()
    y, total = torch.empty_like(x), torch.empty_like(x)
    inputs = (x.data_ptr(), residual.data_ptr(), weight.data_ptr())
    width = x.shape[-1]
    rows = x.numel() // width
    run(*inputs, y.data_ptr(), total.data_ptr(), rows, width, eps, torch.get_num_threads())
    return y, total


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    run = kernel("silu_and_mul", x.dtype)
    if run is None:
        return reference.silu_and_mul(x)
    x = x.contiguous()
    width = x.shape[-1] // 2
    y = torch.empty((*x.shape[:-1], width), dtype=x.dtype)
    run(x.data_ptr(), y.data_ptr(), y.numel() // width, width, torch.get_num_threads())
    return y


def argmax(x: torch.Tensor) -> torch.Tensor:
    run = kernel("argmax", x.dtype)
    if run is None or x.stride(1) != 1:
        return reference.argmax(x)
    y = torch.empty(x.shape[0], dtype=torch.int64)
    run(x.data_ptr(), x.stride(0), x.shape[0], x.shape[1], y.data_ptr(), torch.get_num_threads())
    return y


def gather_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    run = None if x.dtype is torch.int64 else kernel("gather_rows", x.dtype)
    if run is None or x.stride(1) != 1 or rows.dtype is not torch.int64:
        return reference.gather_rows(x, rows)
    rows = rows.contiguous()
    y = torch.empty((len(rows), x.shape[1]), dtype=x.dtype)
    run(x.data_ptr(), x.stride(0), rows.data_ptr(), len(rows), x.shape[1], y.data_ptr())
    return y


def sum_choices(y: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    summands = weighted_choices(y, places, weights)
    total = torch.empty_like(summands[0])
    sum_rows(summands, total)
    return total.view(len(places), y.shape[1]).to(y.dtype)


def sum_rows(rows: torch.Tensor, out: torch.Tensor) -> None:
    run = None if rows.dtype is torch.int64 else kernel("sum_rows", rows.dtype)
    if run is None or not (rows.is_contiguous() and out.is_contiguous()):
        reference.sum_rows(rows, out)
        return
    run(rows.data_ptr(), rows.shape[0], rows.shape[1], out.data_ptr())


def decode_slots(block_tables: torch.Tensor, cache_lengths: torch.Tensor, page_size: int) -> torch.Tensor:
    run = kernel("decode_slots", torch.int64)
    assert run is not None
    y = torch.empty(len(cache_lengths), dtype=torch.int64)
    tables = (block_tables.data_ptr(), block_tables.stride(0))
    run(*tables, cache_lengths.data_ptr(), len(y), page_size, y.data_ptr())
    return y


def positions(cache_lengths: torch.Tensor) -> torch.Tensor:
    run = kernel("positions", torch.int64)
    assert run is not None
    y = torch.empty(len(cache_lengths), dtype=torch.int64)
    run(cache_lengths.data_ptr(), len(y), y.data_ptr())
    return y


apply_rope = reference.apply_rope
append_latent = reference.append_latent
append_paged_kv_cache = reference.append_paged_kv_cache


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
    run = kernel("rope_and_append", q.dtype)
    num_tokens, num_heads, head_dim = q.shape
    rotated = cos_sin_cache.shape[1]
    if (
        run is None
        or {k.dtype, v.dtype, k_cache.dtype, v_cache.dtype} != {q.dtype}
        or rotated > _MAX_ROTATED
        or not all(_heads_together(x) for x in (q, k, v))
    ):
        targets = (k_cache, v_cache, cos_sin_cache, positions, slot_mapping)
        return reference.rope_and_append(q, k, v, *targets, interleaved=interleaved)
    cos_sin = cos_sin_cache.to(q.dtype).contiguous()
    strides = (q.stride(0), k.stride(0), v.stride(0))
    shape = RopeShape(num_tokens, num_heads, k.shape[1], head_dim, rotated, *strides, interleaved)
    out = torch.empty(q.shape, dtype=q.dtype)
    run(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        out.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        cos_sin.data_ptr(),
        None if positions is None else positions.data_ptr(),
        slot_mapping.data_ptr(),
        shape,
        torch.get_num_threads(),
    )
    return out


def _heads_together(x: torch.Tensor) -> bool:
    """Whether the heads of a token [T, H, D] lie in one piece."""
    return x.stride(2) == 1 and x.stride(1) == x.shape[2]


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv: KVCacheInputs,
    qo_indptr: torch.Tensor,
    *,
    scale: float,
    sliding_window: int | None,
    logit_softcap: float | None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    run = kernel("paged_attention", q.dtype)
    num_heads, head_dim = q.shape[1:]
    if run is None or head_dim % 16 or {k_cache.dtype, v_cache.dtype} != {q.dtype}:
        options: dict[str, Any] = {"scale": scale, "sliding_window": sliding_window, "logit_softcap": logit_softcap}
        return reference.paged_attention(q, k_cache, v_cache, kv, qo_indptr, **options, sinks=sinks)
    num_rows, width = kv.block_tables.shape
    shape = AttentionShape(
        num_rows,
        num_heads,
        k_cache.shape[2],
        head_dim,
        kv.page_size,
        width,
        sliding_window or 0,
        scale,
        logit_softcap or 0.0,
    )
    q = q.contiguous()
    out = torch.empty_like(q)
    caches = (k_cache.data_ptr(), v_cache.data_ptr())
    rows = (kv.block_tables.data_ptr(), kv.cache_lengths.data_ptr(), qo_indptr.data_ptr())
    sink_scores = None if sinks is None else sinks.float().contiguous()
    sinks_address = None if sink_scores is None else sink_scores.data_ptr()
    run(q.data_ptr(), *caches, *rows, sinks_address, out.data_ptr(), shape, torch.get_num_threads())
    return out


def latent_attention(
    q: torch.Tensor, cache: torch.Tensor, kv: KVCacheInputs, qo_indptr: torch.Tensor, *, up: torch.Tensor, scale: float
) -> torch.Tensor:
    run = kernel("latent_attention", q.dtype)
    num_heads, size, latent_dim = up.shape
    rope_dim = cache.shape[3] - latent_dim
    if run is None or cache.shape[3] % 16 or {up.dtype, cache.dtype} != {q.dtype}:
        return reference.latent_attention(q, cache, kv, qo_indptr, up=up, scale=scale)
    plain_dim = q.shape[2] - rope_dim
    num_rows, width = kv.block_tables.shape
    value_dim = size - plain_dim
    sizes = (num_rows, num_heads, plain_dim, rope_dim, latent_dim, value_dim, kv.page_size, width)
    q, up = q.contiguous(), up.contiguous()
    out = torch.empty((*q.shape[:2], value_dim), dtype=q.dtype)
    rows = (kv.block_tables.data_ptr(), kv.cache_lengths.data_ptr(), qo_indptr.data_ptr())
    inputs = (q.data_ptr(), up.data_ptr(), cache.data_ptr(), *rows)
    run(*inputs, out.data_ptr(), LatentShape(*sizes, scale), torch.get_num_threads())
    return out
