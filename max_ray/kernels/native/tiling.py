"""GGUF's quantized blocks straight into the tiles of a PackedMatrix, as they come from the file.

csrc/tile_blocks.cpp has the types with tiles of their own, csrc/tile_other_blocks.cpp those that are kept as q8_0 or
q6_k. The slow way, through codes and scales in torch, is `max_ray.nn.quantized_linear.pack_codes`; both give the same
tiles, to the bit.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

import torch

from max_ray.host_memory import zeros
from max_ray.kernels.native.build import library
from max_ray.kernels.native.calls import QuantizedMatrix
from max_ray.kernels.native.quantized import described
from max_ray.kernels.quantized import (
    GROUP,
    SUPER_GROUP,
    TILE,
    PackedMatrix,
    PackedQ4,
    PackedQ4_1,
    PackedQ4K,
    PackedQ5K,
    PackedQ6K,
    PackedQ8,
)

_P, _L = ctypes.c_void_p, ctypes.c_int64
_SIGNATURE = [_P, _L, _L, _L, ctypes.POINTER(QuantizedMatrix)]
_FILE_SIGNATURE = [ctypes.c_char_p, _L, _L, _L, _L, _P, _L, _L, ctypes.POINTER(QuantizedMatrix)]
_ENDED = 2  # as in csrc/block_tiles.h
_Shape = tuple[int, int]  # tiles, groups of 32 columns


def new_matrix(type_name: str, rows: int, columns: int) -> PackedMatrix | None:
    """A matrix of zeros for blocks of this GGUF type; None for other types, and without the C++ kernels."""
    if type_name not in _NEW or library() is None:
        return None
    return _NEW[type_name](rows, columns, (-(-rows // TILE), columns // GROUP))


def tile_blocks(type_name: str, blocks: torch.Tensor, matrix: PackedMatrix, first_tile: int) -> bool:
    """Writes blocks, uint8 [R, blocks a row, bytes a block], as the rows of `matrix` from `first_tile` on.

    Returns:
        Whether all their scales are finite.
    """
    loaded = library()
    assert loaded is not None, "a matrix is made with the library only"
    assert blocks.is_contiguous(), "blocks are read in one piece"
    assert first_tile * TILE + len(blocks) <= matrix.num_tiles * TILE, "more rows than the matrix has"
    tile = getattr(loaded, f"tile_{type_name.lower()}")
    tile.argtypes, tile.restype = _SIGNATURE, ctypes.c_int
    kind_and_matrix = described(matrix)
    assert kind_and_matrix is not None, "these kinds have kernels"
    shape = (blocks.shape[0], blocks.shape[1], first_tile)
    return bool(tile(blocks.data_ptr(), *shape, kind_and_matrix[1]))


def tile_file(
    type_name: str,
    place: tuple[str, int, int, int],
    rows: int,
    matrix: PackedMatrix,
    first_tile: int,
    buffer: torch.Tensor,
) -> bool | None:
    """`tile_blocks` of rows that lie in a file one after another. Holds no lock of the interpreter meanwhile.

    Args:
        place: The file, where the first row lies in it, blocks in a row, and rows of a head whose two halves take
            turns in the file (1: none do).
        rows: How many.
        buffer: uint8 memory to read into, for 16 rows, and whole heads, at least.

    Returns:
        Whether all their scales are finite; None where the file ends before.

    Raises:
        OSError: The file cannot be read.
    """
    path, offset, row_blocks, head = place
    loaded = library()
    assert loaded is not None, "a matrix is made with the library only"
    assert first_tile * TILE + rows <= matrix.num_tiles * TILE, "more rows than the matrix has"
    run = getattr(loaded, f"tile_file_{type_name.lower()}")
    run.argtypes, run.restype = _FILE_SIGNATURE, ctypes.c_int
    kind_and_matrix = described(matrix)
    assert kind_and_matrix is not None, "these kinds have kernels"
    outcome = run(
        os.fsencode(path), offset, rows, row_blocks, head, buffer.data_ptr(), buffer.numel(), first_tile,
        kind_and_matrix[1],
    )  # fmt: skip
    if outcome < 0:
        raise OSError(-outcome, os.strerror(-outcome), path)
    return None if outcome == _ENDED else bool(outcome)


def _supers(shape: _Shape, size: int) -> torch.Tensor:
    return zeros(shape[0], shape[1] * GROUP // size, TILE, dtype=torch.float16)


def _q4_0(rows: int, columns: int, shape: _Shape) -> PackedMatrix:
    eight = torch.tensor([8], dtype=torch.uint8)
    return PackedQ4(rows, columns, zeros(*shape, 4, TILE, 4), _supers(shape, GROUP), eight)


def _q4_1(rows: int, columns: int, shape: _Shape) -> PackedMatrix:
    return PackedQ4_1(rows, columns, zeros(*shape, 4, TILE, 4), _supers(shape, GROUP), _supers(shape, GROUP))


def _q8_0(rows: int, columns: int, shape: _Shape) -> PackedMatrix:
    return PackedQ8(rows, columns, zeros(*shape, 8, TILE, 4, dtype=torch.int8), _supers(shape, GROUP))


def _q4_k(rows: int, columns: int, shape: _Shape) -> PackedMatrix:
    codes, scales, mins = zeros(*shape, 4, TILE, 4), zeros(*shape, TILE), zeros(*shape, TILE)
    return PackedQ4K(rows, columns, codes, scales, mins, _supers(shape, SUPER_GROUP), _supers(shape, SUPER_GROUP))


def _q5_k(rows: int, columns: int, shape: _Shape) -> PackedMatrix:
    codes, scales, mins = zeros(*shape, 4, TILE, 4), zeros(*shape, TILE), zeros(*shape, TILE)
    super_scales, super_mins = _supers(shape, SUPER_GROUP), _supers(shape, SUPER_GROUP)
    return PackedQ5K(rows, columns, codes, scales, mins, super_scales, super_mins, zeros(*shape, TILE, 4))


def _q6_k(rows: int, columns: int, shape: _Shape) -> PackedMatrix:
    scales = zeros(shape[0], shape[1] * 2, TILE, dtype=torch.int8)
    codes, high = zeros(*shape, 4, TILE, 4), zeros(*shape, 2, TILE, 4)
    return PackedQ6K(rows, columns, codes, high, scales, _supers(shape, SUPER_GROUP))


_NEW: dict[str, Callable[[int, int, _Shape], PackedMatrix]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    **dict.fromkeys(("Q5_0", "Q5_1", "Q2_K", "IQ4_NL", "IQ4_XS", "MXFP4"), _q8_0),
    "Q3_K": _q6_k,
}
