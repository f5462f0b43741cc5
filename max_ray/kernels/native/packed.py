"""PackedWeight: a linear layer's weight in the order in which the C++ kernel reads it (layout: csrc/linear.cpp).

N outputs, K inputs, M rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from max_ray.kernels.native.build import library
from max_ray.kernels.native.calls import Kernel, advise_huge_pages, kernel

_PANEL = 16


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """data: the packed numbers, padded to whole panels. shape: (N, K) of the weight it was made from."""

    data: torch.Tensor
    shape: tuple[int, int]
    _multiply: Kernel
    _read_rows: Kernel

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

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


def pack_weight(weight: torch.Tensor) -> PackedWeight | None:
    """The packed copy of a weight [N, K]; None where no kernel would read it (a GPU, another dtype, no compiler)."""
    if weight.device.type != "cpu" or library() is None or weight.dim() != 2 or 0 in weight.shape:
        return None
    pack, multiply, read_rows = (kernel(name, weight.dtype) for name in ("pack", "linear", "rows"))
    if pack is None or multiply is None or read_rows is None:
        return None
    num_outputs, num_inputs = weight.shape
    data = torch.empty(-(-num_outputs // _PANEL) * _PANEL * (num_inputs + num_inputs % 2), dtype=weight.dtype)
    advise_huge_pages(data)
    weight = weight.contiguous()
    pack(weight.data_ptr(), num_outputs, num_inputs, data.data_ptr(), torch.get_num_threads())
    return PackedWeight(data, (num_outputs, num_inputs), multiply, read_rows)
