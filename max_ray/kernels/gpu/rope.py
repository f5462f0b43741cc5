# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Rotary position embedding, alone and fused with the cache write. P = R / 2 pairs, as in the reference implementation.

Grid: (tokens, blocks of query heads, then blocks of key heads). Without a cache the rotated keys go to their own tensor
(line t for token t), with one they go to line slot_mapping[t] of it, and the values are copied beside them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from max_ray.kernels.gpu.launch import on_device_of, padded, unit_stride, warps_for
from max_ray.kernels.gpu.paged_cache import check_cache

_BLOCK_ELEMENTS = 1024  # of one program's block, padding counted


@triton.jit
def _rotate_heads(
    source,
    target,
    source_head_stride,
    heads,
    inside,
    cos,
    sin,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
):
    """Turns the pairs of some heads of one token; target's heads are contiguous. cos, sin: float32 [1, BLOCK_PAIRS].

    Each product is rounded to the dtype, as the reference implementation does."""
    pair = tl.arange(0, BLOCK_PAIRS)[None, :]
    first = pair * 2 if INTERLEAVED else pair
    second = first + 1 if INTERLEAVED else pair + PAIRS
    mask = inside[:, None] & (pair < PAIRS)
    lines, targets = source + heads[:, None] * source_head_stride, target + heads[:, None] * HEAD_DIM
    a, b = tl.load(lines + first, mask=mask, other=0.0), tl.load(lines + second, mask=mask, other=0.0)
    dtype = a.dtype
    a, b = a.to(tl.float32), b.to(tl.float32)
    a_cos, b_sin = (a * cos).to(dtype).to(tl.float32), (b * sin).to(dtype).to(tl.float32)
    b_cos, a_sin = (b * cos).to(dtype).to(tl.float32), (a * sin).to(dtype).to(tl.float32)
    tl.store(targets + first, (a_cos - b_sin).to(dtype), mask=mask)
    tl.store(targets + second, (b_cos + a_sin).to(dtype), mask=mask)
    if BLOCK_TAIL > 0:
        rest = 2 * PAIRS + tl.arange(0, BLOCK_TAIL)[None, :]
        rest_mask = inside[:, None] & (rest < HEAD_DIM)
        tl.store(targets + rest, tl.load(lines + rest, mask=rest_mask), mask=rest_mask)


@triton.jit
def rope_kernel(
    q,
    k,
    v,
    q_out,
    k_out,
    v_out,
    cos_sin,
    positions,
    slots,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    cos_sin_stride,
    num_heads,
    num_kv_heads,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_CACHE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    token, head_block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    angle_row = tl.load(positions + token).to(tl.int64) if HAS_POSITIONS else token
    pair = tl.arange(0, BLOCK_PAIRS)[None, :]
    angles = cos_sin + angle_row * cos_sin_stride + pair
    cos = tl.load(angles, mask=pair < PAIRS, other=0.0).to(q.dtype.element_ty).to(tl.float32)
    sin = tl.load(angles + PAIRS, mask=pair < PAIRS, other=0.0).to(q.dtype.element_ty).to(tl.float32)
    num_q_blocks = tl.cdiv(num_heads, BLOCK_HEADS)
    if head_block < num_q_blocks:
        heads = head_block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        source, target = q + token * q_token_stride, q_out + token * num_heads * HEAD_DIM
        inside = heads < num_heads
        _rotate_heads(
            source, target, q_head_stride, heads, inside, cos, sin,
            HEAD_DIM, PAIRS, INTERLEAVED, BLOCK_PAIRS, BLOCK_TAIL,
        )  # fmt: skip
    else:
        heads = (head_block - num_q_blocks) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        inside = heads < num_kv_heads
        line = (tl.load(slots + token).to(tl.int64) if HAS_CACHE else token) * num_kv_heads * HEAD_DIM
        _rotate_heads(
            k + token * k_token_stride, k_out + line, k_head_stride, heads, inside, cos, sin,
            HEAD_DIM, PAIRS, INTERLEAVED, BLOCK_PAIRS, BLOCK_TAIL,
        )  # fmt: skip
        if HAS_CACHE:
            dim = tl.arange(0, BLOCK_DIM)[None, :]
            mask = inside[:, None] & (dim < HEAD_DIM)
            values = tl.load(v + token * v_token_stride + heads[:, None] * v_head_stride + dim, mask=mask)
            tl.store(v_out + line + heads[:, None] * HEAD_DIM + dim, values, mask=mask)


def apply_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor | None,
    *,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    _launch((q, k, k), (q_out, k_out, k_out), cos_sin_cache, positions, None, interleaved)
    return q_out, k_out


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
    check_cache(k, k_cache)
    check_cache(v, v_cache)
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _launch((q, k, v), (q_out, k_cache, v_cache), cos_sin_cache, positions, slot_mapping, interleaved)
    return q_out


def _launch(
    sources: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    targets: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor | None,
    slot_mapping: torch.Tensor | None,
    interleaved: bool,
) -> None:
    """q, k, v [T, heads, D] of any token and head stride to contiguous targets."""
    q, k, v = (unit_stride(x) for x in sources)
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, rotated = k.shape[1], cos_sin_cache.shape[-1]
    assert q.dtype == k.dtype, f"q is {q.dtype}, k {k.dtype}"
    assert rotated % 2 == 0, f"{rotated} cosines and sines do not pair"
    assert rotated <= head_dim, f"{rotated} angles for heads of {head_dim}"
    if num_tokens == 0:
        return
    cos_sin_cache = unit_stride(cos_sin_cache)
    block_dim = padded(head_dim)
    block_heads = min(padded(max(num_heads, num_kv_heads)), max(1, _BLOCK_ELEMENTS // block_dim))
    num_blocks = triton.cdiv(num_heads, block_heads) + triton.cdiv(num_kv_heads, block_heads)
    with on_device_of(q):
        rope_kernel[(num_tokens, num_blocks)](
            q,
            k,
            v,
            *targets,
            cos_sin_cache,
            q if positions is None else positions,
            q if slot_mapping is None else slot_mapping,
            *(stride for x in (q, k, v) for stride in x.stride()[:2]),
            cos_sin_cache.stride(0),
            num_heads,
            num_kv_heads,
            HEAD_DIM=head_dim,
            PAIRS=rotated // 2,
            INTERLEAVED=interleaved,
            HAS_POSITIONS=positions is not None,
            HAS_CACHE=slot_mapping is not None,
            BLOCK_HEADS=block_heads,
            BLOCK_PAIRS=padded(rotated // 2),
            BLOCK_TAIL=padded(head_dim - rotated) if rotated < head_dim else 0,
            BLOCK_DIM=block_dim,
            num_warps=warps_for(block_heads * block_dim),
        )
