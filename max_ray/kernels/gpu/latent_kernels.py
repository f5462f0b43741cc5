# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Attention of heads that share a paged cache of latents, with W_uk already in the queries: a head's key is the whole
line of the cache [latent | rope key], its value the latent, so that a latent is read once for both.

Axes: M lines, one a pair of query and head; N keys of one round; L latent width, R width of the rope key. States of
ranges of keys, units of scores and products of float32 are those of `attend`; a state's acc is in two halves of BLOCK_H
columns, as the latents are: the addresses of one 512 wide tile are more than fit beside acc in registers.
The grids have blocks of HEADS heads; the last block may have fewer.
"""

from __future__ import annotations

import triton
import triton.language as tl

from max_ray.kernels.gpu.attend import empty_state
from max_ray.kernels.gpu.decode import split_range
from max_ray.kernels.gpu.prefill import row_of_tile


@triton.jit
def columns(lines, mask, FIRST: tl.constexpr, WIDTH: tl.constexpr, STOP: tl.constexpr):
    """Columns [FIRST, FIRST + WIDTH) of lines [M, 1], 0 from column STOP on and where mask [M, 1] is False (None: is
    nowhere)."""
    dim = FIRST + tl.arange(0, WIDTH)[None, :]
    if FIRST + WIDTH <= STOP and mask is None:
        return tl.load(lines + dim)
    elif mask is None:
        return tl.load(lines + dim, mask=dim < STOP, other=0.0)
    else:
        return tl.load(lines + dim, mask=mask & (dim < STOP), other=0.0)


@triton.jit
def _store_halves(lines, first, second, mask, BLOCK_H: tl.constexpr, STOP: tl.constexpr):
    """Two halves [M, BLOCK_H] as columns [0, STOP) of lines [M, 1]. mask: [M, 1]."""
    dim = tl.arange(0, BLOCK_H)[None, :]
    tl.store(lines + dim, first.to(lines.dtype.element_ty), mask=mask & (dim < STOP))
    tl.store(lines + BLOCK_H + dim, second.to(lines.dtype.element_ty), mask=mask & (BLOCK_H + dim < STOP))


@triton.jit
def attend_latents(
    state, q_first, q_second, q_rope, first_key, stop_key, table, cache, scale,
    MASKED: tl.constexpr, PAGE_SIZE: tl.constexpr, LATENT_DIM: tl.constexpr, ROPE_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The state (first half of acc, second, largest, total) after keys [first_key, stop_key), all of which all queries
    see. MASKED: the range is no multiple of BLOCK_N; nothing past it is read."""
    acc_first, acc_second, largest, total = state
    # what would be kept over the rounds (where the queries lie in shared memory) does not fit beside acc
    WIDE: tl.constexpr = q_rope.shape[0] >= 64
    for start in tl.range(first_key, stop_key, BLOCK_N, disable_licm=WIDE):
        key = start + tl.arange(0, BLOCK_N)
        read = tl.minimum(key, stop_key - 1) if MASKED else key  # the last key again past the end
        block = tl.load(table + read // PAGE_SIZE).to(tl.int64)
        lines = cache + ((block * PAGE_SIZE + read % PAGE_SIZE) * (LATENT_DIM + ROPE_DIM))[:, None]
        first = columns(lines, None, 0, BLOCK_H, LATENT_DIM)
        second = columns(lines, None, BLOCK_H, BLOCK_H, LATENT_DIM)
        rope = columns(lines, None, LATENT_DIM, BLOCK_R, LATENT_DIM + ROPE_DIM)
        scores = tl.dot(q_rope, tl.trans(rope), input_precision="tf32x3")
        scores = tl.dot(q_first, tl.trans(first), scores, input_precision="tf32x3")
        scores = tl.dot(q_second, tl.trans(second), scores, input_precision="tf32x3") * scale
        if MASKED:
            scores = tl.where((key < stop_key)[None, :], scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        origin = tl.where(new_largest == float("-inf"), 0.0, new_largest)  # a query that saw no key yet
        weights = tl.exp2(scores - origin[:, None])
        shrink = tl.exp2(largest - origin)
        total = total * shrink + tl.sum(weights, 1)
        weights = weights.to(first.dtype)
        acc_first = tl.dot(weights, first, acc_first * shrink[:, None], input_precision="tf32x3")
        acc_second = tl.dot(weights, second, acc_second * shrink[:, None], input_precision="tf32x3")
        largest = new_largest
    return acc_first, acc_second, largest, total


@triton.jit
def _empty_halves(BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr):
    first, largest, total = empty_state(BLOCK_M, BLOCK_H)
    return first, tl.zeros([BLOCK_M, BLOCK_H], dtype=tl.float32), largest, total


@triton.jit(do_not_specialize=["table_stride"])
def latent_decode_kernel(
    q_latent, q_rope, cache, block_tables, cache_lengths, qo_indptr, rows, out, partial_acc, partial_largest,
    partial_total, latent_token_stride, latent_head_stride, rope_token_stride, rope_head_stride, table_stride,
    num_heads, scale,
    HEADS: tl.constexpr, ONLY_SINGLE: tl.constexpr, NUM_SPLITS: tl.constexpr, PAGE_SIZE: tl.constexpr,
    LATENT_DIM: tl.constexpr, ROPE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One query, by splits of its keys; the partial results are for merge_kernel, with heads of L numbers.

    Grid: (tokens, blocks of heads, splits), rows [T] the tokens' rows; with ONLY_SINGLE (rows, ..), where rows with
    more queries are left to the other kernels. (Not a loop over the queries of a row as in decode_kernel: what that
    keeps from turn to turn is more than the registers hold.)"""
    token, split = tl.program_id(0), tl.program_id(2)
    row = tl.program_id(0).to(tl.int64)
    if not ONLY_SINGLE:
        row = tl.load(rows + token).to(tl.int64)
    start = tl.load(qo_indptr + row).to(tl.int32)
    if ONLY_SINGLE:
        token = start
        if tl.load(qo_indptr + row + 1).to(tl.int32) - start != 1:
            return
    line = tl.arange(0, BLOCK_M)
    head = (tl.program_id(1) * HEADS + line).to(tl.int64)
    is_head = line < tl.minimum(HEADS, num_heads - tl.program_id(1) * HEADS)
    token = tl.cast(token, tl.int64)
    lines = (q_latent + token * latent_token_stride + head * latent_head_stride)[:, None]
    q_first = columns(lines, is_head[:, None], 0, BLOCK_H, LATENT_DIM)
    q_second = columns(lines, is_head[:, None], BLOCK_H, BLOCK_H, LATENT_DIM)
    lines = (q_rope + token * rope_token_stride + head * rope_head_stride)[:, None]
    rope = columns(lines, is_head[:, None], 0, BLOCK_R, ROPE_DIM)
    num_keys = tl.load(cache_lengths + row).to(tl.int32) + token.to(tl.int32) - start + 1
    first, last = split_range(num_keys, split, 0, NUM_SPLITS, BLOCK_N)
    state = attend_latents(
        _empty_halves(BLOCK_M, BLOCK_H), q_first, q_second, rope, first, last, block_tables + row * table_stride,
        cache, scale, True, PAGE_SIZE, LATENT_DIM, ROPE_DIM, BLOCK_N, BLOCK_H, BLOCK_R,
    )  # fmt: skip
    acc_first, acc_second, largest, total = state
    if NUM_SPLITS == 1:
        lines = (out + (token * num_heads + head) * LATENT_DIM)[:, None]
        share = 1.0 / total[:, None]
        _store_halves(lines, acc_first * share, acc_second * share, is_head[:, None], BLOCK_H, LATENT_DIM)
    else:
        index = row if ONLY_SINGLE else token
        lines = (index * num_heads + head) * NUM_SPLITS + split
        tl.store(partial_largest + lines, largest, mask=is_head)
        if first < last:
            tl.store(partial_total + lines, total, mask=is_head)
            targets = (partial_acc + lines * LATENT_DIM)[:, None]
            _store_halves(targets, acc_first, acc_second, is_head[:, None], BLOCK_H, LATENT_DIM)


@triton.jit(do_not_specialize=["table_stride", "num_rows"])
def latent_prefix_kernel(
    q_latent, q_rope, cache, block_tables, cache_lengths, qo_indptr, out, out_largest, latent_token_stride,
    latent_head_stride, rope_token_stride, rope_head_stride, table_stride, num_heads, num_rows, scale,
    HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, LATENT_DIM: tl.constexpr, ROPE_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """What rows with more than one query see of their tokens in the cache before this step: a state of total 1, out
    [T, H, L] and out_largest [T, H]; 0 and -inf where there are no such tokens.

    Grid: (tiles, blocks of heads), see prefill_kernel. BLOCK_Q * HEADS <= BLOCK_M."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    row = row_of_tile(qo_indptr, tile, num_rows, BLOCK_Q)
    start = tl.load(qo_indptr + row).to(tl.int32)
    num_queries = tl.load(qo_indptr + row + 1).to(tl.int32) - start
    first_query = (tile - start // BLOCK_Q - row) * BLOCK_Q
    if first_query >= num_queries or num_queries == 1:
        return
    line = tl.arange(0, BLOCK_M)
    query, head = first_query + line // HEADS, (tl.program_id(1) * HEADS + line % HEADS).to(tl.int64)
    is_line = (line < BLOCK_Q * HEADS) & (query < num_queries) & (head < num_heads)
    mask = is_line[:, None]
    token = (start + query).to(tl.int64)
    lines = (q_latent + token * latent_token_stride + head * latent_head_stride)[:, None]
    q_first = columns(lines, mask, 0, BLOCK_H, LATENT_DIM)
    q_second = columns(lines, mask, BLOCK_H, BLOCK_H, LATENT_DIM)
    lines = (q_rope + token * rope_token_stride + head * rope_head_stride)[:, None]
    rope = columns(lines, mask, 0, BLOCK_R, ROPE_DIM)

    cached = tl.load(cache_lengths + row).to(tl.int32)
    whole = cached // BLOCK_N * BLOCK_N
    table = block_tables + row.to(tl.int64) * table_stride
    state = attend_latents(
        _empty_halves(BLOCK_M, BLOCK_H), q_first, q_second, rope, 0, whole, table, cache, scale,
        False, PAGE_SIZE, LATENT_DIM, ROPE_DIM, BLOCK_N, BLOCK_H, BLOCK_R,
    )  # fmt: skip
    state = attend_latents(
        state, q_first, q_second, rope, whole, cached, table, cache, scale,
        True, PAGE_SIZE, LATENT_DIM, ROPE_DIM, BLOCK_N, BLOCK_H, BLOCK_R,
    )  # fmt: skip
    acc_first, acc_second, largest, total = state
    lines = token * num_heads + head
    total = tl.maximum(total, 1.0)  # it is less where there was no key only
    tl.store(out_largest + lines, largest + tl.log2(total), mask=is_line)
    share = 1.0 / total[:, None]
    _store_halves((out + lines * LATENT_DIM)[:, None], acc_first * share, acc_second * share, mask, BLOCK_H, LATENT_DIM)
