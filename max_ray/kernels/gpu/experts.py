# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The weighted sum of a token's experts, in the order of its choices: the same bits every time, which atomic additions
do not give."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from max_ray.kernels.gpu.launch import on_device_of, padded, unit_stride, warps_for

_MOST_COLUMNS = 2048  # of a program


@triton.jit(do_not_specialize=["top_k"])
def sum_choices_kernel(y, places, weights, out, y_stride, width, top_k, BLOCK: tl.constexpr):
    """Grid: (tokens, blocks of columns). places, weights: contiguous [T, K]."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for choice in range(top_k):
        place = tl.load(places + token * top_k + choice)
        weight = tl.load(weights + token * top_k + choice)
        total += weight * tl.load(y + place * y_stride + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=mask)


def sum_choices(y: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    num_tokens, top_k = places.shape
    y, width = unit_stride(y), y.shape[1]
    out = torch.empty(num_tokens, width, dtype=y.dtype, device=y.device)
    if num_tokens == 0:
        return out
    block = min(_MOST_COLUMNS, padded(width))
    with on_device_of(y):
        sum_choices_kernel[(num_tokens, -(-width // block))](
            *(y, places.contiguous(), weights.float().contiguous(), out),
            *(y.stride(0), width, top_k),
            BLOCK=block,
            num_warps=warps_for(block),
        )
    return out
