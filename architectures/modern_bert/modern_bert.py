"""The ModernBERT network (Warner et al. 2024): pre-norm layers with a gated feed-forward part; every third layer sees
the whole text, the others a window around each token, and the two kinds have a rope of their own.

Axes: T tokens of a ragged batch, D hidden size, H heads, d head_dim, F feed-forward width, R rotated width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from architectures.modern_bert.model_config import ModernBertConfig
from max_ray import kernels
from max_ray.distributed import TPGroup
from max_ray.nn import ColumnParallelLinear, Module, RotaryEmbedding, VocabParallelEmbedding
from max_ray.nn.activation import activation
from max_ray.nn.encoder import EqualRows, LayerNorm, bidirectional_attention
from max_ray.nn.layer_types import SLIDING


class ModernBertAttention(Module):
    """Self-attention of one layer: [T, D] -> [T, D]."""

    def __init__(self, config: ModernBertConfig, reach: int | None, tp: TPGroup, dtype: torch.dtype) -> None:
        dim, bias = config.hidden_size, config.attention_bias
        self.qkv = ColumnParallelLinear(dim, 3 * dim, tp, bias=bias, dtype=dtype)
        self.out = ColumnParallelLinear(dim, dim, tp, bias=bias, dtype=dtype)
        self._head_dim = config.head_dim
        self._reach = reach

    def forward(self, x: torch.Tensor, cos_sin: torch.Tensor, groups: Sequence[EqualRows]) -> torch.Tensor:
        """cos_sin [T, R]: the rotation of each token."""
        q, k, v = (part.unflatten(-1, (-1, self._head_dim)) for part in self.qkv(x).chunk(3, dim=-1))  # [T, H, d]
        q, k = kernels.apply_rope(q, k, cos_sin, None)
        y: torch.Tensor = self.out(bidirectional_attention(q, k, v, groups, reach=self._reach).flatten(-2))
        return y


class ModernBertMLP(Module):
    """down(act(a) * b) with [a | b] = up(x): [T, D] -> [T, D]."""

    def __init__(self, config: ModernBertConfig, tp: TPGroup, dtype: torch.dtype) -> None:
        dim, width, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self._act = activation(config.activation)
        self.up = ColumnParallelLinear(dim, 2 * width, tp, bias=bias, dtype=dtype)
        self.down = ColumnParallelLinear(width, dim, tp, bias=bias, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.up(x).chunk(2, dim=-1)
        y: torch.Tensor = self.down(self._act(a) * b)
        return y


class ModernBertBlock(Module):
    """One layer; the first has no norm before its attention, for the embedding has just been normalised."""

    def __init__(self, config: ModernBertConfig, layer_index: int, tp: TPGroup, dtype: torch.dtype) -> None:
        def norm() -> LayerNorm:
            return LayerNorm(config.hidden_size, config.norm_eps, bias=config.norm_bias, dtype=dtype, device=tp.device)

        self.kind = config.layer_types[layer_index]
        self.attention_norm = norm() if layer_index else None
        self.attention = ModernBertAttention(config, config.reach if self.kind == SLIDING else None, tp, dtype)
        self.mlp_norm = norm()
        self.mlp = ModernBertMLP(config, tp, dtype)

    def forward(self, x: torch.Tensor, cos_sin: torch.Tensor, groups: Sequence[EqualRows]) -> torch.Tensor:
        normed = x if self.attention_norm is None else self.attention_norm(x)
        x = x + self.attention(normed, cos_sin, groups)
        y: torch.Tensor = x + self.mlp(self.mlp_norm(x))
        return y


class ModernBert(Module):
    """Token ids in, hidden states out. Weights are uninitialised until loaded."""

    def __init__(self, config: ModernBertConfig, max_length: int, tp: TPGroup, dtype: torch.dtype) -> None:
        dim = config.hidden_size

        def norm() -> LayerNorm:
            return LayerNorm(dim, config.norm_eps, bias=config.norm_bias, dtype=dtype, device=tp.device)

        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, dim, tp, dtype=dtype)
        self.embed_norm = norm()
        self.layers = [ModernBertBlock(config, i, tp, dtype) for i in range(len(config.layer_types))]
        self.norm = norm()
        self.ropes = {
            kind: RotaryEmbedding(config.ropes[kind], max_length, dtype=dtype, device=tp.device)
            for kind in sorted(set(config.layer_types))
        }

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, groups: Sequence[EqualRows]) -> torch.Tensor:
        """tokens, positions [T] -> [T, D]."""
        cos_sin = {kind: rope(positions) for kind, rope in self.ropes.items()}  # [T, R] each, for all layers
        x: torch.Tensor = self.embed_norm(self.embed_tokens(tokens))
        for layer in self.layers:
            x = layer(x, cos_sin[layer.kind], groups)
        hidden: torch.Tensor = self.norm(x)
        return hidden
