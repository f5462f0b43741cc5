"""Slices of the tensors of a safetensors file, read with plain file reads.

Reads copy the bytes asked for into fresh memory. A memory map would do without the copy, but its touched pages count
as the process's memory until unmapped, and neighbouring pages with them: a tensor-parallel rank that reads half of each
row would be charged for the whole file.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
from pathlib import Path

import torch

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
_HUGE_PAGE_BYTES = 2**21
_OWN_PAGES_BYTES = 2**20  # buffers from here on get pages of their own


def read_slice(
    entry: TensorEntry, axis: int, start: int, stop: int, memory: torch.Tensor | None = None
) -> torch.Tensor:
    """Elements [start, stop) of `axis`; reads these bytes only. Raises WeightsError when the file has shrunk.

    memory: uint8 [n]; the result lies in it where it is large enough.
    """
    shape, dtype = entry.shape or (1,), DTYPES[entry.dtype]
    assert 0 <= start <= stop <= shape[axis], f"slice [{start}, {stop}) of axis {axis} of shape {entry.shape}"
    inner_bytes = math.prod(shape[axis + 1 :]) * dtype.itemsize
    num_pieces, piece_bytes, stride = math.prod(shape[:axis]), (stop - start) * inner_bytes, shape[axis] * inner_bytes
    if piece_bytes == stride:
        num_pieces, piece_bytes = 1, num_pieces * piece_bytes
    nbytes = num_pieces * piece_bytes
    buffer = new_buffer(nbytes) if memory is None or memory.numel() < nbytes else memory[:nbytes]
    if buffer.numel():
        _read_pieces(entry, buffer, entry.offset + start * inner_bytes, stride, piece_bytes)
    cut = (*shape[:axis], stop - start, *shape[axis + 1 :]) if entry.shape else ()
    return buffer.view(dtype).view(cut)


def read_slice_into(entry: TensorEntry, axis: int, start: int, stop: int, target: torch.Tensor) -> bool:
    """`read_slice` into `target`; False, and nothing read, where its dtype or memory is another than the slice's."""
    if target.dtype != DTYPES[entry.dtype] or target.device.type != "cpu" or not target.is_contiguous():
        return False
    memory = target.reshape(-1).view(torch.uint8)
    _advise_huge_pages(memory)
    read_slice(entry, axis, start, stop, memory)
    return True


def _advise_huge_pages(memory: torch.Tensor) -> None:
    """Fresh memory comes in pages of 2 MiB then, not of 4 KiB: the faults took longer than the reading. A hint."""
    if memory.numel() < _HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    page = mmap.PAGESIZE
    first, last = -(-memory.data_ptr() // page) * page, (memory.data_ptr() + memory.numel()) // page * page
    ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_HUGEPAGE)


def new_buffer(nbytes: int) -> torch.Tensor:
    """uint8 [nbytes]. Large ones lie in pages of their own, which go back to the system when the tensor is freed: under
    glibc, buffers of some MiB that come and go left half a checkpoint behind in the heap."""
    if nbytes < _OWN_PAGES_BYTES:
        return torch.empty(nbytes, dtype=torch.uint8)
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)


def _read_pieces(entry: TensorEntry, buffer: torch.Tensor, offset: int, stride: int, piece_bytes: int) -> None:
    """Fills `buffer` with pieces of `piece_bytes`, `stride` bytes apart in the file from `offset` on."""
    memory = buffer.numpy().data
    fd = os.open(entry.path, os.O_RDONLY)
    try:
        if hasattr(os, "posix_fadvise"):  # strided reads would defeat the kernel's own read-ahead
            os.posix_fadvise(fd, entry.offset, entry.nbytes, os.POSIX_FADV_WILLNEED)
        for i, begin in enumerate(range(0, len(memory), piece_bytes)):
            _read_fully(fd, memory[begin : begin + piece_bytes], offset + i * stride, entry.path)
    finally:
        os.close(fd)


def _read_fully(fd: int, memory: memoryview, offset: int, path: Path) -> None:
    """One read returns at most 2 GiB, hence the loop."""
    while len(memory):
        count = os.preadv(fd, [memory], offset)
        if count == 0:
            raise damaged(path, "it has become shorter while it was read")
        memory, offset = memory[count:], offset + count
