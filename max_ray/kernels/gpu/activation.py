# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Gated activations. One program a row and block of columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from max_ray.kernels.gpu.launch import on_device_of, padded, unit_stride, warps_for

_MAX_BLOCK = 2048


@triton.jit
def silu_and_mul_kernel(x, out, x_stride, width, BLOCK: tl.constexpr):
    """out [rows, width] = silu(x[:, :width]) * x[:, width:]; silu is rounded to x's dtype before it multiplies."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(x + row * x_stride + columns, mask=inside, other=0.0)
    up = tl.load(x + row * x_stride + width + columns, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    activated = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    product = activated.to(tl.float32) * up.to(tl.float32)
    tl.store(out + row * width + columns, product.to(gate.dtype), mask=inside)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    assert x.shape[-1] % 2 == 0, f"gate and up do not split {x.shape[-1]} columns evenly"
    width = x.shape[-1] // 2
    out = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    rows = unit_stride(x.reshape(-1, 2 * width))
    block = min(_MAX_BLOCK, padded(width))
    with on_device_of(x):
        silu_and_mul_kernel[(len(rows), triton.cdiv(width, block))](
            rows, out, rows.stride(0), width, BLOCK=block, num_warps=warps_for(block)
        )
    return out
