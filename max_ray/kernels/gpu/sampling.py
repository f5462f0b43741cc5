# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Top-k, top-p, min-p and the draw, without sorting the vocabulary. One program a row.

It follows `max_ray/engine/sampling/draw.py`, its reference, to the letter: probabilities are the integers
floor(2**40 * exp((logit - largest) / temperature)), every filter is a threshold on the logit that keeps ties, and the
draw inverts the cumulative distribution in vocabulary order. The uniform number is `philox.py`'s draw number `counter`
of `seed`. What may differ is the last bit of exp and of the division, so that a token at a border may.

A threshold is found by bisection over the logits' bits: *keys* are int32 in the order of the float32 values. Each round
passes over the row once and snaps the ends of the interval to keys that occur, so that a few rounds do; at most 32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from max_ray.kernels.gpu.launch import on_device_of, padded, unit_stride, warps_for

_MAX_BLOCK = 4096
_MOST_REGISTERS = 128  # a thread, of 16 warps: Triton 3.6 would stop at 64 and spill
_LOWEST = tl.constexpr(-2139095041)  # the key of -inf
_WEIGHT_ONE = tl.constexpr(2.0**40)


@triton.jit
def _values(row, start, vocab_size, BLOCK: tl.constexpr):
    """A block of logits in float32; -inf past the vocabulary and for NaN, and no negative zero."""
    token = start + tl.arange(0, BLOCK)
    x = tl.load(row + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
    x = tl.where(x == x, x, float("-inf"))
    return tl.where(x == 0.0, 0.0, x)


@triton.jit
def _keys(x):
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _probs(x, largest, temperature):
    """Over that of the likeliest token; 0 where that is no number."""
    probs = tl.exp((x - largest) / temperature)
    return tl.where(probs == probs, probs, 0.0)


@triton.jit
def _largest_value(row, vocab_size, BLOCK: tl.constexpr):
    largest = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    for start in range(0, vocab_size, BLOCK):
        largest = tl.maximum(largest, _values(row, start, vocab_size, BLOCK))
    return tl.max(largest, 0)


@triton.jit
def _weights(row, start, vocab_size, largest, temperature, border, min_p, BLOCK: tl.constexpr):
    """int64 [BLOCK]: weight of each token of a block, 0 for those that are filtered out."""
    x = _values(row, start, vocab_size, BLOCK)
    probs = _probs(x, largest, temperature)
    kept = (_keys(x) >= border) & (probs >= min_p)
    return tl.where(kept, (probs * _WEIGHT_ONE).to(tl.int64), 0)


@triton.jit
def _total_weight(row, vocab_size, largest, temperature, border, min_p, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], dtype=tl.int64)
    for start in range(0, vocab_size, BLOCK):
        total += _weights(row, start, vocab_size, largest, temperature, border, min_p, BLOCK)
    return tl.sum(total, 0)


@triton.jit
def _measure(row, vocab_size, largest, temperature, middle, BY_WEIGHT: tl.constexpr, BLOCK: tl.constexpr):
    """(weight or number of the tokens with keys from `middle` on, their smallest key, the largest key before)."""
    amount = tl.zeros([BLOCK], dtype=tl.int64)
    above = tl.full([BLOCK], 2**31 - 1, dtype=tl.int32)
    below = tl.full([BLOCK], -(2**31), dtype=tl.int32)
    for start in range(0, vocab_size, BLOCK):
        x = _values(row, start, vocab_size, BLOCK)
        keys = _keys(x)
        is_above = keys >= middle
        if BY_WEIGHT:
            weights = (_probs(x, largest, temperature) * _WEIGHT_ONE).to(tl.int64)
            amount += tl.where(is_above, weights, 0)
        else:
            amount += is_above.to(tl.int64)
        above = tl.minimum(above, tl.where(is_above, keys, 2**31 - 1))
        below = tl.maximum(below, tl.where(is_above, -(2**31), keys))
    return tl.sum(amount, 0), tl.min(above, 0).to(tl.int64), tl.max(below, 0).to(tl.int64)


@triton.jit
def _search(row, vocab_size, largest, temperature, lowest, target, BY_WEIGHT: tl.constexpr, BLOCK: tl.constexpr):
    """int64: the largest key such that the tokens from it on weigh (or count) `target` or more; `lowest` where none."""
    low, high = lowest, _keys(largest).to(tl.int64)
    while low < high:
        middle = low + (high - low + 1) // 2
        amount, above, below = _measure(row, vocab_size, largest, temperature, middle, BY_WEIGHT, BLOCK)
        reached = amount.to(tl.float64) >= target
        high = tl.where(reached, high, tl.maximum(below, low))
        low = tl.where(reached, above, low)
    return low


@triton.jit
def uniform_number(seed, counter):
    """float64 in [0, 1): word 0 of Philox4x32-10 of counter (counter, 0) under key seed, over 2**32."""
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), ((counter >> 32) & 0xFFFFFFFF).to(tl.uint32)
    word, _, _, _ = tl.philox(seed, low, high, low * 0, low * 0)
    return word.to(tl.float64) * 2.0**-32


@triton.jit
def _first_beyond(row, vocab_size, largest, temperature, border, min_p, target, BLOCK: tl.constexpr):
    """The first token whose inclusive running sum of weights exceeds `target`; 0 where none does."""
    token, before = target * 0, target * 0
    for start in range(0, vocab_size, BLOCK):
        weights = _weights(row, start, vocab_size, largest, temperature, border, min_p, BLOCK)
        after = before + tl.sum(weights, 0)
        if (before <= target) & (after > target):
            not_beyond = before + tl.cumsum(weights, 0) <= target
            token = tl.sum(not_beyond.to(tl.int64), 0) + start
        before = after
    return token


@triton.jit
def sample_kernel(
    logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    seeds,
    counters,
    tokens,
    logits_stride,
    vocab_size,
    BLOCK: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64)
    row = logits + number * logits_stride
    temperature, min_p = tl.load(temperatures + number), tl.load(min_ps + number)
    top_k, top_p = tl.load(top_ks + number), tl.load(top_ps + number)
    largest = _largest_value(row, vocab_size, BLOCK)
    border = top_k * 0 + _LOWEST
    if top_k < vocab_size:
        border = _search(row, vocab_size, largest, temperature, border, top_k.to(tl.float64), False, BLOCK)
    if top_p < 1.0:
        left = _total_weight(row, vocab_size, largest, temperature, border, 0.0, BLOCK)
        wanted = top_p * left.to(tl.float64)
        border = _search(row, vocab_size, largest, temperature, border, wanted, True, BLOCK)
    total = _total_weight(row, vocab_size, largest, temperature, border, min_p, BLOCK)
    uniform = uniform_number(tl.load(seeds + number), tl.load(counters + number))
    target = tl.minimum((uniform * total.to(tl.float64)).to(tl.int64), total - 1)
    token = _first_beyond(row, vocab_size, largest, temperature, border, min_p, target, BLOCK)
    tl.store(tokens + number, token)


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    counters: torch.Tensor,
) -> torch.Tensor:
    """One token per row, int64 [N], from logits [N, V] of any float type.

    temperature: positive float32. top_k: int64, V where off. top_p: float64, 1 where off. min_p: float32, 0 where off.
    seeds: int64, the seed modulo 2**64 as two's complement. counters: int64, how many tokens the row had drawn before.
    Each [N] or [N, 1]. A row without a finite logit gets token 0.
    """
    num_rows, vocab_size = logits.shape
    columns = (temperature, top_k, top_p, min_p, seeds, counters)
    dtypes = (torch.float32, torch.int64, torch.float64, torch.float32, torch.int64, torch.int64)
    for column, dtype in zip(columns, dtypes, strict=True):
        assert column.numel() == num_rows, f"a parameter has {column.numel()} values for {num_rows} rows"
        assert column.dtype == dtype, f"a parameter is {column.dtype}, not {dtype}"
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows == 0:
        return tokens
    logits, block = unit_stride(logits), min(_MAX_BLOCK, padded(vocab_size))
    with on_device_of(logits):
        sample_kernel[(num_rows,)](
            logits,
            *(column.contiguous() for column in columns),
            tokens,
            logits.stride(0),
            vocab_size,
            BLOCK=block,
            num_warps=warps_for(block),
            maxnreg=_MOST_REGISTERS,
        )
    return tokens
