# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Causal attention of a ragged batch, tile by tile: BLOCK_Q queries of one row and all query heads of one key head.

Grid: (tiles, key heads). Row b owns the tiles from qo_indptr[b] // BLOCK_Q + b up to the next row's first: at least
ceil(n_b / BLOCK_Q) of them, known without asking the device; the spare ones end at once. Late tiles go first: they have
the most keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from max_ray.kernels.gpu.attend import attend, first_state


@triton.jit
def row_of_tile(qo_indptr, tile, num_rows, BLOCK_Q: tl.constexpr):
    """The last row whose first tile is not after `tile`; rows' first tiles ascend strictly."""
    low, high = tile * 0, tile * 0 + num_rows - 1
    while low < high:
        middle = (low + high + 1) // 2
        first_tile = tl.load(qo_indptr + middle).to(tl.int32) // BLOCK_Q + middle
        low = tl.where(first_tile <= tile, middle, low)
        high = tl.where(first_tile <= tile, high, middle - 1)
    return low


@triton.jit(do_not_specialize=["table_stride", "num_rows"])
def prefill_kernel(
    q, k_cache, v_cache, block_tables, cache_lengths, qo_indptr, sinks, out, q_token_stride, q_head_stride,
    table_stride, token_stride, num_heads, num_rows, scale,
    GROUP: tl.constexpr, SKIP_SINGLE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr, PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """SKIP_SINGLE: rows with one query are left to the decode kernel. BLOCK_Q * GROUP <= BLOCK_M."""
    tile, kv_head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    row = row_of_tile(qo_indptr, tile, num_rows, BLOCK_Q)
    start = tl.load(qo_indptr + row).to(tl.int32)
    num_queries = tl.load(qo_indptr + row + 1).to(tl.int32) - start
    first_query = (tile - start // BLOCK_Q - row) * BLOCK_Q
    if first_query >= num_queries or (SKIP_SINGLE and num_queries == 1):
        return
    line, dim = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    query, head = first_query + line // GROUP, kv_head * GROUP + line % GROUP
    mask = ((line < BLOCK_Q * GROUP) & (query < num_queries))[:, None] & (dim < HEAD_DIM)[None, :]
    token = (start + query).to(tl.int64)
    lines = token[:, None] * q_token_stride + head[:, None] * q_head_stride + dim[None, :]
    queries = tl.load(q + lines, mask=mask, other=0.0)

    cached = tl.load(cache_lengths + row).to(tl.int32)
    seen_by_first = cached + first_query + 1
    stop = cached + tl.minimum(first_query + BLOCK_Q, num_queries)
    first = tl.maximum(seen_by_first - WINDOW, 0) if WINDOW > 0 else 0
    seen_by_all = first if WINDOW > 0 else seen_by_first // BLOCK_N * BLOCK_N
    table = block_tables + row.to(tl.int64) * table_stride
    keys, values = k_cache + kv_head * HEAD_DIM, v_cache + kv_head * HEAD_DIM
    acc, largest, total = first_state(sinks, head, line < BLOCK_Q * GROUP, HAS_SINKS, BLOCK_M, BLOCK_D)
    if WINDOW == 0:
        acc, largest, total = attend(
            acc, largest, total, queries, cached + query, first, seen_by_all, table, keys, values, token_stride,
            scale, False, 0, SOFTCAP, PAGE_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    acc, largest, total = attend(
        acc, largest, total, queries, cached + query, seen_by_all, stop, table, keys, values, token_stride,
        scale, True, WINDOW, SOFTCAP, PAGE_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    lines = (token[:, None] * num_heads + head[:, None]) * HEAD_DIM + dim[None, :]
    tl.store(out + lines, (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)
