"""Products with quantized weights: which kernel, with what block sizes. Shapes alone decide, and nothing waits.

| rows of inputs | kernel                                | limited by | weights                              |
|----------------|---------------------------------------|------------|--------------------------------------|
| up to 16       | `few_rows`                            | bytes      | exact, scaled in float32             |
| up to 511      | `many_rows`                           | both       | rounded to the inputs' type          |
| more           | `unpack_kernel`, the library's product| products   | rounded to the inputs' type          |

Sums are float32. float32 inputs take the first or the last way, so their weights are rounded to float32 only; the first
multiplies in three products of tf32 ("tf32x3"). The limit of 511 is an estimate: unpacking writes 2 bytes a weight,
which takes as long as some hundred rows take in `many_rows`. FP8 with columns, or columns of a scale, that are no
multiples of 16 runs the reference implementation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from max_ray.kernels import reference
from max_ray.kernels.gpu import packed
from max_ray.kernels.gpu.few_rows import few_rows_kernel
from max_ray.kernels.gpu.launch import num_processors, on_device_of, padded, unit_stride
from max_ray.kernels.gpu.many_rows import many_rows_kernel, unpack_kernel
from max_ray.kernels.gpu.tiles import merge_kernel
from max_ray.kernels.quantized import (
    GROUP,
    TILE,
    PackedFP8,
    PackedMatrix,
    PackedQ4,
    PackedQ4_1,
    PackedQ4K,
    PackedQ5K,
    PackedQ6K,
    PackedQ8,
)

FEW_ROWS = 16
LIBRARY_ROWS = 512
UNPACK_ROWS, UNPACK_GROUPS = 64, 2
_UNPACKED_ELEMENTS = 1 << 24  # at a time: 32 MiB of 16-bit numbers, which stay in a large GPU's L2 cache
_ONE_SCALE_A_ROW = 1 << 20  # SIZE where a scale serves all columns
_LEAST_ROUNDS = 4  # of a split
_MOST_SPLITS = 16


@dataclass(frozen=True, slots=True)
class Tile:
    """Block sizes and launch options: rows of the matrix, groups of 32 columns a round, rows of inputs."""

    is_few: bool
    rows: int
    groups: int
    tokens: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        blocks = {"GROUPS": self.groups, "BLOCK_N": self.rows, "BLOCK_T": self.tokens}
        return blocks | {"num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True, slots=True)
class Operands:
    """A PackedMatrix as kernels take it: pointers, sizes and constants, each in the order of their arguments."""

    tensors: tuple[torch.Tensor, ...]  # codes, high_codes, scales, mins, super_scales, super_mins
    sizes: tuple[int, ...]  # num_columns, num_groups, num_scales
    constants: dict[str, Any]  # KIND, SIZE, SINGLE_ZERO


def quantized_linear(x: torch.Tensor, weight: PackedMatrix, out: torch.Tensor | None = None) -> torch.Tensor:
    operands = operands_of(weight)
    if operands is None:
        return reference.quantized_linear(x, weight, out)
    flat = unit_stride(x.reshape(-1, weight.columns))
    y = torch.empty((len(flat), weight.rows), dtype=x.dtype, device=x.device) if out is None else out
    assert y.shape == (len(flat), weight.rows), "`out` has two axes"
    assert y.stride(1) == 1 or weight.rows == 1, "rows are written in one piece"
    if len(flat) and weight.rows:
        with on_device_of(x):
            _run(flat, weight, operands, y)
    return y if out is not None else y.view(*x.shape[:-1], weight.rows)


def _run(x: torch.Tensor, weight: PackedMatrix, operands: Operands, out: torch.Tensor) -> None:
    if len(x) >= (FEW_ROWS + 1 if x.element_size() > 2 else LIBRARY_ROWS):
        return _unpack_and_multiply(x, weight, operands, out)
    tile = choose_tile(len(x), weight.rows, x.element_size(), num_processors(x.device))
    num_tiles = -(-len(x) // tile.tokens)
    launch(x, weight.rows, operands, out, tile, num_tiles, processors=num_processors(x.device))


def grouped_quantized_linear(
    x: torch.Tensor, weight: PackedMatrix, ends: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The tiles are those of an expert with the mean number of rows, which shapes tell."""
    operands = operands_of(weight)
    if operands is None:
        return reference.grouped_quantized_linear(x, weight, ends, out)
    x = unit_stride(x)
    y = torch.empty((len(x), weight.rows), dtype=x.dtype, device=x.device) if out is None else out
    assert y.shape == (len(x), weight.rows), f"`out` is {tuple(y.shape)}"
    assert y.stride(1) == 1 or weight.rows == 1, "rows are written in one piece"
    if len(x) and weight.rows:
        processors = num_processors(x.device)
        tile = choose_tile(-(-len(x) // len(ends)), weight.rows, x.element_size(), processors)
        num_tiles = len(x) // tile.tokens + min(len(ends), len(x))
        with on_device_of(x):
            launch(x, weight.rows, operands, y, tile, num_tiles, processors=processors, ends=ends)
    return y


def launch(
    x: torch.Tensor,
    num_rows: int,
    operands: Operands,
    out: torch.Tensor,
    tile: Tile,
    num_tiles: int,
    *,
    processors: int,
    ends: torch.Tensor | None = None,
) -> None:
    """Some rows of inputs x [T, K], in num_tiles tiles, times a matrix [num_rows, K], into out [T, num_rows].

    ends: of `tiles.py`, where the operands are those of several experts' matrices, one below the other."""
    blocks = -(-num_rows // tile.rows)
    splits = num_splits(blocks * num_tiles, -(-operands.sizes[1] // tile.groups), processors)
    target = out
    if splits > 1:
        target = torch.empty((splits, len(x), num_rows), dtype=torch.float32, device=x.device)
    num_experts = 0 if ends is None else len(ends)
    sizes = (len(x), num_rows, *operands.sizes, x.stride(0), target.stride(-2), -(-num_rows // TILE), num_experts)
    kernel = few_rows_kernel if tile.is_few else many_rows_kernel
    kernel[(blocks, num_tiles, splits)](
        x, *operands.tensors, operands.tensors[0] if ends is None else ends, target, *sizes, **operands.constants,
        BLOCK_E=0 if ends is None else padded(num_experts), **tile.options(),
    )  # fmt: skip
    if splits > 1:
        grid = (triton.cdiv(num_rows, 1024), len(x))
        merge_kernel[grid](target, out, len(x), splits, num_rows, out.stride(0), BLOCK=1024)


def choose_tile(num_tokens: int, num_rows: int, element_size: int, processors: int) -> Tile:
    """With one or two rows of inputs narrow blocks that need no splits; else wider ones read the inputs less often."""
    if element_size > 2:
        return Tile(True, 32, 4, 8 if num_tokens <= 8 else 16, num_warps=4, num_stages=3)
    if num_tokens <= 2:
        rows = 64 if num_rows >= 64 * processors else 16
        return Tile(True, rows, 256 // rows, 8, num_warps=4, num_stages=4)
    if num_tokens <= FEW_ROWS:
        return Tile(True, 64, 4, 8 if num_tokens <= 8 else 16, num_warps=4, num_stages=4)
    if num_tokens <= 64:
        return Tile(False, 64, 2, 32 if num_tokens <= 32 else 64, num_warps=4, num_stages=4)
    return Tile(False, 128, 2, 128, num_warps=8, num_stages=3)


def num_splits(num_programs: int, num_rounds: int, processors: int) -> int:
    """Enough programs for all processors, unless a split has too few rounds."""
    wanted = -(-3 * processors // (2 * num_programs))
    return max(1, min(wanted, num_rounds // _LEAST_ROUNDS, _MOST_SPLITS))


def _unpack_and_multiply(x: torch.Tensor, weight: PackedMatrix, operands: Operands, out: torch.Tensor) -> None:
    step = max(TILE, _UNPACKED_ELEMENTS // weight.columns // TILE * TILE)
    for first in range(0, weight.rows, step):
        stop = min(first + step, weight.rows)
        unpacked = torch.empty((stop - first, weight.columns), dtype=x.dtype, device=x.device)
        grid = (triton.cdiv(stop - first, UNPACK_ROWS), triton.cdiv(operands.sizes[1], UNPACK_GROUPS))
        unpack_kernel[grid](
            *operands.tensors, unpacked, first, stop, *operands.sizes, **operands.constants,
            GROUPS=UNPACK_GROUPS, BLOCK_N=UNPACK_ROWS,
        )  # fmt: skip
        torch.mm(x, unpacked.t(), out=out[:, first:stop])


def operands_of(weight: PackedMatrix) -> Operands | None:
    """None for a matrix that no kernel reads."""
    if not 0 < weight.columns < 1 << 20:
        return None
    match weight:
        case PackedQ4K(codes=codes, scales=scales, mins=mins, super_scales=supers, super_mins=super_mins):
            return _operands(weight, packed.Q4K, codes, scales, mins=mins, supers=(supers, super_mins))
        case PackedQ5K(codes=codes, scales=scales, mins=mins, super_scales=supers, super_mins=super_mins):
            high, above = weight.high_codes, (supers, super_mins)
            return _operands(weight, packed.Q5K, codes, scales, high=high, mins=mins, supers=above)
        case PackedQ6K(codes=codes, high_codes=high, scales=scales, super_scales=supers):
            return _operands(weight, packed.Q6K, codes, scales, high=high, supers=(supers, supers))
        case PackedQ8(codes=codes, scales=scales):
            return _operands(weight, packed.Q8, codes, scales)
        case PackedQ4(codes=codes, scales=scales, zeros=zeros):
            if weight.columns // scales.shape[1] % GROUP == 0:
                return _operands(weight, packed.Q4, codes, scales, mins=zeros)
        case PackedQ4_1(codes=codes, scales=scales, mins=mins):
            return _operands(weight, packed.Q4_1, codes, scales, mins=mins)
        case PackedFP8(codes=codes, scales=scales):
            size = weight.columns // scales.shape[1]
            if weight.columns % 16 == 0 and (size % 16 == 0 or scales.shape[1] == 1):
                return _operands(weight, packed.FP8, codes, scales)
    return None


def _operands(
    weight: PackedMatrix,
    kind: Any,
    codes: torch.Tensor,
    scales: torch.Tensor,
    *,
    high: torch.Tensor | None = None,
    mins: torch.Tensor | None = None,
    supers: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Operands:
    """Where a kind has no such tensor, another one's pointer stands for it, and is not read."""
    assert all(t.is_contiguous() for t in vars(weight).values() if isinstance(t, torch.Tensor)), "tiles are contiguous"
    words = _words(codes)
    tensors = (words, words if high is None else _words(high), scales, scales if mins is None else mins)
    num_scales = scales.shape[1]
    size = weight.columns // num_scales if num_scales > 1 else _ONE_SCALE_A_ROW
    constants = {"KIND": kind.value, "SIZE": size, "SINGLE_ZERO": mins is not None and mins.numel() == 1}
    sizes = (weight.columns, -(-weight.columns // GROUP), num_scales)
    return Operands((*tensors, *(supers or (scales, scales))), sizes, constants)


def _words(codes: torch.Tensor) -> torch.Tensor:
    return codes.view(torch.uint8).view(torch.int32)
