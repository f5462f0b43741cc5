"""Cases of `max-ray benchmark kernels` for layers with a quantized weight, of random codes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from max_ray import kernels
from max_ray.benchmark.kernel_cases import Case, CaseMaker, relative_error
from max_ray.benchmark.timing import num_copies
from max_ray.kernels import reference
from max_ray.kernels.quantized import GROUP, SUPER_GROUP, TILE, PackedFP8, PackedMatrix, PackedQ4K, PackedQ5K, PackedQ8

_BLOCK = 128  # columns that share a scale of FP8


def quantized_cases(
    rows: int, columns: int, tokens: Sequence[int], device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, CaseMaker]]:
    """x [T, columns] times a matrix [rows, columns], whose columns are rounded up to whole super-groups."""
    columns = -(-columns // SUPER_GROUP) * SUPER_GROUP
    for name, make in (("q4_k", _q4_k), ("q5_k", _q5_k), ("q8_0", _q8_0), ("fp8", _fp8)):
        matrix = partial(make, rows, columns, device)
        yield from ((f"linear ({name}) {count}", partial(_case, matrix, count, device, dtype)) for count in tokens)


def _case(make: Callable[[], PackedMatrix], tokens: int, device: torch.device, dtype: torch.dtype) -> Case:
    matrix = make()
    x = torch.randn(tokens, matrix.columns, device=device).to(dtype)
    stored = sum(value.nbytes for value in vars(matrix).values() if isinstance(value, torch.Tensor))
    nbytes = stored + x.nbytes + tokens * matrix.rows * dtype.itemsize
    flops = 2 * tokens * matrix.rows * matrix.columns

    def wanted() -> torch.Tensor:
        return reference.quantized_linear(x.float(), matrix)

    copies = [partial(kernels.quantized_linear, x, make()) for _ in range(num_copies(nbytes, device) - 1)]
    run = partial(kernels.quantized_linear, x, matrix)
    return Case(run, wanted, nbytes, flops, relative_error, copies=copies)


def _q4_k(rows: int, columns: int, device: torch.device) -> PackedMatrix:
    tiles, groups = -(-rows // TILE), columns // GROUP
    small = [_codes(64, (tiles, groups, TILE), device) for _ in range(2)]
    supers = [_scales(tiles, columns // SUPER_GROUP, device) for _ in range(2)]
    return PackedQ4K(rows, columns, _codes(256, (tiles, groups, 4, TILE, 4), device), *small, *supers)


def _q5_k(rows: int, columns: int, device: torch.device) -> PackedMatrix:
    low: dict[str, Any] = vars(_q4_k(rows, columns, device))
    return PackedQ5K(**low, high_codes=_codes(256, (-(-rows // TILE), columns // GROUP, TILE, 4), device))


def _q8_0(rows: int, columns: int, device: torch.device) -> PackedMatrix:
    tiles, groups = -(-rows // TILE), columns // GROUP
    codes = _codes(256, (tiles, groups, 8, TILE, 4), device).view(torch.int8)
    return PackedQ8(rows, columns, codes, _scales(tiles, groups, device))


def _fp8(rows: int, columns: int, device: torch.device) -> PackedMatrix:
    tiles = -(-rows // TILE)
    codes = _codes(0x7F, (tiles, TILE, columns), device).view(torch.float8_e4m3fn)  # 0x7F is no number
    return PackedFP8(rows, columns, codes, _scales(tiles, columns // _BLOCK, device).float())


def _codes(below: int, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.randint(0, below, shape, dtype=torch.uint8, device=device)


def _scales(tiles: int, groups: int, device: torch.device) -> torch.Tensor:
    return (torch.rand(tiles, groups, TILE, device=device) / 100 + 0.01).half()
