"""WeightSource: the tensors of a checkpoint, read lazily and in slices. For load_weights and weight adapters."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

from max_ray.errors import WeightsError, nearest

if TYPE_CHECKING:
    import torch

    from max_ray.weights.quantized import QuantizedRows
    from max_ray.weights.safetensors_header import TensorEntry

_PACKED_BITS = {"q4_k": 4.625, "q5_k": 5.625, "q6_k": 6.5625, "q8_0": 8.5, "q4_0": 4.5, "q4_1": 5.0}


class WeightSource(ABC):
    """A checkpoint by tensor name. Opening one reads headers only; every `get` reads from the file anew."""

    @abstractmethod
    def names(self) -> list[str]:
        """All tensor names, in file order."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Raises WeightsError where there is no such tensor; so do all methods below."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """The dtype stored in the checkpoint; of quantized tensors, the one that `get_slice` gives."""

    @abstractmethod
    def get_slice(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of one axis as a tensor on the CPU; no other bytes of the tensor are read."""

    def get(self, name: str) -> torch.Tensor:
        """The whole tensor, on the CPU. It may share memory with the source: do not write to it."""
        shape = self.shape(name)
        return self.get_slice(name, 0, 0, shape[0] if shape else 1)

    def quantization(self, name: str) -> str:
        """How the tensor is quantized ("q4_k", "fp8", ...) where it is to be kept so, else ""."""
        self.shape(name)
        return ""

    def check_columns(self, name: str, columns: range) -> None:
        """Raises ParallelismError where these columns of a quantized tensor cut through a group of codes that share a
        scale, as far as the headers tell."""
        self.shape(name)

    def get_quantized(self, name: str, rows: range, columns: range) -> QuantizedRows:
        """A rectangle of a tensor that is quantized: its codes and scales. Raises as `check_columns` does."""
        raise AssertionError(f"{name} is not quantized")

    def block_type(self, name: str) -> str:
        """The GGUF type ("Q4_K") of a quantized tensor whose blocks `get_blocks` gives as they are; else ""."""
        return ""

    def get_blocks(self, name: str, rows: range, columns: range, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """A rectangle of a tensor that is stored in blocks: uint8 [rows, blocks a row, bytes a block].

        buffer: uint8 memory to read into, where it is large enough; the result is then good until its next use.
        Raises as `get_quantized` does, but does not look at the scales.
        """
        raise AssertionError(f"{name} is not stored in blocks")

    def block_place(self, name: str, rows: range, columns: range) -> tuple[str, int, int, int] | None:
        """Where the blocks that `get_blocks` gives lie in a file, rows one after another: the file, the first byte,
        blocks in a row, and rows of a head whose two halves take turns there (1: none do). None where they are cut."""
        return None

    def file_entry(self, name: str) -> TensorEntry | None:
        """Where the numbers that `get_slice` gives lie in a file, for readers that have a place for them; None where
        they must be computed."""
        return None

    def adds_nothing(self, name: str) -> bool:
        """Whether a tensor for which a network has no place may be left out: it would change nothing."""
        return False

    def packed_bits(self, name: str) -> float:
        """Bits of memory that a weight of a quantized tensor takes once it is packed (`max_ray.kernels.quantized`)."""
        return _PACKED_BITS[self.quantization(name)]

    def tensor_bytes(self, name: str) -> int:
        """Bytes of a tensor as stored."""
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(self.tensor_bytes(name) for name in self.names())


class DictWeightSource(WeightSource):
    """Tensors that are in memory already; for tests and for adapters that compute weights."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = dict(tensors)

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensor(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensor(name).dtype

    def get_slice(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        tensor = self._tensor(name)
        return tensor.narrow(axis, start, stop - start) if tensor.dim() else tensor

    def _tensor(self, name: str) -> torch.Tensor:
        if name not in self._tensors:
            raise no_such_tensor(name, self._tensors)
        return self._tensors[name]


def no_such_tensor(name: str, known: Mapping[str, object]) -> WeightsError:
    return WeightsError(f"The checkpoint has no tensor {name!r}.{nearest(name, known)}")
