"""GGUF's blocks that no kernel multiplies as they are: read as the kind of rows that holds them best.

| type         | kept as | loses                                                                                     |
|--------------|---------|-------------------------------------------------------------------------------------------|
| Q5_0, IQ4_NL | q8_0    | nothing: their codes are whole numbers below 128, with a scale for each group of 32       |
| IQ4_XS       | q8_0    | the scale of a group is rounded to float16                                                |
| MXFP4        | q8_0    | nothing, but for a group whose numbers are all below 2^-20                                |
| Q3_K         | q6_k    | nothing: the same scales of groups of 16                                                  |
| Q5_1         | q8_0    | a number is rounded to 8 bits, as q8_0 does it: offsets have no place there               |
| Q2_K         | q8_0    | the same                                                                                  |

Files called Q4_K_M have such tensors, too: Q5_0 where a width is no multiple of 256.
Layouts (ggml-common.h; d, m: float16):

Q5_0    d | 32 high bits | 16 bytes as in Q4_0          Q5_1    d | m | 32 high bits | 16 bytes
IQ4_NL  d | 16 bytes as in Q4_0, into a table           IQ4_XS  d | 16 high bit pairs of 8 scales | 4 bytes low | 8 x 16
MXFP4   scale, a power of two, 128 more | 16 bytes as in Q4_0, into a table of twice the numbers of an e2m1 float
Q2_K    16 scales and mins of 4 bits | 2 halves of 32 bytes, pair j of byte i: element 32 j + i | d | m
Q3_K    32 bytes of high bits, bit 4 half + j | 2 halves as in Q2_K | 16 scales of 6 bits | d
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from max_ray.weights.quantize import quantize
from max_ray.weights.quantized import MIDDLE_OF_SIX_BITS, QuantizedRows

_MXFP4_TABLE = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_IQ4_TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """The float16 at byte `at` of each block, [R, blocks]."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16).squeeze(-1)


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """[..., n] bytes -> [..., 2, n]: low nibbles, then high ones."""
    return torch.stack([packed & 15, packed >> 4], dim=-2)


def rows_of(type_name: str, blocks: torch.Tensor) -> QuantizedRows | None:
    """As codes and scales; float16 scales where a kind has one for each group. None for a type that is not here."""
    if type_name in _EXACT:
        rows = _EXACT[type_name](blocks)
        return replace(rows, scales=rows.scales.half()) if rows.scales.is_floating_point() else rows
    return quantize("q8_0", _AFFINE[type_name](blocks)) if type_name in _AFFINE else None


def values_of(type_name: str, blocks: torch.Tensor) -> torch.Tensor | None:
    """The numbers themselves, float32 [R, K]. None for a type that is not here."""
    if type_name in _EXACT:
        return _EXACT[type_name](blocks).dequantize()
    return _AFFINE[type_name](blocks) if type_name in _AFFINE else None


def _high_bits(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """32 bits from byte `at` on, one a number: [R, blocks, 32] of 0 and 1."""
    bits = blocks[..., at : at + 4].unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1
    return bits.flatten(-2)


def _five_bits(blocks: torch.Tensor, bits_at: int) -> torch.Tensor:
    return nibbles(blocks[..., bits_at + 4 :]).flatten(-2) | (_high_bits(blocks, bits_at) << 4)


def _affine(
    codes: torch.Tensor, scales: torch.Tensor, mins: torch.Tensor, d: torch.Tensor, m: torch.Tensor
) -> torch.Tensor:
    """codes [R, n, groups, size]; scales and mins [R, n, groups] below d and m [R, n] -> d s q - m min, [R, K]."""
    scale, least = d.float().unsqueeze(-1) * scales.float(), m.float().unsqueeze(-1) * mins.float()
    return (scale.unsqueeze(-1) * codes.float() - least.unsqueeze(-1)).flatten(1)


def _q5_1(blocks: torch.Tensor) -> torch.Tensor:
    codes = _five_bits(blocks, 4)
    ones = torch.ones(*codes.shape[:-1], 1)
    return _affine(codes.unsqueeze(-2), ones, -ones, half(blocks, 0), half(blocks, 2))


def _pairs(packed: torch.Tensor) -> torch.Tensor:
    """64 bytes -> [R, n, 2 halves, 4, 32] of 2 bits."""
    halves = torch.unflatten(packed, -1, (2, 1, 32))
    return halves >> torch.tensor([[0], [2], [4], [6]], dtype=torch.uint8) & 3


def _q2_k(blocks: torch.Tensor) -> torch.Tensor:
    codes = torch.unflatten(_pairs(blocks[..., 16:80]).flatten(-3), -1, (16, 16))
    return _affine(codes, blocks[..., :16] & 15, blocks[..., :16] >> 4, half(blocks, 80), half(blocks, 82))


def _q3_k(blocks: torch.Tensor) -> QuantizedRows:
    bits = torch.arange(8, dtype=torch.uint8).view(2, 4, 1)  # by half and pair
    is_high = blocks[..., :32].unsqueeze(-2).unsqueeze(-2) >> bits & 1
    codes = _pairs(blocks[..., 32:96]) + (is_high << 2) + (MIDDLE_OF_SIX_BITS - 4)
    packed = blocks[..., 96:108]
    low = torch.cat([packed[..., :8] & 15, packed[..., :8] >> 4], dim=-1)
    high = packed[..., 8:].unsqueeze(-2) >> torch.tensor([[0], [2], [4], [6]], dtype=torch.uint8) & 3
    scales = (low | (high.flatten(-2) << 4)).to(torch.int8) - 32
    return QuantizedRows("q6_k", 16, codes.flatten(1), scales.flatten(1), super_scales=half(blocks, 108))


def _q5_0(blocks: torch.Tensor) -> QuantizedRows:
    return QuantizedRows("q8_0", 32, _five_bits(blocks, 2).to(torch.int8).flatten(1) - 16, half(blocks, 0))


def _looked_up(packed: torch.Tensor, numbers: tuple[int, ...] = _IQ4_TABLE) -> torch.Tensor:
    """[R, n, bytes of groups of 32] -> int8 [R, K]."""
    table = torch.tensor(numbers, dtype=torch.int8)
    return table[nibbles(torch.unflatten(packed, -1, (-1, 16))).long()].flatten(1)


def _iq4_nl(blocks: torch.Tensor) -> QuantizedRows:
    return QuantizedRows("q8_0", 32, _looked_up(blocks[..., 2:]), half(blocks, 0))


def _mxfp4(blocks: torch.Tensor) -> QuantizedRows:
    exponents = blocks[..., 0].int() - 128
    scales = torch.ldexp(torch.ones(exponents.shape), exponents)
    return QuantizedRows("q8_0", 32, _looked_up(blocks[..., 1:], _MXFP4_TABLE), scales)


def _iq4_xs(blocks: torch.Tensor) -> QuantizedRows:
    pairs = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)
    high = (blocks[..., 2:4].unsqueeze(-1) >> pairs & 3).flatten(-2)
    low = nibbles(blocks[..., 4:8]).transpose(-1, -2).flatten(-2)
    scales = half(blocks, 0).float().unsqueeze(-1) * ((low | (high << 4)).float() - 32)
    return QuantizedRows("q8_0", 32, _looked_up(blocks[..., 8:]), scales.flatten(1))


_EXACT: dict[str, Callable[[torch.Tensor], QuantizedRows]] = {
    "Q5_0": _q5_0,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
    "Q3_K": _q3_k,
}
_AFFINE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Q5_1": _q5_1,
    "Q2_K": _q2_k,
}
