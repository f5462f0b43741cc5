"""GgufFile: the header of a GGUF file, checked in every number before anything is believed.

File (little endian; the ggml project's docs/gguf.md): "GGUF" | u32 version | u64 tensors | u64 keys | keys: string, u32
type, value | tensors: string, u32 dimensions, u64 each (innermost first), u32 type, u64 offset | padding | tensor data.
A string is u64 length and bytes; an array is u32 type, u64 length and the items.

A model cut over several files (`name-00001-of-00003.gguf`) has its keys in the first.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from max_ray.errors import ModelPathError, WeightsError
from max_ray.gguf.strings import StringArray
from max_ray.gguf.types import READABLE, UNREADABLE, TensorType

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
_MAX_DEPTH = 4  # of arrays in arrays
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
_NO_MODELS = ("mmproj", "imatrix")
_SETTLED_NS = 10**9
"""Clocks of file systems tick in milliseconds: a file that is younger may change without a new time."""
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.gguf")


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies. shape: outermost first, as torch has it; offset: bytes from the beginning of the file."""

    path: Path
    name: str
    type: TensorType
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        columns = self.shape[-1] if self.shape else 1
        return math.prod(self.shape[:-1]) * self.type.row_bytes(columns)


@dataclass(frozen=True)
class GgufFile:
    """Keys and tensors of a model, over all its files."""

    path: Path
    metadata: Mapping[str, Any] = field(repr=False)
    tensors: Mapping[str, GgufTensor] = field(repr=False)

    @property
    def architecture(self) -> str:
        """`general.architecture`. Raises WeightsError where it is missing or no text."""
        name = self.metadata.get("general.architecture")
        if not isinstance(name, str):
            raise WeightsError(f"{self.path} has no key general.architecture, so it is no model.")
        return name


def first_parts(names: Iterable[str]) -> list[str]:
    """Of the names of GGUF files those that stand for a model: whole files, and the first of several parts.
    Projectors of images and importance matrices are no models."""
    models = [name for name in sorted(names) if not PurePosixPath(name).name.startswith(_NO_MODELS)]
    return [n for n in models if not (match := _PART.fullmatch(n)) or int(match["number"]) == 1]


def part_names(name: str) -> list[str]:
    """The names of all files of the model that the file `name` is a part of, in order."""
    match = _PART.fullmatch(name)
    if match is None:
        return [name]
    total = int(match["total"])
    return [f"{match['stem']}-{number:05d}-of-{total:05d}.gguf" for number in range(1, total + 1)]


def lone_gguf(folder: Path) -> Path | None:
    """The GGUF file of a folder that holds one model; None without any. Raises ModelPathError for several models, or
    parts without the first."""
    models = first_parts(file.name for file in folder.glob("*.gguf") if file.is_file())
    if len(models) > 1:
        raise ModelPathError(f"{folder} holds several GGUF files ({', '.join(models[:10])}): give the path of one.")
    rest = [file.name for file in folder.glob("*.gguf") if _PART.fullmatch(file.name)]
    if rest and not models:
        first = part_names(rest[0])[0]
        raise ModelPathError(f"{folder} holds {rest[0]}, a part of a model, and not the first, {first}. Fetch it.")
    return folder / models[0] if models else None


def gguf_parts(path: Path) -> list[Path]:
    """All files of the model that `path` is a part of, in order. Raises WeightsError when one is missing."""
    parts = [path.with_name(name) for name in part_names(path.name)]
    for part in parts:
        if len(parts) > 1 and not part.is_file():
            raise WeightsError(f"{path} is one of {len(parts)} files, and {part.name} is not beside it. Fetch it.")
    return parts


def read_gguf(path: str | Path) -> GgufFile:
    """The header of the model at `path`, a .gguf file (one of several parts stands for all). Reads no tensor.

    Raises WeightsError for a file that is truncated or corrupt, a type that cannot be read, or a tensor in two files.
    """
    files = [_read_one(part) for part in gguf_parts(Path(path))]
    tensors: dict[str, GgufTensor] = {}
    for file in files:
        for name, tensor in file.tensors.items():
            if name in tensors:
                raise WeightsError(f"Tensor {name!r} is in two files, {tensors[name].path} and {tensor.path}.")
            tensors[name] = tensor
    return GgufFile(files[0].path, files[0].metadata, tensors)


def _read_one(path: Path) -> GgufFile:
    """The header of one file; of a file that did not change since, the one read before. A start reads it five times."""
    status = path.stat()
    if status.st_size < 24:
        raise _damaged(path, f"it has {status.st_size} bytes, less than a header")
    version = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    if time.time_ns() - status.st_mtime_ns < _SETTLED_NS:
        return _read_header(path)
    return _read_version(path, version)


@lru_cache(maxsize=16)
def _read_version(path: Path, version: tuple[int, ...]) -> GgufFile:
    """version: numbers that change with the file."""
    return _read_header(path)


def _read_header(path: Path) -> GgufFile:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
        return _parse(_Cursor(path, memory))


class _Cursor:
    """Reads numbers and strings one after another; raises WeightsError instead of passing the end."""

    def __init__(self, path: Path, memory: mmap.mmap) -> None:
        self.path = path
        self.memory = memory
        self.position = 0
        self.size = len(memory)

    def number(self, layout: str) -> Any:
        size = struct.calcsize(layout)
        self.need(size)
        value = struct.unpack_from(layout, self.memory, self.position)[0]
        self.position += size
        return value

    def need(self, count: int) -> None:
        if count > self.size - self.position:
            raise _damaged(self.path, f"its header is cut off at byte {self.position}, or gives a wrong length there")

    def text(self) -> str:
        length = self.number("<Q")
        self.need(length)
        raw = self.memory[self.position : self.position + length]
        self.position += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise _damaged(self.path, f"the text before byte {self.position} is not UTF-8") from None

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY and depth < _MAX_DEPTH:
            return self._array(self.number("<I"), self.number("<Q"), depth + 1)
        if kind not in _SCALARS:
            raise _damaged(self.path, f"a value before byte {self.position} has the unknown type {kind}")
        value = self.number(_SCALARS[kind])
        return bool(value) if kind == _BOOL else value

    def _array(self, kind: int, count: int, depth: int) -> list[Any] | StringArray:
        layout = _SCALARS.get(kind)
        if kind == _STRING and depth == 1:
            return self._strings(count)
        if layout is None:
            self.need(count * 8)  # a string or an array has a length at least
            return [self.value(kind, depth) for _ in range(count)]
        size = struct.calcsize(layout)
        self.need(count * size)
        values = list(struct.unpack_from(f"<{count}{layout[1]}", self.memory, self.position))
        self.position += count * size
        return [bool(value) for value in values] if kind == _BOOL else values

    def _strings(self, count: int) -> StringArray:
        self.need(count * 8)
        try:
            strings, self.position = StringArray.read(self.memory, self.position, count)
        except EOFError:
            raise _damaged(self.path, f"an array of strings at byte {self.position} reaches beyond its end") from None
        return strings


def _parse(cursor: _Cursor) -> GgufFile:
    if cursor.memory[:4] != _MAGIC:
        raise _damaged(cursor.path, "it does not begin with GGUF; a Git LFS pointer, or another format")
    cursor.position = 4
    version = cursor.number("<I")
    if version not in _VERSIONS:
        swapped = " (its bytes are in big-endian order)" if version & 0xFFFF == 0 else ""
        raise WeightsError(
            f"{cursor.path} is GGUF version {version}{swapped}; versions 2 and 3, little endian, can be read. "
            f"Convert it with a current llama.cpp."
        )
    num_tensors, num_keys = cursor.number("<Q"), cursor.number("<Q")
    metadata = _metadata(cursor, num_keys)
    infos = [_tensor_info(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20:
        raise _damaged(cursor.path, f"general.alignment is {alignment!r}")
    data_start = -(-cursor.position // alignment) * alignment
    return GgufFile(cursor.path, metadata, _placed(cursor, infos, data_start))


def _metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.text()
        if key in metadata:
            raise _damaged(cursor.path, f"key {key!r} is there twice")
        metadata[key] = cursor.value(cursor.number("<I"))
    return metadata


def _tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], TensorType, int]:
    """(name, shape, type, offset in the data section)."""
    name = cursor.text()
    num_dimensions = cursor.number("<I")
    if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
        raise _damaged(cursor.path, f"tensor {name!r} has {num_dimensions} dimensions")
    shape = tuple(cursor.number("<Q") for _ in range(num_dimensions))[::-1]
    kind = _type(cursor.path, name, cursor.number("<I"))
    if not all(1 <= size < 1 << 40 for size in shape) or shape[-1] % kind.block_size:
        raise _damaged(cursor.path, f"tensor {name!r} of type {kind.name} has the shape {list(shape)}")
    return name, shape, kind, cursor.number("<Q")


def _type(path: Path, name: str, number: int) -> TensorType:
    if number in READABLE:
        return READABLE[number]
    readable = ", ".join(kind.name for kind in READABLE.values())
    if number in UNREADABLE:
        raise WeightsError(
            f"{path}: tensor {name!r} has type {UNREADABLE[number]}; types that can be read: {readable}. Take a file "
            f"of the model in one of these (Q4_K_M, Q5_K_M, Q6_K, Q8_0, BF16)."
        )
    raise WeightsError(f"{path}: tensor {name!r} has the unknown type {number}; types that can be read: {readable}.")


def _placed(
    cursor: _Cursor, infos: Iterable[tuple[str, tuple[int, ...], TensorType, int]], data_start: int
) -> dict[str, GgufTensor]:
    """The tensors by name, in file order; checks that each lies within the file and none upon another."""
    placed: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in infos:
        if name in placed:
            raise WeightsError(f"{cursor.path} has tensor {name!r} twice.")
        placed[name] = GgufTensor(cursor.path, name, kind, shape, data_start + offset)
    end, last = data_start, ""
    ordered = sorted(placed.values(), key=lambda tensor: tensor.offset)
    for tensor in ordered:
        if tensor.offset < end:
            raise _damaged(cursor.path, f"tensors {last!r} and {tensor.name!r} overlap")
        end, last = tensor.offset + tensor.nbytes, tensor.name
        if end > cursor.size:
            raise _damaged(cursor.path, f"it ends at byte {cursor.size}, but tensor {last!r} reaches to {end}")
    return {tensor.name: tensor for tensor in ordered}


def _damaged(path: Path, reason: str) -> WeightsError:
    return WeightsError(f"{path} is truncated or corrupt: {reason}. Fetch the file again.")
