"""The Nomic BERT network (Nussbaum et al. 2024): post-norm layers as BERT's, with a rope in place of learned positions,
a gated feed-forward part, and no biases but in the norms.

Axes: T tokens of a ragged batch, D hidden size, H heads, d head_dim, R rotated width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from architectures.nomic_bert.model_config import NomicBertConfig
from max_ray import kernels
from max_ray.distributed import TPGroup
from max_ray.nn import ColumnParallelLinear, GatedMLP, Module, RotaryEmbedding, VocabParallelEmbedding
from max_ray.nn.activation import gated
from max_ray.nn.encoder import EqualRows, LayerNorm, Table, bidirectional_attention


class NomicBertAttention(Module):
    """Self-attention of one layer: [T, D] -> [T, D]."""

    def __init__(self, config: NomicBertConfig, tp: TPGroup, dtype: torch.dtype) -> None:
        dim = config.hidden_size
        self.qkv = ColumnParallelLinear(dim, 3 * dim, tp, dtype=dtype)
        self.out = ColumnParallelLinear(dim, dim, tp, dtype=dtype)
        self._head_dim = config.head_dim

    def forward(self, x: torch.Tensor, cos_sin: torch.Tensor, groups: Sequence[EqualRows]) -> torch.Tensor:
        """cos_sin [T, R]: the rotation of each token."""
        q, k, v = (part.unflatten(-1, (-1, self._head_dim)) for part in self.qkv(x).chunk(3, dim=-1))  # [T, H, d]
        q, k = kernels.apply_rope(q, k, cos_sin, None)
        y: torch.Tensor = self.out(bidirectional_attention(q, k, v, groups).flatten(-2))
        return y


class NomicBertBlock(Module):
    """One layer: norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(self, config: NomicBertConfig, tp: TPGroup, dtype: torch.dtype) -> None:
        dim, eps = config.hidden_size, config.layer_norm_eps
        self.attention = NomicBertAttention(config, tp, dtype)
        self.attention_norm = LayerNorm(dim, eps, dtype=dtype, device=tp.device)
        self.mlp = GatedMLP(dim, config.intermediate_size, tp, gate=gated(config.activation), dtype=dtype)
        self.mlp_norm = LayerNorm(dim, eps, dtype=dtype, device=tp.device)

    def forward(self, x: torch.Tensor, cos_sin: torch.Tensor, groups: Sequence[EqualRows]) -> torch.Tensor:
        x = self.attention_norm(x + self.attention(x, cos_sin, groups))
        y: torch.Tensor = self.mlp_norm(x + self.mlp(x))
        return y


class NomicBert(Module):
    """Token ids in, hidden states out. Weights are uninitialised until loaded."""

    def __init__(self, config: NomicBertConfig, max_length: int, tp: TPGroup, dtype: torch.dtype) -> None:
        dim = config.hidden_size
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, dim, tp, dtype=dtype)
        self.types = Table(config.num_token_types, dim, dtype=dtype, device=tp.device)
        self.embed_norm = LayerNorm(dim, config.layer_norm_eps, dtype=dtype, device=tp.device)
        self.layers = [NomicBertBlock(config, tp, dtype) for _ in range(config.num_layers)]
        self.rotary = RotaryEmbedding(config.rope, max_length, dtype=dtype, device=tp.device)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, groups: Sequence[EqualRows]) -> torch.Tensor:
        """tokens, positions [T] -> [T, D]. Every token has the type 0."""
        cos_sin = self.rotary(positions)  # [T, R], for all layers
        x: torch.Tensor = self.embed_norm(self.embed_tokens(tokens) + self.types.weight[0])
        for layer in self.layers:
            x = layer(x, cos_sin, groups)
        return x
