"""GgufSource: the tensors of a GGUF model as a WeightSource, in the row order of Hugging Face checkpoints.

llama.cpp's converter reorders the rows of query and key projections of `llama` models for its interleaved rope: within
a head of D rows, its row 2i + j is Hugging Face's row j * D/2 + i. Reading undoes that, and the 1 that it adds to the
weights of Gemma's norms, so that networks, kernels and caches know one form only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from max_ray.errors import ParallelismError, WeightsError
from max_ray.gguf.file import GgufFile, GgufTensor
from max_ray.weights.safetensors_header import TensorEntry
from max_ray.weights.source import WeightSource, no_such_tensor

if TYPE_CHECKING:
    import torch

    from max_ray.weights.quantized import QuantizedRows

_INTERLEAVED = ("llama",)  # kinds of models whose converter reorders rows
_REORDERED = re.compile(r"blk\.\d+\.attn_(?P<which>[qk])\.(weight|bias)")


class GgufSource(WeightSource):
    """Holds headers only; may be pickled. `keep_quantized`: offer quantized tensors as codes and scales."""

    def __init__(self, file: GgufFile, *, keep_quantized: bool = False) -> None:
        self._file = file
        self._tensors = dict(_experts_apart(file.tensors))
        self._keep_quantized = keep_quantized

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def dtype(self, name: str) -> torch.dtype:
        import torch

        return {"F16": torch.float16, "BF16": torch.bfloat16}.get(self._tensor(name).type.name, torch.float32)

    def tensor_bytes(self, name: str) -> int:
        return self._tensor(name).nbytes

    def quantization(self, name: str) -> str:
        kind = self._tensor(name).type
        return kind.encoding if self._keep_quantized and kind.is_quantized else ""

    def get_slice(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        tensor = self._tensor(name)
        if tensor.type.is_quantized:
            return self._dequantized(tensor, axis, start, stop)
        if axis == 0:
            rows = self._read_rows(_plain_entry(tensor), tensor, start, stop)
            return rows - 1 if self._counts_from_one(tensor) else rows
        return self._in_order(_read(_plain_entry(tensor), axis, start, stop), tensor)

    def _counts_from_one(self, tensor: GgufTensor) -> bool:
        """Whether a norm's weight is stored with the 1 that Gemma's networks add to it."""
        return self._file.architecture == "gemma3" and tensor.name.endswith("_norm.weight")

    def _dequantized(self, tensor: GgufTensor, axis: int, start: int, stop: int) -> torch.Tensor:
        if axis == 0:
            return self._values(tensor, range(start, stop), range(tensor.shape[-1]))
        block = tensor.type.block_size
        columns = range(start // block * block, -(-stop // block) * block)
        values = self._values(tensor, range(tensor.shape[0]), columns)
        return values[:, start - columns.start : stop - columns.start]

    def _values(self, tensor: GgufTensor, rows: range, columns: range) -> torch.Tensor:
        import torch

        from max_ray.weights.gguf_blocks import dequantize

        values = dequantize(tensor.type.name, self.get_blocks(tensor.name, rows, columns))
        if not bool(torch.isfinite(values).all()):
            raise _not_finite(tensor)
        return values

    def block_type(self, name: str) -> str:
        return self._tensor(name).type.name if self.quantization(name) else ""

    def check_columns(self, name: str, columns: range) -> None:
        tensor = self._tensor(name)
        block = tensor.type.block_size
        if columns.start % block or columns.stop % block:
            raise ParallelismError(
                f"Tensor {name} of type {tensor.type.name} has {tensor.shape[-1] // block} blocks of {block} columns, "
                f"and tensor parallelism would cut through one: choose a tensor_parallel_size that divides "
                f"{tensor.shape[-1] // block}."
            )

    def get_quantized(self, name: str, rows: range, columns: range) -> QuantizedRows:
        from max_ray.weights.gguf_blocks import unpack

        tensor = self._tensor(name)
        result = unpack(tensor.type.name, self.get_blocks(name, rows, columns))
        if not result.has_finite_scales():
            raise _not_finite(tensor)
        return result

    def get_blocks(self, name: str, rows: range, columns: range, buffer: torch.Tensor | None = None) -> torch.Tensor:
        tensor = self._tensor(name)
        if len(tensor.shape) != 2:
            raise WeightsError(
                f"{tensor.path}: quantized tensor {name} has the shape {list(tensor.shape)}, not two axes."
            )
        self.check_columns(name, columns)
        block = tensor.type.block_size
        blocks = self._read_rows(_block_entry(tensor), tensor, rows.start, rows.stop, buffer)  # [R, n, bytes]
        return blocks[:, columns.start // block : columns.stop // block].contiguous()

    def block_place(self, name: str, rows: range, columns: range) -> tuple[str, int, int, int] | None:
        tensor = self._tensor(name)
        head = self._head_rows(tensor)
        if len(tensor.shape) != 2 or len(columns) != tensor.shape[1] or rows.start % head or rows.stop % head:
            return None
        first = tensor.offset + rows.start * tensor.type.row_bytes(tensor.shape[1])
        return str(tensor.path), first, tensor.shape[1] // tensor.type.block_size, head

    def file_entry(self, name: str) -> TensorEntry | None:
        tensor = self._tensor(name)
        is_plain = not tensor.type.is_quantized and self._head_rows(tensor) == 1 and not self._counts_from_one(tensor)
        return _plain_entry(tensor) if is_plain else None

    def _read_rows(
        self, entry: TensorEntry, tensor: GgufTensor, start: int, stop: int, buffer: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Rows [start, stop) in Hugging Face's order; reads the whole heads that they are in."""
        size = self._head_rows(tensor)
        if size == 1:
            return _read(entry, 0, start, stop, buffer)
        first, last = start // size * size, min(-(-stop // size) * size, tensor.shape[0])
        heads = self._in_order(_read(entry, 0, first, last, buffer), tensor)
        return heads[start - first : stop - first]

    def _in_order(self, data: torch.Tensor, tensor: GgufTensor) -> torch.Tensor:
        """Whole heads of rows, [rows, ...], in Hugging Face's order."""
        size = self._head_rows(tensor)
        if size == 1:
            return data
        pairs = data.reshape(-1, size // 2, 2, *data.shape[1:])
        if not tensor.type.is_quantized:
            return pairs.transpose(1, 2).flatten(0, 2)
        import torch

        # torch would start threads of its own for each of the threads that read blocks
        return torch.from_numpy(pairs.numpy().swapaxes(1, 2).reshape(data.shape))

    def _head_rows(self, tensor: GgufTensor) -> int:
        """Rows of a head of a tensor whose rows are reordered within heads; 1 for all others."""
        match = _REORDERED.fullmatch(tensor.name)
        if match is None or self._file.architecture not in _INTERLEAVED:
            return 1
        arch = self._file.architecture
        heads = self._file.metadata.get(f"{arch}.attention.head_count")
        if match["which"] == "k":
            heads = self._file.metadata.get(f"{arch}.attention.head_count_kv", heads)
        heads = heads[0] if isinstance(heads, list) and heads else heads
        if type(heads) is not int or heads < 1 or tensor.shape[0] % (2 * heads):
            raise WeightsError(f"{tensor.path}: {tensor.name} has {tensor.shape[0]} rows for {heads} heads.")
        return tensor.shape[0] // heads

    def _tensor(self, name: str) -> GgufTensor:
        if name not in self._tensors:
            raise no_such_tensor(name, self._tensors)
        return self._tensors[name]


def _not_finite(tensor: GgufTensor) -> WeightsError:
    return WeightsError(f"{tensor.path}: tensor {tensor.name!r} has scales that are no finite numbers.")


def _experts_apart(tensors: Mapping[str, GgufTensor]) -> Iterator[tuple[str, GgufTensor]]:
    """All tensors; the experts of a layer, stacked in one of three axes, as matrices with a number in their names:
    blk.0.ffn_up_exps.weight as blk.0.ffn_up_exps.0.weight and so on."""
    for name, tensor in tensors.items():
        if not name.endswith("_exps.weight") or len(tensor.shape) != 3:
            yield name, _heads_side_by_side(tensor)
            continue
        size, stem = tensor.nbytes // max(1, tensor.shape[0]), name.removesuffix("weight")
        for i in range(tensor.shape[0]):
            expert = f"{stem}{i}.weight"
            yield expert, replace(tensor, name=expert, shape=tensor.shape[1:], offset=tensor.offset + i * size)


def _heads_side_by_side(tensor: GgufTensor) -> GgufTensor:
    """The up-projections of latent attention, a matrix for each head, as one matrix of all rows."""
    if len(tensor.shape) != 3 or not tensor.name.endswith(("attn_k_b.weight", "attn_v_b.weight")):
        return tensor
    return replace(tensor, shape=(tensor.shape[0] * tensor.shape[1], tensor.shape[2]))


def _plain_entry(tensor: GgufTensor) -> TensorEntry:
    return TensorEntry(tensor.path, tensor.type.name, tensor.shape, tensor.offset)


def _block_entry(tensor: GgufTensor) -> TensorEntry:
    """The bytes of a quantized tensor, as [rows, blocks, bytes a block]."""
    blocks = tensor.shape[-1] // tensor.type.block_size
    rows = math.prod(tensor.shape[:-1])
    return TensorEntry(tensor.path, "U8", (rows, blocks, tensor.type.block_bytes), tensor.offset)


def _read(entry: TensorEntry, axis: int, start: int, stop: int, buffer: torch.Tensor | None = None) -> torch.Tensor:
    from max_ray.weights.safetensors_file import read_slice

    return read_slice(entry, axis, start, stop, buffer)
