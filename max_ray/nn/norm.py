"""RMSNorm (Zhang and Sennrich 2019), alone or together with the residual sum before it."""

from __future__ import annotations

import torch

from max_ray import kernels
from max_ray.driver import DeviceLike, as_torch_device
from max_ray.nn.module import Module


class RMSNorm(Module):
    """Normalises [T, D] over D and scales by a learned weight; whole on every rank."""

    weight: torch.Tensor

    def __init__(self, dim: int, eps: float, *, dtype: torch.dtype = torch.float32, device: DeviceLike = "cpu") -> None:
        self._eps = eps
        self.add_parameter("weight", torch.ones(dim, dtype=dtype, device=as_torch_device(device)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return kernels.rmsnorm(x, self.weight, self._eps)

    def add_and_norm(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm of x + residual, x + residual), in one pass over the memory."""
        return kernels.fused_add_rmsnorm(x, residual, self.weight, self._eps)
