"""The Mixtral network (Jiang et al. 2024): a Mistral whose feed-forward layers are mixtures of experts.

Axes: T new tokens of a ragged batch, D hidden size.
"""

from __future__ import annotations

import torch

from architectures.mixtral.model_config import MixtralConfig
from max_ray.distributed import TPGroup
from max_ray.nn import Attention, Experts, Linear, Module, Transformer, TransformerBlock, softmax_top_k
from max_ray.nn.activation import gated


class MixtralMoE(Module):
    """Each token goes to the experts that its router ranks highest: [T, D] -> [T, D]."""

    def __init__(self, config: MixtralConfig, tp: TPGroup, dtype: torch.dtype, spread: bool) -> None:
        dim, num_experts = config.hidden_size, config.num_experts
        self._top_k = config.num_experts_per_token
        self.router = Linear(dim, num_experts, bias=False, dtype=dtype, device=tp.device)
        self.experts = Experts(
            num_experts, dim, config.intermediate_size, tp, spread=spread, gate=gated(config.activation), dtype=dtype
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.experts(x, *softmax_top_k(self.router(x), self._top_k, renormalize=True))
        return y


class MixtralBlock(TransformerBlock):
    """One layer: see TransformerBlock."""

    def __init__(self, config: MixtralConfig, layer_index: int, tp: TPGroup, dtype: torch.dtype, spread: bool) -> None:
        dim = config.hidden_size
        attention = Attention(
            dim,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            layer_index,
            tp,
            sliding_window=config.sliding_window,
            dtype=dtype,
        )
        mlp = MixtralMoE(config, tp, dtype, spread)
        super().__init__(config, attention, mlp, tp, dtype)


class Mixtral(Transformer):
    """Token ids in, logits out: see Transformer. spread: see Experts."""

    def __init__(self, config: MixtralConfig, max_length: int, tp: TPGroup, dtype: torch.dtype, spread: bool) -> None:
        layers = [MixtralBlock(config, i, tp, dtype, spread) for i in range(config.num_layers)]
        super().__init__(config, layers, max_length, tp, dtype)
