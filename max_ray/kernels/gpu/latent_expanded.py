# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Causal attention of a step's new tokens among themselves, with the keys and values of every head made from their
latents: of rows with several queries, tile by tile. What their queries saw of the cache before comes in as a state.

Axes: M queries of one head; N keys of one round; P width of a head's part without position, R of the rope key, V of a
value. States, units of scores and products of float32 are those of `attend`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from max_ray.kernels.gpu.attend import empty_state
from max_ray.kernels.gpu.latent_kernels import columns
from max_ray.kernels.gpu.prefill import row_of_tile


@triton.jit
def _attend_expanded(
    acc, largest, total, q_plain, q_rope, query, first_key, stop_key, made, ropes, made_stride, rope_stride, scale,
    MASKED: tl.constexpr, PLAIN_DIM: tl.constexpr, ROPE_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The state after keys [first_key, stop_key), counted from the row's first new token, as `query` [M] is. MASKED: as
    of `attend`; nothing past the range is read."""
    for start in range(first_key, stop_key, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        read = (tl.minimum(key, stop_key - 1) if MASKED else key).to(tl.int64)
        lines = (made + read * made_stride)[:, None]
        plain = columns(lines, None, 0, BLOCK_P, PLAIN_DIM)
        rope = columns((ropes + read * rope_stride)[:, None], None, 0, BLOCK_R, ROPE_DIM)
        scores = tl.dot(q_rope, tl.trans(rope), input_precision="tf32x3")
        scores = tl.dot(q_plain, tl.trans(plain), scores, input_precision="tf32x3") * scale
        if MASKED:
            visible = (key < stop_key)[None, :] & (key[None, :] <= query[:, None])
            scores = tl.where(visible, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        origin = tl.where(new_largest == float("-inf"), 0.0, new_largest)  # a query that saw no key yet
        weights = tl.exp2(scores - origin[:, None])
        shrink = tl.exp2(largest - origin)
        total = total * shrink + tl.sum(weights, 1)
        values = columns(lines + PLAIN_DIM, None, 0, BLOCK_V, VALUE_DIM)
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="tf32x3")
        largest = new_largest
    return acc, largest, total


@triton.jit(do_not_specialize=["num_rows"])
def expanded_kernel(
    q, made, ropes, prefix_largest, qo_indptr, out,
    q_token_stride, q_head_stride, made_stride, rope_stride, out_token_stride, out_head_stride, num_heads, num_rows,
    scale,
    HAS_PREFIX: tl.constexpr, PLAIN_DIM: tl.constexpr, ROPE_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Rows with more than one query; grid (tiles of BLOCK_M queries, heads), tiles as in prefill_kernel.

    made: [T, H, P + V], a head's key and value. ropes: [T, R]. HAS_PREFIX: the state begins as latent_prefix_kernel
    left it, in `out` (but with values of this head in the place of latents) and prefix_largest [T, H]."""
    tile, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = row_of_tile(qo_indptr, tile, num_rows, BLOCK_M)
    start = tl.load(qo_indptr + row).to(tl.int32)
    num_queries = tl.load(qo_indptr + row + 1).to(tl.int32) - start
    first_query = (tile - start // BLOCK_M - row) * BLOCK_M
    if first_query >= num_queries or num_queries == 1:
        return
    query = first_query + tl.arange(0, BLOCK_M)
    token, mask = (start + query).to(tl.int64), (query < num_queries)[:, None]
    lines = (q + token * q_token_stride + head * q_head_stride)[:, None]
    q_plain = columns(lines, mask, 0, BLOCK_P, PLAIN_DIM)
    q_rope = columns(lines + PLAIN_DIM, mask, 0, BLOCK_R, ROPE_DIM)
    dim = tl.arange(0, BLOCK_V)[None, :]
    targets = (out + token * out_token_stride + head * out_head_stride)[:, None] + dim
    mask = mask & (dim < VALUE_DIM)
    acc, largest, total = empty_state(BLOCK_M, BLOCK_V)
    if HAS_PREFIX:
        acc = tl.load(targets, mask=mask, other=0.0).to(tl.float32)
        largest = tl.load(prefix_largest + token * num_heads + head, mask=query < num_queries, other=float("-inf"))
        total = tl.where(largest == float("-inf"), 0.0, 1.0)

    seen_by_all = (first_query + 1) // BLOCK_N * BLOCK_N
    stop = tl.minimum(first_query + BLOCK_M, num_queries)
    made += start.to(tl.int64) * made_stride + head * (PLAIN_DIM + VALUE_DIM)
    ropes += start.to(tl.int64) * rope_stride
    acc, largest, total = _attend_expanded(
        acc, largest, total, q_plain, q_rope, query, 0, seen_by_all, made, ropes, made_stride, rope_stride, scale,
        False, PLAIN_DIM, ROPE_DIM, VALUE_DIM, BLOCK_N, BLOCK_P, BLOCK_R, BLOCK_V,
    )  # fmt: skip
    acc, largest, total = _attend_expanded(
        acc, largest, total, q_plain, q_rope, query, seen_by_all, stop, made, ropes, made_stride, rope_stride, scale,
        True, PLAIN_DIM, ROPE_DIM, VALUE_DIM, BLOCK_N, BLOCK_P, BLOCK_R, BLOCK_V,
    )  # fmt: skip
    tl.store(targets, (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)
