"""Post-norm layers of bidirectional encoders that rotate queries and keys in place of learned positions.

Axes: T tokens of a ragged batch, D hidden size, H heads, d head_dim, R rotated width. One device: checkpoints of these
families store query, key and value as one matrix, which is not cut over ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from max_ray import kernels
from max_ray.distributed import TPGroup
from max_ray.nn.embedding import VocabParallelEmbedding
from max_ray.nn.encoder import EqualRows, LayerNorm, Table, bidirectional_attention
from max_ray.nn.linear import ColumnParallelLinear
from max_ray.nn.module import Module
from max_ray.nn.rope import RopeConfig, RotaryEmbedding


class RopeEncoderConfig(Protocol):
    """The numbers of such an encoder. num_token_types: rows of the table of types; 0 where the family has none."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_token_types(self) -> int: ...
    @property
    def layer_norm_eps(self) -> float: ...
    @property
    def rope(self) -> RopeConfig: ...


class RopeEncoderAttention(Module):
    """Self-attention of one layer: [T, D] -> [T, D]. bias: of both products."""

    def __init__(self, dim: int, num_heads: int, tp: TPGroup, *, bias: bool, dtype: torch.dtype) -> None:
        self.qkv = ColumnParallelLinear(dim, 3 * dim, tp, bias=bias, dtype=dtype)
        self.out = ColumnParallelLinear(dim, dim, tp, bias=bias, dtype=dtype)
        self._head_dim = dim // num_heads

    def forward(self, x: torch.Tensor, cos_sin: torch.Tensor, groups: Sequence[EqualRows]) -> torch.Tensor:
        """cos_sin [T, R]: the rotation of each token."""
        q, k, v = (part.unflatten(-1, (-1, self._head_dim)) for part in self.qkv(x).chunk(3, dim=-1))  # [T, H, d]
        q, k = kernels.apply_rope(q, k, cos_sin, None)
        y: torch.Tensor = self.out(bidirectional_attention(q, k, v, groups).flatten(-2))
        return y


class RopeEncoderBlock(Module):
    """One layer: norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(
        self, config: RopeEncoderConfig, mlp: Module, tp: TPGroup, *, attention_bias: bool, dtype: torch.dtype
    ) -> None:
        dim, eps = config.hidden_size, config.layer_norm_eps
        self.attention = RopeEncoderAttention(dim, config.num_heads, tp, bias=attention_bias, dtype=dtype)
        self.attention_norm = LayerNorm(dim, eps, dtype=dtype, device=tp.device)
        self.mlp = mlp
        self.mlp_norm = LayerNorm(dim, eps, dtype=dtype, device=tp.device)

    def forward(self, x: torch.Tensor, cos_sin: torch.Tensor, groups: Sequence[EqualRows]) -> torch.Tensor:
        x = self.attention_norm(x + self.attention(x, cos_sin, groups))
        y: torch.Tensor = self.mlp_norm(x + self.mlp(x))
        return y


class RopeEncoder(Module):
    """Token ids in, hidden states out. Weights are uninitialised until loaded.

    Args:
        config: The numbers.
        max_length: Tokens of the longest text.
        mlp: Makes the feed-forward part of a layer, [T, D] -> [T, D].
        attention_bias: Whether the products of the attention have a bias.
    """

    def __init__(
        self,
        config: RopeEncoderConfig,
        max_length: int,
        tp: TPGroup,
        dtype: torch.dtype,
        *,
        mlp: Callable[[], Module],
        attention_bias: bool,
    ) -> None:
        dim, num_types = config.hidden_size, config.num_token_types
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, dim, tp, dtype=dtype)
        self.types = Table(num_types, dim, dtype=dtype, device=tp.device) if num_types else None
        self.embed_norm = LayerNorm(dim, config.layer_norm_eps, dtype=dtype, device=tp.device)
        self.layers = [
            RopeEncoderBlock(config, mlp(), tp, attention_bias=attention_bias, dtype=dtype)
            for _ in range(config.num_layers)
        ]
        self.rotary = RotaryEmbedding(config.rope, max_length, dtype=dtype, device=tp.device)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, groups: Sequence[EqualRows]) -> torch.Tensor:
        """tokens, positions [T] -> [T, D]. Every token has the type 0."""
        cos_sin = self.rotary(positions)  # [T, R], for all layers
        x: torch.Tensor = self.embed_tokens(tokens)
        if self.types is not None:
            x = x + self.types.weight[0]
        x = self.embed_norm(x)
        for layer in self.layers:
            x = layer(x, cos_sin, groups)
        return x
