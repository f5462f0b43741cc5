"""Random packed matrices of every kind; each byte of the padding rows is random, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from max_ray.kernels.quantized import (
    PackedFP8,
    PackedMatrix,
    PackedQ4,
    PackedQ4_1,
    PackedQ4K,
    PackedQ5K,
    PackedQ6K,
    PackedQ8,
)

SCALE = 0.01


def q4_k(rows: int, columns: int) -> PackedMatrix:
    tiles, groups = -(-rows // 16), columns // 32
    six_bits = [torch.randint(0, 64, (tiles, groups, 16), dtype=torch.uint8) for _ in range(2)]
    supers = [_scales(tiles, groups // 8) / 32 for _ in range(2)]
    return PackedQ4K(rows, columns, _bytes(tiles, groups, 4, 16, 4), *six_bits, *supers)


def q5_k(rows: int, columns: int) -> PackedMatrix:
    tiles, groups = -(-rows // 16), columns // 32
    low: Any = q4_k(rows, columns)
    return PackedQ5K(**vars(low), high_codes=_bytes(tiles, groups, 16, 4))


def q6_k(rows: int, columns: int) -> PackedMatrix:
    tiles, groups = -(-rows // 16), columns // 32
    codes, high = _bytes(tiles, groups, 4, 16, 4), _bytes(tiles, groups, 2, 16, 4)
    scales = torch.randint(-128, 128, (tiles, 2 * groups, 16), dtype=torch.int8)
    return PackedQ6K(rows, columns, codes, high, scales, _scales(tiles, groups // 8) / 128)


def q8_0(rows: int, columns: int) -> PackedMatrix:
    tiles, groups = -(-rows // 16), columns // 32
    codes = _bytes(tiles, groups, 8, 16, 4).view(torch.int8)
    return PackedQ8(rows, columns, codes, _scales(tiles, groups) / 16)


def q4_0(rows: int, columns: int) -> PackedMatrix:
    tiles, groups = -(-rows // 16), columns // 32
    zero = torch.tensor([8], dtype=torch.uint8)
    return PackedQ4(rows, columns, _bytes(tiles, groups, 4, 16, 4), _scales(tiles, groups), zero)


def q4_1(rows: int, columns: int) -> PackedMatrix:
    tiles, groups = -(-rows // 16), columns // 32
    mins = -8 * _scales(tiles, groups)
    return PackedQ4_1(rows, columns, _bytes(tiles, groups, 4, 16, 4), _scales(tiles, groups), mins)


def q4(size: int) -> Callable[[int, int], PackedMatrix]:
    """As GPTQ and AWQ have it: groups of `size` columns, a zero each."""

    def make(rows: int, columns: int) -> PackedMatrix:
        tiles = -(-rows // 16)
        codes = _bytes(tiles, columns // 32, 4, 16, 4)
        zeros = torch.randint(0, 17, (tiles, columns // size, 16), dtype=torch.uint8)
        return PackedQ4(rows, columns, codes, _scales(tiles, columns // size), zeros)

    return make


def fp8(size: int | None) -> Callable[[int, int], PackedMatrix]:
    """size: columns that share a scale; None: all of a row."""

    def make(rows: int, columns: int) -> PackedMatrix:
        tiles = -(-rows // 16)
        codes = _bytes(tiles, 16, columns)
        codes[(codes & 0x7F) == 0x7F] = 0  # no number
        scales = _scales(tiles, columns // (size or columns)).float() / 16
        return PackedFP8(rows, columns, codes.view(torch.float8_e4m3fn), scales)

    return make


KINDS: dict[str, Callable[[int, int], PackedMatrix]] = {
    "q4_k": q4_k,
    "q5_k": q5_k,
    "q6_k": q6_k,
    "q8_0": q8_0,
    "q4_0": q4_0,
    "q4_1": q4_1,
    "q4 of 32": q4(32),
    "q4 of 64": q4(64),
    "q4 of 128": q4(128),
    "fp8 of rows": fp8(None),
    "fp8 of 128": fp8(128),
    "fp8 of 16": fp8(16),
}
COLUMNS = {
    "q4_k": 256,
    "q5_k": 256,
    "q6_k": 256,
    "q4 of 64": 64,
    "q4 of 128": 128,
    "fp8 of rows": 16,
    "fp8 of 128": 128,
    "fp8 of 16": 16,
}
"""Of what a matrix's columns are a multiple, where it is not 32."""


def _bytes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def _scales(tiles: int, groups: int) -> torch.Tensor:
    return (torch.rand(tiles, groups, 16) * SCALE + SCALE).half()
