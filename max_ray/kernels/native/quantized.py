"""`quantized_linear` in C++, for the kinds of PackedMatrix that run on CPUs; FP8 runs the reference.

| inputs  | processor | products                                                                     | source        |
|---------|-----------|------------------------------------------------------------------------------|---------------|
| 2 bytes | with VNNI | of bytes: inputs rounded to 8 bits in groups of 32 columns, a scale for each | int8.cpp      |
| others  |           | of floats: weights widened, inputs as they are                               | quantized.cpp |

`MAX_RAY_INT8=0` switches the first off. Either way gives a row the same bits in every batch.
"""

from __future__ import annotations

from functools import cache

import torch

from max_ray.kernels import reference
from max_ray.kernels.native.build import library
from max_ray.kernels.native.calls import QuantizedMatrix, kernel
from max_ray.kernels.quantized import PackedMatrix, PackedQ4, PackedQ4_1, PackedQ4K, PackedQ5K, PackedQ6K, PackedQ8
from max_ray.kernels.reference.quantized import one_by_one
from max_ray.settings import int8_inputs


def quantized_linear(x: torch.Tensor, weight: PackedMatrix, out: torch.Tensor | None = None) -> torch.Tensor:
    known = described(weight)
    way = "int8" if x.dtype in (torch.bfloat16, torch.float16) and rounds_inputs() else "linear"
    run = kernel(f"{known[0]}_{way}", x.dtype) if known is not None else None
    if run is None or known is None:
        return reference.quantized_linear(x, weight, out)
    flat = x.reshape(-1, weight.columns).contiguous()
    y = torch.empty((flat.shape[0], weight.rows), dtype=x.dtype) if out is None else out
    assert y.shape == (flat.shape[0], weight.rows), "`out` has two axes"
    assert y.stride(1) == 1, "rows are written in one piece"
    sizes = (flat.shape[0], weight.columns, weight.rows)
    run(known[1], flat.data_ptr(), *sizes, y.data_ptr(), y.stride(0), torch.get_num_threads())
    return y if out is not None else y.view(*x.shape[:-1], weight.rows)


def grouped_quantized_linear(
    x: torch.Tensor, weight: PackedMatrix, ends: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    return one_by_one(quantized_linear, x, weight, ends, out)


@cache
def rounds_inputs() -> bool:
    """Whether inputs of 2 bytes are rounded to bytes: if the processor multiplies bytes and no setting forbids it."""
    loaded = library()
    return loaded is not None and bool(loaded.has_int8_products()) and int8_inputs()


def described(weight: PackedMatrix) -> tuple[str, QuantizedMatrix] | None:
    """(kind, the matrix as C++ sees it); None for a kind without a kernel."""
    match weight:
        case PackedQ4K(codes=codes, scales=scales, mins=mins, super_scales=supers, super_mins=super_mins):
            return "q4k", _matrix(codes, scales=scales, mins=mins, super_scales=supers, super_mins=super_mins)
        case PackedQ5K(codes=codes, scales=scales, mins=mins, super_scales=supers, super_mins=super_mins):
            above = {"super_scales": supers, "super_mins": super_mins}
            return "q5k", _matrix(codes, high_codes=weight.high_codes, scales=scales, mins=mins, **above)
        case PackedQ6K(codes=codes, high_codes=high, scales=scales, super_scales=supers):
            return "q6k", _matrix(codes, high_codes=high, scales=scales, super_scales=supers)
        case PackedQ8(codes=codes, scales=scales):
            return "q8", _matrix(codes, super_scales=scales)
        case PackedQ4(codes=codes, scales=scales, zeros=zeros):
            matrix = _matrix(codes, mins=zeros, super_scales=scales)
            matrix.group_size = weight.columns // scales.shape[1]
            matrix.single_zero = int(zeros.numel() == 1)
            return "q4", matrix
        case PackedQ4_1(codes=codes, scales=scales, mins=mins):
            return "q41", _matrix(codes, super_scales=scales, super_mins=mins)
    return None


def _matrix(codes: torch.Tensor, **others: torch.Tensor) -> QuantizedMatrix:
    """others: by their names in the structure."""
    for tensor in (codes, *others.values()):
        assert tensor.is_contiguous(), "tiles are read from end to end"
    return QuantizedMatrix(codes.data_ptr(), **{name: tensor.data_ptr() for name, tensor in others.items()})
