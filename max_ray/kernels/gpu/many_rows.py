# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""A product with quantized weights for tens of rows of inputs: weights are unpacked once for BLOCK_T rows.

Axes: T rows of inputs, N rows of the matrix, G groups of 32 columns of one round.

A round is one product [N, G * 32] x [G * 32, T]. Weights are scaled in float32 and rounded to the inputs' type; sums
are float32. `unpack_kernel` writes the same weights to memory, for rows so many that a library's product is fastest.

Grid of the first: see `tiles.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from max_ray.kernels.gpu.packed import codes_as_numbers, codes_from_tile, load_codes, load_scales, scales_from_tile
from max_ray.kernels.gpu.tiles import rows_of_block, rows_of_tile, split_range, store_tile


@triton.jit(do_not_specialize=["num_tokens", "num_experts"])
def many_rows_kernel(
    x, codes, high_codes, scales, mins, super_scales, super_mins, ends, out,
    num_tokens, num_rows, num_columns, num_groups, num_scales, x_stride, out_stride, expert_tiles, num_experts,
    KIND: tl.constexpr, SIZE: tl.constexpr, SINGLE_ZERO: tl.constexpr, BLOCK_E: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Arguments as of `few_rows_kernel`."""
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
    acc = tl.zeros([BLOCK_N, BLOCK_T], dtype=tl.float32)
    now = load_scales(tensors, rows, group, num_groups, num_scales, group < last, KIND, SIZE, SINGLE_ZERO)
    for _ in range(first, last, GROUPS):
        words = load_codes(codes, high_codes, rows, group, num_groups, num_columns, group < last, KIND)
        seen = (token < stop_token)[:, None] & (column < stop_column)[None, :]
        inputs = tl.load(x + token[:, None] * x_stride + column[None, :], mask=seen, other=0.0)
        column, group = column + GROUPS * 32, group + GROUPS
        then = load_scales(tensors, rows, group, num_groups, num_scales, group < last, KIND, SIZE, SINGLE_ZERO)
        weights = _scaled(codes_as_numbers(words, KIND, x.dtype.element_ty), now, SIZE)
        acc = tl.dot(weights, tl.trans(inputs), acc, input_precision="tf32x3")
        now = then
    store_tile(out, acc, first_token, stop_token, num_tokens, num_rows, out_stride, BLOCK_N, BLOCK_T)


@triton.jit
def _scaled(numbers, scales, SIZE: tl.constexpr):
    """Weights [N, G * 32] in the type of `numbers`, which are of `codes_as_numbers`; scales: of `load_scales`."""
    GROUPS: tl.constexpr = numbers.shape[0]
    BLOCK_N: tl.constexpr = numbers.shape[1]
    scale, second, offset = scales
    if SIZE % 32 == 16:
        factors = tl.reshape(tl.join(scale, second), (GROUPS, BLOCK_N, 2, 1, 1, 1))
    else:
        factors = tl.reshape(scale, (GROUPS, BLOCK_N, 1, 1, 1, 1))
    weights = numbers.to(tl.float32) * factors - tl.reshape(offset, (GROUPS, BLOCK_N, 1, 1, 1, 1))
    return tl.reshape(tl.permute(weights.to(numbers.dtype), (1, 0, 2, 3, 4, 5)), (BLOCK_N, GROUPS * 32))


@triton.jit
def unpack_kernel(
    codes, high_codes, scales, mins, super_scales, super_mins, out,
    first_row, num_rows, num_columns, num_groups, num_scales,
    KIND: tl.constexpr, SIZE: tl.constexpr, SINGLE_ZERO: tl.constexpr, GROUPS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [rows, K] = rows of the matrix from `first_row`, a multiple of 16, to `num_rows`, its end, or the last block.

    Grid: (blocks of rows, blocks of GROUPS groups)."""
    start = first_row + tl.program_id(0) * BLOCK_N
    codes, high_codes = codes_from_tile(codes, high_codes, start.to(tl.int64) // 16, num_groups, num_columns, KIND)
    tensors = (scales, mins, super_scales, super_mins)
    tensors = scales_from_tile(tensors, start.to(tl.int64) // 16, num_groups, num_scales, SINGLE_ZERO)
    line = tl.arange(0, BLOCK_N)
    rows = tl.minimum(line // 16, tl.cdiv(num_rows - start, 16) - 1) * 16 + line % 16
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    words = load_codes(codes, high_codes, rows, group, num_groups, num_columns, group < num_groups, KIND)
    scales_now = load_scales(
        tensors, rows, group, num_groups, num_scales, group < num_groups, KIND, SIZE, SINGLE_ZERO
    )  # fmt: skip
    weights = _scaled(codes_as_numbers(words, KIND, out.dtype.element_ty), scales_now, SIZE)
    column = tl.program_id(1) * GROUPS * 32 + tl.arange(0, GROUPS * 32)
    mask = (start + line < num_rows)[:, None] & (column < num_columns)[None, :]
    place = (tl.program_id(0) * BLOCK_N + line).to(tl.int64)[:, None] * num_columns + column[None, :]
    tl.store(out + place, weights, mask=mask)
