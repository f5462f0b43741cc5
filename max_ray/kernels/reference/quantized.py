"""Products with quantized weights in plain torch: the definition. Slow: it dequantizes the matrix in every call."""

from __future__ import annotations

from collections.abc import Callable

import torch

from max_ray.kernels.quantized import TILE, PackedMatrix, of_stack

_CHUNK_ELEMENTS = 1 << 18
"""So many weights are dequantized at a time: 1 MiB of float32, which stays in cache."""


def quantized_linear(x: torch.Tensor, weight: PackedMatrix, out: torch.Tensor | None = None) -> torch.Tensor:
    """See `kernels.quantized_linear`."""
    flat = x.reshape(-1, weight.columns).float()
    step = max(1, _CHUNK_ELEMENTS // (TILE * weight.columns))
    pieces = [
        flat @ weight.dequantize(slice(first, min(first + step, weight.num_tiles))).t()
        for first in range(0, weight.num_tiles, step)
    ]
    result = torch.cat(pieces, dim=-1)[:, : weight.rows].to(x.dtype)
    return out.copy_(result) if out is not None else result.reshape(*x.shape[:-1], weight.rows)


def grouped_quantized_linear(
    x: torch.Tensor, weight: PackedMatrix, ends: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """See `kernels.grouped_quantized_linear`."""
    return one_by_one(quantized_linear, x, weight, ends, out)


def one_by_one(
    linear: Callable[[torch.Tensor, PackedMatrix, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    weight: PackedMatrix,
    ends: torch.Tensor,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """A grouped product group by group. Waits for the device."""
    y = x.new_zeros(len(x), weight.rows) if out is None else out
    start = 0
    for index, end in enumerate(ends.tolist()):
        if end > start:
            linear(x[start:end], of_stack(weight, index), y[start:end])
        start = end
    return y


def quantized_rows(weight: PackedMatrix, indices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """See `kernels.quantized_rows`."""
    return weight.gather(indices.reshape(-1)).to(dtype).reshape(*indices.shape, weight.columns)
