# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Attention of rows with one query: a row's keys are cut into splits that are read at the same time, then merged.

Grid of the first kernel: (rows, key heads, splits); the query heads of a key head are the lines of one block, so that
keys and values are read once for all of them. How many keys a split has follows from the row's length on the device:
a captured graph serves rows of all lengths. With one split the result is written at once, and nothing is merged.

Partial results, float32: acc [B, H, splits, D] and largest, total [B, H, splits]; a split without keys writes only
largest = -inf. The first split, which always has keys, begins with the sinks where there are some.
"""

from __future__ import annotations

import triton
import triton.language as tl

from max_ray.kernels.gpu.attend import attend, first_state


@triton.jit
def queries_of(qo_indptr, row, ONLY_SINGLE: tl.constexpr):
    """(first token, one past the last) of a row; none where the row is left to the prefill kernel."""
    start, stop = tl.load(qo_indptr + row).to(tl.int32), tl.load(qo_indptr + row + 1).to(tl.int32)
    if ONLY_SINGLE:
        stop = tl.where(stop - start == 1, stop, start)
    return start, stop


@triton.jit(do_not_specialize=["table_stride"])  # of the batch's longest row: else a compilation each time
def decode_kernel(
    q,
    k_cache,
    v_cache,
    block_tables,
    cache_lengths,
    qo_indptr,
    sinks,
    out,
    partial_acc,
    partial_largest,
    partial_total,
    q_token_stride,
    q_head_stride,
    table_stride,
    token_stride,
    num_heads,
    scale,
    GROUP: tl.constexpr,
    ONLY_SINGLE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    line, dim = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    head = kv_head * GROUP + line
    mask = (line < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    start, stop = queries_of(qo_indptr, row, ONLY_SINGLE)
    for token in range(start, stop):
        num_keys = tl.load(cache_lengths + row).to(tl.int32) + token - start + 1
        first, last = split_range(num_keys, split, WINDOW, NUM_SPLITS, BLOCK_N)
        token_q = q + tl.cast(token, tl.int64) * q_token_stride
        queries = tl.load(token_q + head[:, None] * q_head_stride + dim[None, :], mask=mask, other=0.0)
        positions = tl.zeros([BLOCK_M], dtype=tl.int32) + num_keys - 1
        has_sink = line < tl.where(split == 0, GROUP, 0)
        acc, largest, total = first_state(sinks, head, has_sink, HAS_SINKS, BLOCK_M, BLOCK_D)
        acc, largest, total = attend(
            acc, largest, total, queries, positions, first, last, block_tables + row * table_stride,
            k_cache + kv_head * HEAD_DIM, v_cache + kv_head * HEAD_DIM, token_stride, scale,
            True, 0, SOFTCAP, PAGE_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        index = row if ONLY_SINGLE else tl.cast(token, tl.int64)
        if NUM_SPLITS == 1:
            lines = (tl.cast(token, tl.int64) * num_heads + head[:, None]) * HEAD_DIM + dim[None, :]
            tl.store(out + lines, (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)
        else:
            lines = (index * num_heads + head) * NUM_SPLITS + split
            tl.store(partial_largest + lines, largest, mask=line < GROUP)
            if first < last:
                tl.store(partial_total + lines, total, mask=line < GROUP)
                tl.store(partial_acc + lines[:, None] * HEAD_DIM + dim[None, :], acc, mask=mask)


@triton.jit
def split_range(num_keys, split, WINDOW: tl.constexpr, NUM_SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys [first, last) of one split of those that the query at num_keys - 1 sees; empty where there are too few."""
    first_visible = tl.maximum(num_keys - WINDOW, 0) if WINDOW > 0 else num_keys * 0
    share = tl.cdiv(tl.cdiv(num_keys - first_visible, BLOCK_N), NUM_SPLITS) * BLOCK_N
    first = first_visible + split * share
    return first, tl.minimum(first + share, num_keys)


@triton.jit
def merge_kernel(
    partial_acc,
    partial_largest,
    partial_total,
    qo_indptr,
    out,
    num_heads,
    ONLY_SINGLE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[token, head] = the splits' results together. NUM_SPLITS is a power of two. Grid: (rows, heads), and blocks of
    BLOCK_D columns where that is less than HEAD_DIM."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dim, split = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, NUM_SPLITS)
    start, stop = queries_of(qo_indptr, row, ONLY_SINGLE)
    for token in range(start, stop):
        index = row if ONLY_SINGLE else tl.cast(token, tl.int64)
        lines = (index * num_heads + head) * NUM_SPLITS + split
        largest = tl.load(partial_largest + lines)
        has_keys = largest > float("-inf")
        weights = tl.exp2(largest - tl.max(largest, 0))
        total = tl.sum(weights * tl.load(partial_total + lines, mask=has_keys, other=0.0), 0)
        mask = has_keys[:, None] & (dim < HEAD_DIM)[None, :]
        parts = tl.load(partial_acc + lines[:, None] * HEAD_DIM + dim[None, :], mask=mask, other=0.0)
        result = tl.sum(weights[:, None] * parts, 0) / total
        line = (tl.cast(token, tl.int64) * num_heads + head) * HEAD_DIM
        tl.store(out + line + dim, result.to(out.dtype.element_ty), mask=dim < HEAD_DIM)
