"""One safetensors file, read with plain file reads.

File: 8 bytes little-endian header length n | n bytes of JSON: name -> dtype, shape, data_offsets | tensor data.

Reads copy the bytes asked for into fresh memory. A memory map would do without the copy, but its touched pages count
as the process's memory until unmapped, and neighbouring pages with them: a tensor-parallel rank that reads half of each
row would be charged for the whole file.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from max_ray.errors import WeightsError

_DTYPES = {
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
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_OWN_PAGES_BYTES = 2**20  # buffers from here on get pages of their own


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: `offset` counts bytes from the beginning of the file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, TensorEntry]:
    """All tensors of the file, in file order. Raises WeightsError naming a file that is truncated or corrupt."""
    file_size = path.stat().st_size
    with path.open("rb") as file:
        header_length = int.from_bytes(file.read(8), "little")
        if file_size < 8 or header_length > min(file_size - 8, _MAX_HEADER_BYTES):
            raise _damaged(path, "its header is cut off")
        header = _parse_header(path, file.read(header_length))
    entries = {name: _entry(path, name, info, 8 + header_length, file_size) for name, info in header.items()}
    return dict(sorted(entries.items(), key=lambda item: item[1].offset))


def read_slice(entry: TensorEntry, axis: int, start: int, stop: int) -> torch.Tensor:
    """Elements [start, stop) of `axis`; reads these bytes only. Raises WeightsError when the file has shrunk."""
    shape = entry.shape or (1,)
    assert 0 <= start <= stop <= shape[axis], f"slice [{start}, {stop}) of axis {axis} of shape {entry.shape}"
    inner_bytes = math.prod(shape[axis + 1 :]) * entry.dtype.itemsize
    num_pieces, piece_bytes, stride = math.prod(shape[:axis]), (stop - start) * inner_bytes, shape[axis] * inner_bytes
    if piece_bytes == stride:
        num_pieces, piece_bytes = 1, num_pieces * piece_bytes
    buffer = _new_buffer(num_pieces * piece_bytes)
    if buffer.numel():
        _read_pieces(entry, buffer, entry.offset + start * inner_bytes, stride, piece_bytes)
    cut = (*shape[:axis], stop - start, *shape[axis + 1 :]) if entry.shape else ()
    return buffer.view(entry.dtype).view(cut)


def _new_buffer(nbytes: int) -> torch.Tensor:
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
            raise _damaged(path, "it has become shorter while it was read")
        memory, offset = memory[count:], offset + count


def _parse_header(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw)
    except ValueError as error:
        raise _damaged(path, "its header is not JSON; a Git LFS pointer or an unfinished download?") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    return header


def _entry(path: Path, name: str, info: Any, data_start: int, file_size: int) -> TensorEntry:
    try:
        dtype_name, shape, (begin, end) = (
            str(info["dtype"]),
            tuple(map(int, info["shape"])),
            map(int, info["data_offsets"]),
        )
    except (TypeError, KeyError, ValueError) as error:
        raise _damaged(path, f"its header does not describe tensor {name!r}") from error
    if dtype_name not in _DTYPES:
        raise WeightsError(f"{path}: tensor {name!r} has dtype {dtype_name}, which is not supported.")
    entry = TensorEntry(path, _DTYPES[dtype_name], shape, data_start + begin)
    if begin < 0 or any(size < 0 for size in shape) or end - begin != entry.nbytes:
        raise _damaged(path, f"its header gives tensor {name!r} {end - begin} bytes, its shape needs {entry.nbytes}")
    if data_start + end > file_size:
        raise _damaged(path, f"it ends at byte {file_size}, but tensor {name!r} reaches to {data_start + end}")
    return entry


def _damaged(path: Path, reason: str) -> WeightsError:
    return WeightsError(f"{path} is truncated or corrupt: {reason}. Fetch the file again.")
