"""Slices of the tensors of a safetensors file, read with plain file reads.

Reads copy the bytes asked for into fresh memory. A memory map would do without the copy, but its touched pages count
as the process's memory until unmapped, and neighbouring pages with them: a tensor-parallel rank that reads half of each
row would be charged for the whole file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from max_ray import host_memory
from max_ray.weights.safetensors_header import TensorEntry, damaged

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_slice(
    entry: TensorEntry, axis: int, start: int, stop: int, memory: torch.Tensor | None = None
) -> torch.Tensor:
    """Elements [start, stop) of `axis`; reads these bytes only. Raises WeightsError when the file has shrunk.

    memory: uint8 [n]; the result lies in it where it is large enough.
    """
    shape, dtype = entry.shape or (1,), DTYPES[entry.dtype]
    assert 0 <= start <= stop <= shape[axis], f"slice [{start}, {stop}) of axis {axis} of shape {entry.shape}"
    inner_bytes = math.prod(shape[axis + 1 :]) * dtype.itemsize
    piece_bytes, stride = (stop - start) * inner_bytes, shape[axis] * inner_bytes
    nbytes = math.prod(shape[:axis]) * piece_bytes
    buffer = host_memory.zeros(nbytes) if memory is None or memory.numel() < nbytes else memory[:nbytes]
    if buffer.numel():
        with _opened(entry, entry.offset, entry.nbytes) as fd:
            _read_pieces(fd, entry.path, buffer, entry.offset + start * inner_bytes, stride, piece_bytes)
    cut = (*shape[:axis], stop - start, *shape[axis + 1 :]) if entry.shape else ()
    return buffer.view(dtype).view(cut)


def read_slice_into(entry: TensorEntry, axis: int, start: int, stop: int, target: torch.Tensor) -> bool:
    """`read_slice` into `target`; False, and nothing read, where its dtype or memory is another than the slice's."""
    if target.dtype != DTYPES[entry.dtype] or target.device.type != "cpu" or not target.is_contiguous():
        return False
    memory = target.reshape(-1).view(torch.uint8)
    host_memory.advise_huge_pages(memory)
    read_slice(entry, axis, start, stop, memory)
    return True


def read_chunks(entry: TensorEntry, rows: range, columns: range, step: int) -> Iterator[torch.Tensor]:
    """A rectangle of a matrix, `step` rows at a time: [step, columns], the last one perhaps shorter. Each chunk is good
    until the next is asked for: they come in the same memory. Reads these bytes only. Raises WeightsError when the
    file has shrunk."""
    dtype = DTYPES[entry.dtype]
    stride, width = entry.shape[1] * dtype.itemsize, len(columns) * dtype.itemsize
    first = entry.offset + columns.start * dtype.itemsize
    buffer = host_memory.zeros(min(step, len(rows)) * width)
    with _opened(entry, entry.offset + rows.start * stride, len(rows) * stride) as fd:
        for start in range(rows.start, rows.stop, step):
            count = min(step, rows.stop - start)
            chunk = buffer[: count * width]
            _read_pieces(fd, entry.path, chunk, first + start * stride, stride, width)
            yield chunk.view(dtype).view(count, len(columns))


@contextmanager
def _opened(entry: TensorEntry, offset: int, nbytes: int) -> Iterator[int]:
    """The open file; the kernel is told what will be read, since strided reads would defeat its own read-ahead."""
    fd = os.open(entry.path, os.O_RDONLY)
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_WILLNEED)
        yield fd
    finally:
        os.close(fd)


def _read_pieces(fd: int, path: Path, buffer: torch.Tensor, offset: int, stride: int, piece_bytes: int) -> None:
    """Fills `buffer` with pieces of `piece_bytes`, `stride` bytes apart in the file from `offset` on."""
    memory = buffer.numpy().data
    if piece_bytes == stride:
        piece_bytes = len(memory)  # they touch: one read
    for i, begin in enumerate(range(0, len(memory), piece_bytes)):
        _read_fully(fd, memory[begin : begin + piece_bytes], offset + i * stride, path)


def _read_fully(fd: int, memory: memoryview, offset: int, path: Path) -> None:
    """One read returns at most 2 GiB, hence the loop."""
    while len(memory):
        count = os.preadv(fd, [memory], offset)
        if count == 0:
            raise damaged(path, "it has become shorter while it was read")
        memory, offset = memory[count:], offset + count
