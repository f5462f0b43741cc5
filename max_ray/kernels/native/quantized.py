"""The C++ twin of `quantized_linear`, for the kinds of PackedMatrix that are run on CPUs; FP8 runs the torch twin."""

from __future__ import annotations

import torch

from max_ray.kernels import cpu
from max_ray.kernels.native.calls import QuantizedMatrix, kernel
from max_ray.kernels.quantized import PackedMatrix, PackedQ4, PackedQ4K, PackedQ6K, PackedQ8


def quantized_linear(x: torch.Tensor, weight: PackedMatrix) -> torch.Tensor:
    described = _described(weight)
    run = kernel(f"{described[0]}_linear", x.dtype) if described is not None else None
    if run is None or described is None:
        return cpu.quantized_linear(x, weight)
    flat = x.reshape(-1, weight.columns).contiguous()
    y = torch.empty((flat.shape[0], weight.rows), dtype=x.dtype)
    sizes = (flat.shape[0], weight.columns, weight.rows)
    run(described[1], flat.data_ptr(), *sizes, y.data_ptr(), torch.get_num_threads())
    return y.view(*x.shape[:-1], weight.rows)


def _described(weight: PackedMatrix) -> tuple[str, QuantizedMatrix] | None:
    """(kind, the matrix as C++ sees it); None for a kind without a kernel."""
    match weight:
        case PackedQ4K(codes=codes, scales=scales, mins=mins, super_scales=supers, super_mins=super_mins):
            return "q4k", _matrix(codes, mins, scales, supers, super_mins)
        case PackedQ6K(codes=codes, high_codes=high, scales=scales, super_scales=supers):
            return "q6k", _matrix(codes, high, scales, supers)
        case PackedQ8(codes=codes, scales=scales):
            return "q8", _matrix(codes, None, None, scales)
        case PackedQ4(codes=codes, scales=scales, zeros=zeros):
            matrix = _matrix(codes, zeros, None, scales)
            matrix.group_size = weight.columns // scales.shape[1]
            matrix.single_zero = int(zeros.numel() == 1)
            return "q4", matrix
    return None


def _matrix(*tensors: torch.Tensor | None) -> QuantizedMatrix:
    """codes, more codes, scales, super-scales, super-minima."""
    for tensor in tensors:
        assert tensor is None or tensor.is_contiguous(), "tiles are read from end to end"
    return QuantizedMatrix(*[None if tensor is None else tensor.data_ptr() for tensor in tensors])
