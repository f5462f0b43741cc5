# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The inner loop of both attention kernels: some queries against a range of keys of one row, read through its pages.

Axes: M lines, one a pair of query and query head that share a key head; N keys of one round; D head_dim.

The state of a range is (acc [M, D], largest [M], total [M]), all float32: sum of exp2(score - largest) * value, largest
score seen, sum of exp2(score - largest); scores are in units of log2. Ranges combine in any order, so that one row may
be cut among programs (Milakov and Gimelshein 2018, section 3.1; Dao 2023, algorithm 1).

Products of float32 are three of tf32 ("tf32x3"): about float32's own precision, on tensor cores.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634


def score_units(scale: float, softcap: float | None) -> tuple[float, float]:
    """(factor of q k^T, SOFTCAP) such that scores come out in units of log2. Without a cap: (scale * log2 e, 0).

    With one, tanh(x) = 1 - 2 / (exp(2 x) + 1) of x = scale q k^T / softcap: the factor makes exp2 of it exp(2 x)."""
    if softcap is None:
        return scale * LOG2_E, 0.0
    return 2.0 * LOG2_E * scale / softcap, softcap * LOG2_E


@triton.jit
def empty_state(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    return acc, tl.full([BLOCK_M], float("-inf"), dtype=tl.float32), tl.zeros([BLOCK_M], dtype=tl.float32)


@triton.jit
def first_state(sinks, head, has_sink, HAS_SINKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """The state of no key: of the sinks alone where has_sink [M] (and HAS_SINKS), else the empty one. A sink is a score
    without a value, so that it begins `largest` and `total`; one range of a query's keys may begin with it.

    sinks: [H], in units of the natural logarithm. head: [M]."""
    acc, largest, total = empty_state(BLOCK_M, BLOCK_D)
    if HAS_SINKS:
        largest = (
            tl.load(sinks + head, mask=has_sink, other=float("-inf")).to(tl.float32) * 1.4426950408889634
        )  # LOG2_E
        total = tl.where(largest == float("-inf"), 0.0, 1.0)
    return acc, largest, total


@triton.jit
def attend(
    acc,
    largest,
    total,
    q,
    positions,
    first_key,
    stop_key,
    table,
    keys,
    values,
    token_stride,
    scale,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The state after keys [first_key, stop_key). keys, values: pointers to this key head of the cache's first token.

    MASKED: some query may not see some key of the range; otherwise the range is a multiple of BLOCK_N, too.
    WINDOW: keys that a query sees, its own and those before it; 0: all. Nothing past the range is read.
    scale, SOFTCAP: as `score_units` gives them."""
    dim = tl.arange(0, BLOCK_D)
    for start in range(first_key, stop_key, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        exists = key < stop_key
        block = tl.load(table + key // PAGE_SIZE, mask=exists, other=0).to(tl.int64)
        line = (block * PAGE_SIZE + key % PAGE_SIZE) * token_stride
        load_mask = exists[:, None] & (dim < HEAD_DIM)[None, :]
        k = tl.load(keys + line[:, None] + dim[None, :], mask=load_mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale
        if SOFTCAP > 0:
            scores = SOFTCAP - 2.0 * SOFTCAP / (tl.exp2(scores) + 1.0)
        if MASKED:
            visible = exists[None, :] & (key[None, :] <= positions[:, None])
            if WINDOW > 0:
                visible = visible & (key[None, :] > positions[:, None] - WINDOW)
            scores = tl.where(visible, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        origin = tl.where(new_largest == float("-inf"), 0.0, new_largest)  # a query that saw no key yet
        weights = tl.exp2(scores - origin[:, None])
        shrink = tl.exp2(largest - origin)
        v = tl.load(values + line[:, None] + dim[None, :], mask=load_mask, other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="tf32x3")
        total = total * shrink + tl.sum(weights, 1)
        largest = new_largest
    return acc, largest, total
