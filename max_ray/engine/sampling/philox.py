"""Philox4x32-10: the counter-based generator behind every random draw of the sampler.

A draw is a pure function of (seed of the request, number of the generated token). No generator state exists, so a
request draws the same numbers alone, in any batch, and after it was moved to another worker.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

UInt32Array = npt.NDArray[np.uint32]

_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], dtype=np.uint64)
_KEY_INCREMENTS = np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint32)
_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_ROUNDS = 10


def philox4x32(counter: UInt32Array, key: UInt32Array) -> UInt32Array:
    """Ten rounds over `counter` [..., 4] under `key` [..., 2] (same leading axes); returns uint32 [..., 4]."""
    for _ in range(_ROUNDS):
        products = counter[..., 0::2].astype(np.uint64) * _MULTIPLIERS  # words 0 and 2
        high = (products >> _SHIFT).astype(np.uint32)
        low = (products & _MASK).astype(np.uint32)
        odd = counter[..., 1::2] ^ key
        counter = np.stack([high[..., 1] ^ odd[..., 0], low[..., 1], high[..., 0] ^ odd[..., 1], low[..., 0]], axis=-1)
        key = key + _KEY_INCREMENTS  # wraps modulo 2**32
    return counter


def uniforms(
    seeds: Sequence[int], first: npt.NDArray[np.int64], num_draws: int, word: int = 0
) -> npt.NDArray[np.float64]:
    """Draws number first[i] .. first[i] + num_draws - 1 of each seed, in [0, 1) with 32 random bits.

    seeds: any 64-bit integers, signed or unsigned (taken modulo 2**64). first: int64 [n]. word: 0 to 3; each of the
    generator's four words is a sequence of draws of its own. Returns [n, num_draws].
    """
    keys = np.array([seed % 2**64 for seed in seeds], dtype=np.uint64)
    numbers = (first[:, None] + np.arange(num_draws)).astype(np.uint64)
    zero = np.zeros_like(numbers)
    counter = np.stack([numbers & _MASK, numbers >> _SHIFT, zero, zero], axis=-1).astype(np.uint32)
    key = np.stack([keys & _MASK, keys >> _SHIFT], axis=-1).astype(np.uint32)
    key = np.broadcast_to(key[:, None, :], (*numbers.shape, 2))
    words: npt.NDArray[np.float64] = philox4x32(counter, key)[..., word].astype(np.float64)
    return words * 2.0**-32
