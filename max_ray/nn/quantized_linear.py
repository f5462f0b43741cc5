"""QuantizedWeight: what stands in a layer's `weight` where the checkpoint is quantized and stays so in memory.

A fused layer (query, key and value) may hold parts in different encodings, as Q4_K_M files have them, so a weight is a
list of segments one below the other, each quantized or plain. Products of the segments are put side by side. Parts that
are alike share a segment.

Axes: T tokens, I in_dim, O out_dim.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from max_ray import host_memory, kernels
from max_ray.errors import WeightsError
from max_ray.kernels import quantized as packed
from max_ray.kernels.quantized import TILE, PackedMatrix
from max_ray.nn.module import Module
from max_ray.weights.parameter import PartSpec, StoredPart
from max_ray.weights.quantized import QuantizedRows
from max_ray.weights.safetensors_header import damaged

_Tiled = tuple[Callable[..., PackedMatrix], dict[str, torch.Tensor]]
_CHUNK_ELEMENTS = 1 << 19
"""So many weights are unpacked at a time: what is unpacked stays in the processor's cache until it is packed."""
_BLOCK_BYTES = 1 << 20
"""So many bytes of blocks are read at a time, into memory that stays in the processor's cache."""
_thread = threading.local()


class Segment(Module):
    """Some rows of a weight: forward is x [..., I] -> [..., rows]; gather gives rows by number.

    write: forward of x [T, I] into `out` [T, rows], columns of a wider matrix.
    """

    num_rows: int
    num_columns: int

    def write(self, x: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(self(x))

    def gather(self, indices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no gather")


class QuantizedWeight(Module):
    """A LayerWeight [O, I] of several segments. `dtype` is that of gathered rows and of plain segments."""

    def __init__(self, segments: Sequence[Segment], dtype: torch.dtype) -> None:
        self.segments = list(segments)
        self.dtype = dtype

    @property
    def shape(self) -> tuple[int, int]:
        return sum(segment.num_rows for segment in self.segments), self.segments[0].num_columns

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [..., I] -> x W^T + bias [..., O]."""
        result: torch.Tensor = self.segments[0](x) if len(self.segments) == 1 else self._side_by_side(x)
        return result if bias is None else result + bias

    def _side_by_side(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        result = x.new_empty(len(rows), self.shape[0])
        first = 0
        for segment in self.segments:
            segment.write(rows, result[:, first : first + segment.num_rows])
            first += segment.num_rows
        return result.view(*x.shape[:-1], -1)

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Rows by number, [T] -> [T, I]. Of a weight of one segment only: an embedding has one part."""
        assert len(self.segments) == 1, "rows are gathered from embeddings only"
        return self.segments[0].gather(indices, self.dtype)


class PackedSegment(Segment):
    """Rows that are quantized. Its tensors are parameters, so they count and move as others do.

    order: int64 [I], which input each column of the matrix stands for, where columns were reordered.
    """

    order: torch.Tensor | None

    def __init__(self, matrix: PackedMatrix, order: torch.Tensor | None = None) -> None:
        self.num_rows, self.num_columns = matrix.rows, matrix.columns
        self._kind = type(matrix)
        self._names = [field.name for field in fields(matrix) if field.name not in ("rows", "columns")]
        for name in self._names:
            self.add_parameter(name, getattr(matrix, name))
        self.order = None
        if order is not None:
            self.add_parameter("order", order)

    @property
    def matrix(self) -> PackedMatrix:
        tensors = {name: getattr(self, name) for name in self._names}
        return self._kind(self.num_rows, self.num_columns, **tensors)

    def put(self, matrix: PackedMatrix) -> None:
        """Takes the tensors of a matrix of the same kind and shape in place of its own."""
        for name in self._names:
            setattr(self, name, getattr(matrix, name))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return kernels.quantized_linear(self._ordered(x), self.matrix)

    def write(self, x: torch.Tensor, out: torch.Tensor) -> None:
        kernels.quantized_linear(self._ordered(x), self.matrix, out)

    def _ordered(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.order is None else x.index_select(-1, self.order)

    def gather(self, indices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        assert self.order is None, "embeddings are not in act-order"
        return kernels.quantized_rows(self.matrix, indices, dtype)


class PlainSegment(Segment):
    """Rows that are not quantized, packed where a kernel reads them so."""

    weight: torch.Tensor

    def __init__(self, weight: torch.Tensor) -> None:
        self.num_rows, self.num_columns = weight.shape
        self._packed = kernels.pack_weight(weight)
        if self._packed is None:
            self.add_parameter("weight", weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight) if self._packed is None else self._packed.linear(x, None)

    def gather(self, indices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        flat = indices.reshape(-1)
        rows = F.embedding(flat, self.weight) if self._packed is None else self._packed.rows(flat)
        return rows.to(dtype).view(*indices.shape, self.num_columns)


def add_matrix(
    module: Module, shape: tuple[int, int], parts: Mapping[str, PartSpec], dtype: torch.dtype, device: torch.device
) -> None:
    """Adds the parameter `weight` [O, I] of `module`, which stays quantized where the checkpoint is so.

    What will be quantized never has memory for its plain numbers: see `takes_memory_at_once`, `Module.defer_memory`.
    """

    def empty(place: torch.device) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=place)

    def replace(stored: Sequence[StoredPart]) -> int:
        weight = build_weight(stored, shape[0], dtype, device)
        module.drop_parameter("weight")
        module.__dict__["weight"] = weight
        return sum(parameter.data.nbytes for _, parameter in weight.parameters)

    is_deferred = takes_memory_at_once(device)
    module.add_parameter(
        "weight", empty(torch.device("meta") if is_deferred else device), parts, keep_quantized=replace
    )
    if is_deferred:
        module.defer_memory("weight", lambda: empty(device))


def takes_memory_at_once(device: torch.device) -> bool:
    """Whether a tensor of `device` takes its memory when it is made. A CPU's takes pages when they are written to."""
    return device.type == "cuda"


def build_weight(
    parts: Sequence[StoredPart], num_rows: int, dtype: torch.dtype, device: torch.device
) -> QuantizedWeight:
    """Reads the parts of one weight, in their order, and packs them; rows that no part covers (padding) are zero.

    Raises WeightsError for scales that are not finite, ParallelismError where ranks would share a group of columns.
    """
    segments: list[Segment] = []
    missing = num_rows - sum(len(part.rows) for part in parts)
    for alike in _runs(parts):
        padding = missing if alike[-1] is parts[-1] else 0
        if alike[0].quantization:
            segments.append(PackedSegment(*pack(alike, padding, device)))
        else:
            (part,) = alike
            plain = torch.zeros(len(part.rows) + padding, len(part.columns), dtype=dtype, device=device)
            plain[: len(part.rows)] = part.read()
            segments.append(PlainSegment(plain))
    return QuantizedWeight(segments, dtype)


def _runs(parts: Sequence[StoredPart]) -> list[list[StoredPart]]:
    """The parts in their order; those that one matrix can hold together: one product is faster than two. They must be
    alike, and share no tile."""
    if len(parts) == 1:
        return [list(parts)]
    runs: list[list[StoredPart]] = []
    before: object = None
    for part in parts:
        layout = _layout(part)
        if layout is not None and layout == before and len(runs[-1][-1].rows) % TILE == 0:
            runs[-1].append(part)
        else:
            runs.append([part])
        before = layout
    return runs


def _layout(part: StoredPart) -> object:
    """What parts must have in common to be one matrix; None for a part that shares none. Blocks say all by their type;
    of others a row is read: shapes and types of its tensors, and numbers that stand for all rows."""
    if not part.quantization or not part.rows:
        return None
    if part.block_type:
        return part.block_type
    row = part.read_quantized(range(part.rows.start, part.rows.start + 1))
    if row.order is not None:
        return None
    tensors = [(name, t) for name, t in vars(row).items() if isinstance(t, torch.Tensor)]
    numbers = [t.tolist() for _, t in tensors if t.ndim == 1]
    return row.kind, row.group_size, [(name, t.shape, t.dtype) for name, t in tensors], numbers


def pack(parts: Sequence[StoredPart], padding: int, device: torch.device) -> tuple[PackedMatrix, torch.Tensor | None]:
    """Parts that are alike as one PackedMatrix of their rows and `padding` more, and the order of its columns where
    they were moved. Beside the result it holds one chunk of codes."""
    matrix = _pack_blocks(parts, padding) if device.type == "cpu" else None
    return pack_codes(parts, padding, device) if matrix is None else (matrix, None)


def _pack_blocks(parts: Sequence[StoredPart], padding: int) -> PackedMatrix | None:
    """Blocks of a file go to their tiles in one step; None where the parts are stored otherwise, or without C++."""
    rows = sum(len(part.rows) for part in parts) + padding
    matrix = kernels.new_matrix(parts[0].block_type, rows, len(parts[0].columns))
    if matrix is None:
        return None
    first_tile = 0
    for part in parts:
        if not _tile(part, matrix, first_tile):
            raise WeightsError(f"Tensor {part.tensor!r} has scales that are no finite numbers.")
        first_tile += -(-len(part.rows) // TILE)
    return matrix


def _tile(part: StoredPart, matrix: PackedMatrix, first_tile: int) -> bool:
    """Reads a part's blocks into a matrix from a tile on; gives whether all scales are finite."""
    row_bytes = part.source.tensor_bytes(part.tensor) // part.source.shape(part.tensor)[0]
    buffer, place = _block_buffer(), part.block_place()
    if place is not None and row_bytes * math.lcm(TILE, place[3]) <= len(buffer):
        finite = kernels.tile_file(part.block_type, place, len(part.rows), matrix, first_tile, buffer)
        if finite is None:
            raise damaged(Path(place[0]), "it has become shorter while it was read")
        return finite
    step = max(TILE, _BLOCK_BYTES // row_bytes // TILE * TILE)
    for start in range(part.rows.start, part.rows.stop, step):
        blocks = part.read_blocks(range(start, min(start + step, part.rows.stop)), buffer)
        tile = first_tile + (start - part.rows.start) // TILE
        if not kernels.tile_blocks(part.block_type, blocks, matrix, tile):
            return False
    return True


def _block_buffer() -> torch.Tensor:
    """This thread's memory for blocks: fresh pages for every matrix take as long as the reading."""
    buffer: torch.Tensor | None = getattr(_thread, "buffer", None)
    if buffer is None:
        buffer = _thread.buffer = host_memory.zeros(_BLOCK_BYTES)
    return buffer


def pack_codes(
    parts: Sequence[StoredPart], padding: int, device: torch.device
) -> tuple[PackedMatrix, torch.Tensor | None]:
    """`pack` for every kind of source and device, by torch operations on codes and scales."""
    rows = sum(len(part.rows) for part in parts) + padding
    columns = len(parts[0].columns)
    num_tiles = -(-rows // TILE)
    step = max(TILE, _CHUNK_ELEMENTS // max(1, columns) // TILE * TILE)
    tensors: dict[str, torch.Tensor] = {}
    make: Callable[..., PackedMatrix]
    first_tile = 0
    for part in parts:
        # A rank that holds padding only reads a row all the same, to know the layout.
        for start in range(part.rows.start, part.rows.stop, step) or [0]:
            chunk = part.read_quantized(range(start, min(start + step, part.rows.stop) if part.rows else start + 1))
            make, tiled = _TILED[chunk.kind](chunk)
            first = first_tile + (start - part.rows.start) // TILE
            for name, data in tiled.items():
                if data.numel() == 1:
                    tensors[name] = data.to(device)
                    continue
                if name not in tensors:
                    tensors[name] = torch.zeros(num_tiles, *data.shape[1:], dtype=data.dtype, device=device)
                if part.rows:
                    tensors[name][first : first + len(data)] = data
        first_tile += -(-len(part.rows) // TILE)
    order = None if chunk.order is None else chunk.order.to(device)
    return make(rows, columns, **tensors), order


def _whole_tiles(data: torch.Tensor) -> torch.Tensor:
    """[R, ...] with zero rows added up to a multiple of the tile."""
    missing = -len(data) % TILE
    return torch.cat([data, data.new_zeros(missing, *data.shape[1:])]) if missing else data


def _scales(data: torch.Tensor | None) -> torch.Tensor:
    assert data is not None, "this kind of quantization has these scales"
    return packed.tile_scales(_whole_tiles(data))


def _tile_q4_k(rows: QuantizedRows) -> _Tiled:
    return packed.PackedQ4K, {
        "codes": packed.tile_nibbles(_whole_tiles(rows.codes)),
        "scales": _scales(rows.scales),
        "mins": _scales(rows.mins),
        "super_scales": _scales(rows.super_scales),
        "super_mins": _scales(rows.super_mins),
    }


def _tile_q5_k(rows: QuantizedRows) -> _Tiled:
    codes = _whole_tiles(rows.codes)
    _, tensors = _tile_q4_k(replace(rows, codes=codes & 15))
    return packed.PackedQ5K, {**tensors, "high_codes": packed.tile_bits(codes >> 4)}


def _tile_q6_k(rows: QuantizedRows) -> _Tiled:
    codes = _whole_tiles(rows.codes)
    return packed.PackedQ6K, {
        "codes": packed.tile_nibbles(codes & 15),
        "high_codes": packed.tile_pairs(codes >> 4),
        "scales": _scales(rows.scales),
        "super_scales": _scales(rows.super_scales),
    }


def _tile_q8_0(rows: QuantizedRows) -> _Tiled:
    return packed.PackedQ8, {"codes": packed.tile_bytes(_whole_tiles(rows.codes)), "scales": _scales(rows.scales)}


def _tile_q4(rows: QuantizedRows) -> _Tiled:
    assert rows.zeros is not None, "q4 has zero points"
    zeros = rows.zeros if rows.zeros.numel() == 1 else _scales(rows.zeros)
    codes = packed.tile_nibbles(_whole_tiles(rows.codes))
    return packed.PackedQ4, {"codes": codes, "scales": _scales(rows.scales), "zeros": zeros}


def _tile_q4_1(rows: QuantizedRows) -> _Tiled:
    codes = packed.tile_nibbles(_whole_tiles(rows.codes))
    return packed.PackedQ4_1, {"codes": codes, "scales": _scales(rows.scales), "mins": _scales(rows.mins)}


def _tile_fp8(rows: QuantizedRows) -> _Tiled:
    codes = _whole_tiles(rows.codes.view(torch.uint8)).view(torch.float8_e4m3fn)
    return packed.PackedFP8, {"codes": codes.reshape(-1, TILE, codes.shape[1]), "scales": _scales(rows.scales)}


_TILED: dict[str, Callable[[QuantizedRows], _Tiled]] = {
    "q4_k": _tile_q4_k,
    "q5_k": _tile_q5_k,
    "q6_k": _tile_q6_k,
    "q8_0": _tile_q8_0,
    "q4": _tile_q4,
    "q4_1": _tile_q4_1,
    "fp8": _tile_fp8,
}
