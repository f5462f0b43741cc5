# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""What a program of a product with quantized weights computes: [BLOCK_N rows of the matrix, BLOCK_T rows of inputs],
over one split of the columns.

Grid: (blocks of N, tiles of T, splits). With splits, results are float32 summands [splits, T, N], which `merge_kernel`
adds in their order: the same bits every time.

With experts, inputs come sorted by expert, and each expert has a matrix of its own: `ends` [E] says where an expert's
rows end. An expert has as many tiles as its rows need, and there are at most T // BLOCK_T + min(E, T) of them, known
without asking the device; spare ones end at once.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows_of_tile(ends, num_tokens, num_experts, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr):
    """(expert, first row of inputs, one past the last row that is the expert's); no rows for a spare tile.

    BLOCK_E: at least num_experts; 0 where there are none."""
    tile = tl.program_id(1)
    if BLOCK_E == 0:
        expert, first, stop = tile * 0, tile * BLOCK_T, num_tokens
    else:
        index = tl.arange(0, BLOCK_E)
        exists = index < num_experts
        end = tl.load(ends + index, mask=exists, other=0).to(tl.int32)
        start = tl.load(ends + index - 1, mask=exists & (index > 0), other=0).to(tl.int32)
        num_tiles = tl.where(exists, tl.cdiv(end - start, BLOCK_T), 0)
        last_tile = tl.cumsum(num_tiles, 0)  # of an expert, and one
        is_ours = exists & (tile < last_tile) & (tile >= last_tile - num_tiles)
        expert = tl.sum(tl.where(is_ours, index, 0), 0)
        first = tl.sum(tl.where(is_ours, start + (tile - last_tile + num_tiles) * BLOCK_T, 0), 0)
        stop = tl.sum(tl.where(is_ours, end, 0), 0)
    return expert, first, stop


@triton.jit
def rows_of_block(num_rows, BLOCK_N: tl.constexpr):
    """Which rows, counted from its first, a block reads [BLOCK_N]: past the matrix those of its last tile again."""
    line = tl.arange(0, BLOCK_N)
    tiles_left = tl.cdiv(num_rows - tl.program_id(0) * BLOCK_N, 16)
    return tl.minimum(line // 16, tiles_left - 1) * 16 + line % 16


@triton.jit
def split_range(num_groups, GROUPS: tl.constexpr):
    """Groups [first, last) of this program's split: whole rounds of GROUPS, but for the last split."""
    share = tl.cdiv(tl.cdiv(num_groups, GROUPS), tl.num_programs(2)) * GROUPS
    first = tl.program_id(2) * share
    return first, tl.minimum(first + share, num_groups)


@triton.jit
def store_tile(
    out, result, first_token, stop_token, num_tokens, num_rows, out_stride,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """result: float32 [BLOCK_N, BLOCK_T]."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = first_token.to(tl.int64) + tl.arange(0, BLOCK_T)
    out += tl.program_id(2).to(tl.int64) * num_tokens * num_rows
    mask = (row < num_rows)[:, None] & (token < stop_token)[None, :]
    tl.store(out + token[None, :] * out_stride + row[:, None], result.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "num_splits"])
def merge_kernel(partial, out, num_tokens, num_splits, num_rows, out_stride, BLOCK: tl.constexpr):
    """out [T, N] = sum of partial [splits, T, N]. Grid: (blocks of N, T)."""
    row, token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    mask = row < num_rows
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for split in range(num_splits):
        place = (tl.cast(split, tl.int64) * num_tokens + token) * num_rows + row
        total += tl.load(partial + place, mask=mask, other=0.0)
    tl.store(out + token * out_stride + row, total.to(out.dtype.element_ty), mask=mask)
