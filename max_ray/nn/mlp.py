"""The gated feed-forward layer of the Llama kind (SwiGLU, Shazeer 2020), cut over its inner width."""

from __future__ import annotations

from collections.abc import Callable

import torch

from max_ray import kernels
from max_ray.distributed import TPGroup
from max_ray.nn.linear import MergedColumnParallelLinear, RowParallelLinear
from max_ray.nn.module import Module


class GatedMLP(Module):
    """down(silu(gate(x)) * up(x)): [T, D] -> [T, D].

    Args:
        reduce: see RowParallelLinear.
        gate: the gated activation: gate and up side by side, `[..., 2F]`, to `[..., F]`. Default: silu(gate) * up.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        tp: TPGroup,
        *,
        bias: bool = False,
        reduce: bool = True,
        gate: Callable[[torch.Tensor], torch.Tensor] = kernels.silu_and_mul,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._gate = gate
        self.gate_up = MergedColumnParallelLinear(
            dim, {"gate": hidden_dim, "up": hidden_dim}, tp, bias=bias, dtype=dtype
        )
        self.down = RowParallelLinear(hidden_dim, dim, tp, bias=bias, reduce=reduce, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(self._gate(self.gate_up(x)))
        return y
