"""GGUF's quantized blocks, taken apart. Layouts: `block_q4_K` and its kin in ggml's ggml-common.h.

Q4_0  f16 d | 16 bytes: element i low nibble, element i + 16 high
Q4_1  f16 d | f16 m | 16 bytes as in Q4_0
Q8_0  f16 d | 32 signed bytes
Q4_K  f16 d | f16 dmin | 12 bytes: 8 scales and 8 mins of 6 bits | 4 x 32 bytes: elements 64c + i low, 64c + 32 + i
Q5_K  as Q4_K, but before the last: 32 bytes of high bits, of elements 32j + i bit j of byte i
Q6_K  128 bytes of low nibbles | 64 bytes of high bit pairs | 16 signed scales | f16 d; halves of 128 elements each

All other types: `gguf_other_blocks`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from max_ray.weights.gguf_other_blocks import half, nibbles, rows_of, values_of
from max_ray.weights.quantized import QuantizedRows


def unpack(type_name: str, blocks: torch.Tensor) -> QuantizedRows:
    """blocks: uint8 [R, blocks a row, bytes a block] -> the rows' codes and scales."""
    return rows_of(type_name, blocks) or _UNPACK[type_name](blocks)


def dequantize(type_name: str, blocks: torch.Tensor) -> torch.Tensor:
    """blocks as for `unpack` -> float32 [R, K], what the file means, also where `unpack` rounds."""
    values = values_of(type_name, blocks)
    return _UNPACK[type_name](blocks).dequantize() if values is None else values


def _q4_0(blocks: torch.Tensor) -> QuantizedRows:
    zeros = torch.tensor([8], dtype=torch.uint8)
    return QuantizedRows("q4", 32, nibbles(blocks[..., 2:]).flatten(1), half(blocks, 0), zeros=zeros)


def _q4_1(blocks: torch.Tensor) -> QuantizedRows:
    return QuantizedRows("q4_1", 32, nibbles(blocks[..., 4:]).flatten(1), half(blocks, 0), mins=half(blocks, 2))


def _q8_0(blocks: torch.Tensor) -> QuantizedRows:
    codes = blocks[..., 2:].contiguous().view(torch.int8).flatten(1)
    return QuantizedRows("q8_0", 32, codes, half(blocks, 0))


def _q4_k(blocks: torch.Tensor) -> QuantizedRows:
    return _with_minima("q4_k", blocks, _runs_of_nibbles(blocks[..., 16:]))


def _q5_k(blocks: torch.Tensor) -> QuantizedRows:
    high = blocks[..., 16:48].unsqueeze(-2) >> torch.arange(8, dtype=torch.uint8).unsqueeze(-1) & 1
    return _with_minima("q5_k", blocks, _runs_of_nibbles(blocks[..., 48:]) | high << 4)


def _runs_of_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """128 bytes -> [R, n, 8, 32]."""
    return nibbles(torch.unflatten(packed, -1, (4, 32))).flatten(-3, -2)


def _with_minima(kind: str, blocks: torch.Tensor, codes: torch.Tensor) -> QuantizedRows:
    """codes [R, n, 8, 32] with the scales and minima before them, in 12 bytes."""
    low, middle, high = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    scales = torch.cat([low & 63, (high & 15) | (low >> 6 << 4)], dim=-1)
    mins = torch.cat([middle & 63, (high >> 4) | (middle >> 6 << 4)], dim=-1)
    return QuantizedRows(
        kind,
        32,
        codes.flatten(1),
        scales.flatten(1),
        mins=mins.flatten(1),
        super_scales=half(blocks, 0),
        super_mins=half(blocks, 2),
    )


def _q6_k(blocks: torch.Tensor) -> QuantizedRows:
    low = nibbles(torch.unflatten(blocks[..., :128], -1, (2, 64))).flatten(-2)  # [R, n, 2 halves, 128]
    pairs = torch.unflatten(blocks[..., 128:192], -1, (2, 32))
    high = torch.cat([pairs >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1)  # [R, n, 2 halves, 128]
    scales = blocks[..., 192:208].contiguous().view(torch.int8)
    codes = low | (high << 4)
    return QuantizedRows("q6_k", 16, codes.flatten(1), scales.flatten(1), super_scales=half(blocks, 208))


_UNPACK: dict[str, Callable[[torch.Tensor], QuantizedRows]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
