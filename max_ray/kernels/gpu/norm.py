# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Root-mean-square normalisation. One program a row; sums in float32, rounded where the reference rounds."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from max_ray.kernels.gpu.launch import on_device_of, padded, unit_stride, warps_for


@triton.jit
def rmsnorm_kernel(
    x,
    residual,
    weight,
    out,
    new_residual,
    x_stride,
    residual_stride,
    hidden,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = rmsnorm(x + residual) * weight and new_residual = x + residual, both contiguous; without residual: of x."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden
    values = tl.load(x + row * x_stride + columns, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        before = tl.load(residual + row * residual_stride + columns, mask=inside, other=0.0)
        values = (values.to(tl.float32) + before.to(tl.float32)).to(values.dtype)
        tl.store(new_residual + row * hidden + columns, values, mask=inside)
    wide = values.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, 0) / hidden + eps)
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    scaled = normed.to(values.dtype).to(tl.float32) * scale
    tl.store(out + row * hidden + columns, scaled.to(out.dtype.element_ty), mask=inside)


def rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    rows = unit_stride(x.reshape(-1, x.shape[-1]))
    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    _launch(rows, None, weight, out, rows, eps)
    return out


def fused_add_rmsnorm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    assert x.shape == residual.shape, f"x {tuple(x.shape)} and residual {tuple(residual.shape)} differ"
    assert x.dtype == residual.dtype, f"x is {x.dtype}, residual {residual.dtype}"
    rows, before = (unit_stride(part.reshape(-1, part.shape[-1])) for part in (x, residual))
    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    new_residual = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(rows, before, weight, out, new_residual, eps)
    return out, new_residual


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    out: torch.Tensor,
    new_residual: torch.Tensor,
    eps: float,
) -> None:
    """x, residual: [rows, D] with unit stride along D. `new_residual` is written only with a residual."""
    num_rows, hidden = x.shape
    if num_rows == 0:
        return
    block, before = padded(hidden), x if residual is None else residual
    with on_device_of(x):
        rmsnorm_kernel[(num_rows,)](
            x,
            before,
            weight.contiguous(),
            out,
            new_residual,
            x.stride(0),
            before.stride(0),
            hidden,
            eps,
            HAS_RESIDUAL=residual is not None,
            BLOCK=block,
            num_warps=warps_for(block),
        )
