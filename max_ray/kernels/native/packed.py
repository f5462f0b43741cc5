"""PackedWeight: a linear layer's weight in the order in which the C++ kernel reads it (layout: csrc/panels.h).

N outputs, K inputs, M rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from max_ray.host_memory import zeros
from max_ray.kernels.native.build import library
from max_ray.kernels.native.calls import Kernel, kernel


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """data: the packed numbers, padded to whole panels. shape: (N, K) of the weight it was made from. PANEL: rows that
    are packed together."""

    PANEL: ClassVar = 16
    data: torch.Tensor
    shape: tuple[int, int]
    _pack: Kernel
    _multiply: Kernel
    _read_rows: Kernel

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    def write(self, first_row: int, rows: torch.Tensor, num_threads: int) -> None:
        """Packs rows [R, K] of the weight, from `first_row` on, a multiple of PANEL. Where R is none, the panel's other
        rows become zero."""
        num_outputs, num_inputs = self.shape
        assert first_row % self.PANEL == 0, f"row {first_row} is within a panel"
        assert rows.shape[1] == num_inputs, f"{rows.shape[1]} inputs for a weight of {num_inputs}"
        assert rows.dtype == self.dtype, f"{rows.dtype} rows for a {self.dtype} weight"
        assert first_row + len(rows) <= num_outputs, "more rows than the weight has"
        rows = rows.contiguous()
        panel = self.data[first_row * _padded(num_inputs) :]
        self._pack(rows.data_ptr(), len(rows), num_inputs, panel.data_ptr(), num_threads)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [..., K] -> x W^T + bias [..., N]. Sums in float32, each output one chain in the order of K, rounded to the
        dtype once (twice with a bias): a row's result does not depend on the rows beside it."""
        num_outputs, num_inputs = self.shape
        rows = x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, num_inputs).contiguous()
        assert rows.dtype == self.dtype, f"a {rows.dtype} input for a {self.dtype} weight"
        assert rows.shape[1] == num_inputs, f"{rows.shape[1]} inputs for a weight of {num_inputs}"
        y = torch.empty((rows.shape[0], num_outputs), dtype=x.dtype)
        self._multiply(
            rows.data_ptr(),
            rows.stride(0),
            rows.shape[0],
            num_inputs,
            self.data.data_ptr(),
            num_outputs,
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            torch.get_num_threads(),
        )
        return y if x.dim() == 2 else y.view(*x.shape[:-1], num_outputs)

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Rows of the weight, int64 [T] -> [T, K]: the embedding of a model whose head is the same weight."""
        assert indices.dim() == 1, f"row numbers {tuple(indices.shape)} are not [T]"
        indices = indices.contiguous()
        y = torch.empty((len(indices), self.shape[1]), dtype=self.dtype)
        arguments = (self.data.data_ptr(), self.shape[1], indices.data_ptr(), len(indices), y.data_ptr())
        self._read_rows(*arguments, torch.get_num_threads())
        return y


def new_packed(shape: torch.Size, dtype: torch.dtype) -> PackedWeight | None:
    """A weight [N, K] of zeros to be written; None where no kernel would read it (another dtype, no compiler)."""
    if len(shape) != 2:
        return None
    num_outputs, num_inputs = shape
    if library() is None or 0 in (num_outputs, num_inputs):
        return None
    pack, multiply, read_rows = (kernel(name, dtype) for name in ("pack", _product(dtype), "rows"))
    if pack is None or multiply is None or read_rows is None:
        return None
    data = zeros(-(-num_outputs // PackedWeight.PANEL) * PackedWeight.PANEL * _padded(num_inputs), dtype=dtype)
    return PackedWeight(data, (num_outputs, num_inputs), pack, multiply, read_rows)


def pack_weight(weight: torch.Tensor) -> PackedWeight | None:
    """The packed copy of a weight [N, K]; None where no kernel would read it (a GPU, or see `new_packed`)."""
    packed = new_packed(weight.shape, weight.dtype) if weight.device.type == "cpu" else None
    if packed is not None:
        packed.write(0, weight, torch.get_num_threads())
    return packed


def _product(dtype: torch.dtype) -> str:
    """Which kernel multiplies. For bfloat16: by matrix registers (csrc/linear_tiles.cpp) or by products of pairs
    (linear_dot.cpp) where the processor has them; else csrc/linear.cpp."""
    loaded = library()
    if loaded is None or dtype != torch.bfloat16:
        return "linear"
    if loaded.has_bf16_tiles():
        return "linear_tiles"
    return "linear_dot" if loaded.has_bf16_products() else "linear"


def _padded(num_inputs: int) -> int:
    """Inputs come in pairs."""
    return num_inputs + num_inputs % 2
