"""The header of one safetensors file, read without torch.

File: 8 bytes little-endian header length n | n bytes of JSON: name -> dtype, shape, data_offsets | tensor data.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from max_ray.errors import WeightsError

ITEM_BYTES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1},
    **{"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1},
}
"""Bytes of an element, by the format's name of its dtype."""
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: `offset` counts bytes from the beginning of the file; `dtype` is the format's name."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def read_header(path: Path) -> dict[str, TensorEntry]:
    """All tensors of the file, in file order. Raises WeightsError naming a file that is truncated or corrupt."""
    file_size = path.stat().st_size
    with path.open("rb") as file:
        header_length = int.from_bytes(file.read(8), "little")
        if file_size < 8 or header_length > min(file_size - 8, _MAX_HEADER_BYTES):
            raise damaged(path, "its header is cut off")
        header = _parse_header(path, file.read(header_length))
    entries = {name: _entry(path, name, info, 8 + header_length, file_size) for name, info in header.items()}
    return dict(sorted(entries.items(), key=lambda item: item[1].offset))


def _parse_header(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw)
    except ValueError as error:
        raise damaged(path, "its header is not JSON; a Git LFS pointer or an unfinished download?") from error
    if not isinstance(header, dict):
        raise damaged(path, "its header is not a JSON object")
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
        raise damaged(path, f"its header does not describe tensor {name!r}") from error
    if dtype_name not in ITEM_BYTES:
        raise WeightsError(f"{path}: tensor {name!r} has dtype {dtype_name}, which is not supported.")
    entry = TensorEntry(path, dtype_name, shape, data_start + begin)
    if begin < 0 or any(size < 0 for size in shape) or end - begin != entry.nbytes:
        raise damaged(path, f"its header gives tensor {name!r} {end - begin} bytes, its shape needs {entry.nbytes}")
    if data_start + end > file_size:
        raise damaged(path, f"it ends at byte {file_size}, but tensor {name!r} reaches to {data_start + end}")
    return entry


def damaged(path: Path, reason: str) -> WeightsError:
    return WeightsError(f"{path} is truncated or corrupt: {reason}. Fetch the file again.")
