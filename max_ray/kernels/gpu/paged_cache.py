# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Writing new keys and values into the paged cache. One program a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from max_ray.kernels.gpu.launch import on_device_of, padded, unit_stride, warps_for


@triton.jit
def append_kernel(
    k,
    v,
    k_cache,
    v_cache,
    slots,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    width,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copies token t's keys and values, `width` = KVH * D of each, to line slots[t] of the contiguous caches."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    head, dim = columns // HEAD_DIM, columns % HEAD_DIM
    target = tl.load(slots + token).to(tl.int64) * width + columns
    keys = tl.load(k + token * k_token_stride + head * k_head_stride + dim, mask=inside)
    tl.store(k_cache + target, keys, mask=inside)
    values = tl.load(v + token * v_token_stride + head * v_head_stride + dim, mask=inside)
    tl.store(v_cache + target, values, mask=inside)


@triton.jit
def append_latent_kernel(latent, cache, slots, stride, width, BLOCK: tl.constexpr):
    """Copies token t's `width` numbers to line slots[t] of the contiguous cache."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(latent + token * stride + columns, mask=inside)
    tl.store(cache + tl.load(slots + token).to(tl.int64) * width + columns, values, mask=inside)


def append_paged_kv_cache(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    check_cache(k, k_cache)
    check_cache(v, v_cache)
    num_tokens, num_kv_heads, head_dim = k.shape
    if num_tokens == 0:
        return
    k, v = unit_stride(k), unit_stride(v)
    block = padded(num_kv_heads * head_dim)
    with on_device_of(k):
        append_kernel[(num_tokens,)](
            k,
            v,
            k_cache,
            v_cache,
            slot_mapping,
            *(k.stride(0), k.stride(1), v.stride(0), v.stride(1)),
            num_kv_heads * head_dim,
            HEAD_DIM=head_dim,
            BLOCK=block,
            num_warps=warps_for(block),
        )


def check_cache(new: torch.Tensor, cache: torch.Tensor) -> None:
    """Kernels address a cache [num_blocks, page_size, KVH, D] as lines of one token each."""
    assert cache.is_contiguous(), f"a cache has strides {cache.stride()}; kernels need it contiguous"
    assert cache.shape[2:] == new.shape[1:], f"{tuple(new.shape)} does not fit a cache {tuple(cache.shape)}"
    assert cache.dtype == new.dtype, f"new values are {new.dtype}, the cache {cache.dtype}"
