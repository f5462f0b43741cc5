"""The GTE v1.5 network (Zhang et al. 2024, mGTE): post-norm layers as BERT's, with a rope in place of learned positions
and a gated feed-forward part.

Axes: T tokens of a ragged batch, D hidden size, F inner width.
"""

from __future__ import annotations

import torch

from architectures.gte.model_config import GteConfig
from max_ray.distributed import TPGroup
from max_ray.nn import ColumnParallelLinear, Module
from max_ray.nn.activation import activation
from max_ray.nn.rope_encoder import RopeEncoder


class GteMLP(Module):
    """down(act(gate(x)) * up(x)): [T, D] -> [T, D]. Checkpoints store up and gate as one matrix, up first."""

    def __init__(self, config: GteConfig, tp: TPGroup, dtype: torch.dtype) -> None:
        dim, hidden_dim = config.hidden_size, config.intermediate_size
        self._act = activation(config.activation)
        self.up_gate = ColumnParallelLinear(dim, 2 * hidden_dim, tp, bias=False, dtype=dtype)
        self.down = ColumnParallelLinear(hidden_dim, dim, tp, bias=True, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, gate = self.up_gate(x).chunk(2, dim=-1)  # [T, F]
        y: torch.Tensor = self.down(self._act(gate) * up)
        return y


class Gte(RopeEncoder):
    """Token ids in, hidden states out: see RopeEncoder."""

    def __init__(self, config: GteConfig, max_length: int, tp: TPGroup, dtype: torch.dtype) -> None:
        super().__init__(config, max_length, tp, dtype, mlp=lambda: GteMLP(config, tp, dtype), attention_bias=True)
