"""The Qwen3 mixture-of-experts network (Qwen3 technical report 2025): a Qwen3 whose feed-forward layers, or most of
them, are mixtures of experts.

Axes: T new tokens of a ragged batch, D hidden size.
"""

from __future__ import annotations

import torch

from architectures.qwen3_moe.model_config import Qwen3MoeConfig
from max_ray.distributed import TPGroup
from max_ray.nn import (
    Attention,
    Experts,
    GatedMLP,
    Linear,
    Module,
    RMSNorm,
    Transformer,
    TransformerBlock,
    softmax_top_k,
)
from max_ray.nn.activation import gated


class Qwen3MoeLayer(Module):
    """Each token goes to the experts that its router ranks highest: [T, D] -> [T, D]."""

    def __init__(self, config: Qwen3MoeConfig, tp: TPGroup, dtype: torch.dtype, spread: bool) -> None:
        dim, num_experts = config.hidden_size, config.num_experts
        self._top_k = config.num_experts_per_token
        self._renormalize = config.renormalize
        self.router = Linear(dim, num_experts, bias=False, dtype=dtype, device=tp.device)
        self.experts = Experts(
            num_experts, dim, config.expert_size, tp, spread=spread, gate=gated(config.activation), dtype=dtype
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.experts(x, *softmax_top_k(self.router(x), self._top_k, renormalize=self._renormalize))
        return y


class Qwen3MoeBlock(TransformerBlock):
    """One layer: see TransformerBlock."""

    def __init__(self, config: Qwen3MoeConfig, layer_index: int, tp: TPGroup, dtype: torch.dtype, spread: bool) -> None:
        dim, eps = config.hidden_size, config.rms_norm_eps
        is_dense = layer_index in config.dense_layers
        attention = Attention(
            dim,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            layer_index,
            tp,
            bias=config.attention_bias,
            q_norm=RMSNorm(config.head_dim, eps, dtype=dtype, device=tp.device),
            k_norm=RMSNorm(config.head_dim, eps, dtype=dtype, device=tp.device),
            sliding_window=config.sliding_window,
            dtype=dtype,
        )
        mlp: Module = (
            GatedMLP(dim, config.intermediate_size, tp, gate=gated(config.activation), dtype=dtype)
            if is_dense
            else Qwen3MoeLayer(config, tp, dtype, spread)
        )
        super().__init__(config, attention, mlp, tp, dtype)


class Qwen3Moe(Transformer):
    """Token ids in, logits out: see Transformer. spread: see Experts."""

    def __init__(self, config: Qwen3MoeConfig, max_length: int, tp: TPGroup, dtype: torch.dtype, spread: bool) -> None:
        layers = [Qwen3MoeBlock(config, i, tp, dtype, spread) for i in range(config.num_layers)]
        super().__init__(config, layers, max_length, tp, dtype)
