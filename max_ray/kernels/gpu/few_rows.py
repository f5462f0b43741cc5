# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""A product with quantized weights for few rows of inputs: limited by the codes' bytes, which are read once.

Axes: T rows of inputs, N rows of the matrix, G groups of 32 columns of one round.

A round is one batched product [G, N, 32] x [G, 32, T], whose batch axis Triton spreads over the warps: each warp has
groups of its own and keeps a sum of its own over all rounds; they are added at the end. Codes stay whole numbers, which
every type holds, and each group's sum is scaled in float32: nothing is rounded but the result.

The floor: an 8B model's 7.5e9 weights are 4.3 GB in Q4_K and 8.0 GB in Q8_0, so a step takes an H100 (3.35 TB/s) 1.3
and 2.4 ms at least. Instructions are the other limit: with blocks of 64 rows, the code for sm_90 has 4.6 of them a
weight for Q4_K and 6.1 for Q8_0, and the schedulers of 132 processors issue them in 1.2 and 1.5 ms at 1.755 GHz.

Grid: see `tiles.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from max_ray.kernels.gpu.packed import (
    Q4,
    Q4_1,
    Q4K,
    Q5K,
    codes_as_numbers,
    codes_from_tile,
    load_codes,
    load_scales,
    scales_from_tile,
)
from max_ray.kernels.gpu.tiles import rows_of_block, rows_of_tile, split_range, store_tile


@triton.jit(do_not_specialize=["num_tokens", "num_experts"])
def few_rows_kernel(
    x, codes, high_codes, scales, mins, super_scales, super_mins, ends, out,
    num_tokens, num_rows, num_columns, num_groups, num_scales, x_stride, out_stride, expert_tiles, num_experts,
    KIND: tl.constexpr, SIZE: tl.constexpr, SINGLE_ZERO: tl.constexpr, BLOCK_E: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """num_groups: of 32 columns, the last maybe cut. expert_tiles: tiles of 16 rows in one expert's matrix."""
    expert, first_token, stop_token = rows_of_tile(ends, num_tokens, num_experts, BLOCK_E, BLOCK_T)
    if first_token >= stop_token:
        return
    first, last = split_range(num_groups, GROUPS)
    tile = expert.to(tl.int64) * expert_tiles + tl.program_id(0) * (BLOCK_N // 16)
    codes, high_codes = codes_from_tile(codes, high_codes, tile, num_groups, num_columns, KIND)
    tensors = (scales, mins, super_scales, super_mins)
    tensors = scales_from_tile(tensors, tile, num_groups, num_scales, SINGLE_ZERO)
    rows = rows_of_block(num_rows, BLOCK_N)
    token = first_token.to(tl.int64) + tl.arange(0, BLOCK_T)
    column, group = first * 32 + tl.arange(0, GROUPS * 32), first + tl.arange(0, GROUPS)
    stop_column = tl.minimum(last * 32, num_columns)
    acc = tl.zeros([GROUPS, BLOCK_N, BLOCK_T], dtype=tl.float32)
    now = load_scales(tensors, rows, group, num_groups, num_scales, group < last, KIND, SIZE, SINGLE_ZERO)
    for _ in range(first, last, GROUPS):
        words = load_codes(codes, high_codes, rows, group, num_groups, num_columns, group < last, KIND)
        seen = (token < stop_token)[:, None] & (column < stop_column)[None, :]
        inputs = tl.load(x + token[:, None] * x_stride + column[None, :], mask=seen, other=0.0)
        column, group = column + GROUPS * 32, group + GROUPS
        # Nothing else prefetches scales: those of the next round are asked for before this round's are used.
        then = load_scales(tensors, rows, group, num_groups, num_scales, group < last, KIND, SIZE, SINGLE_ZERO)
        numbers = codes_as_numbers(words, KIND, x.dtype.element_ty)
        acc = _add_round(acc, numbers, inputs, now, KIND, SIZE)
        now = then
    result = tl.sum(acc, 0)
    store_tile(out, result, first_token, stop_token, num_tokens, num_rows, out_stride, BLOCK_N, BLOCK_T)


@triton.jit
def _add_round(acc, numbers, inputs, scales, KIND: tl.constexpr, SIZE: tl.constexpr):
    """acc [G, N, T] after a round. numbers: of `codes_as_numbers`. inputs [T, G * 32], columns as they are."""
    GROUPS: tl.constexpr = acc.shape[0]
    BLOCK_N: tl.constexpr = acc.shape[1]
    BLOCK_T: tl.constexpr = acc.shape[2]
    scale, second, offset = scales
    ordered = tl.reshape(inputs, (BLOCK_T, GROUPS, 2, 4, 2, 2))  # [T, G, half, i, c, h]
    if SIZE % 32 == 16:
        low, high = tl.split(tl.permute(numbers, (0, 1, 5, 3, 4, 2)))
        low_inputs, high_inputs = tl.split(tl.permute(ordered, (1, 5, 3, 4, 0, 2)))
        acc += _product(low, low_inputs, GROUPS, BLOCK_N, BLOCK_T, 16) * scale[:, :, None]
        return acc + _product(high, high_inputs, GROUPS, BLOCK_N, BLOCK_T, 16) * second[:, :, None]
    ordered = tl.reshape(tl.permute(ordered, (1, 2, 5, 3, 4, 0)), (GROUPS, 32, BLOCK_T))
    numbers = tl.permute(numbers, (0, 1, 2, 5, 3, 4))
    acc += _product(numbers, ordered, GROUPS, BLOCK_N, BLOCK_T, 32) * scale[:, :, None]
    if KIND == Q4K or KIND == Q5K or KIND == Q4 or KIND == Q4_1:  # noqa: SIM109 (Triton has no `in`)
        ones = tl.full([GROUPS, BLOCK_N, 32], 1.0, dtype=inputs.dtype)
        acc -= _product(ones, ordered, GROUPS, BLOCK_N, BLOCK_T, 32) * offset[:, :, None]
    return acc


@triton.jit
def _product(a, b, GROUPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, WIDTH: tl.constexpr):
    """[G, N, WIDTH] x [G, WIDTH, T] -> float32 [G, N, T]; the middle axes of a and b may be several."""
    a, b = tl.reshape(a, (GROUPS, BLOCK_N, WIDTH)), tl.reshape(b, (GROUPS, WIDTH, BLOCK_T))
    return tl.dot(a, b, input_precision="tf32x3")
