"""The XLM-RoBERTa network (Conneau et al. 2019): a BERT whose positions begin behind the padding token's number.

Axes: T tokens of a ragged batch, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from architectures.xlm_roberta.model_config import XLMRobertaConfig
from max_ray.distributed import TPGroup
from max_ray.nn import Module
from max_ray.nn.encoder import EncoderEmbedding, EqualRows, PostNormBlock


class XLMRoberta(Module):
    """Token ids in, hidden states out. Weights are uninitialised until loaded."""

    def __init__(self, config: XLMRobertaConfig, tp: TPGroup, dtype: torch.dtype) -> None:
        dim, eps = config.hidden_size, config.layer_norm_eps
        self.embed_tokens = EncoderEmbedding(
            config.vocab_size, config.num_positions, config.num_token_types, dim, eps, tp, dtype=dtype
        )
        self.layers = [
            PostNormBlock(dim, config.num_heads, config.intermediate_size, config.activation, eps, tp, dtype=dtype)
            for _ in range(config.num_layers)
        ]

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, groups: Sequence[EqualRows]) -> torch.Tensor:
        """tokens, positions [T] -> [T, D]."""
        x: torch.Tensor = self.embed_tokens(tokens, positions)
        for layer in self.layers:
            x = layer(x, groups)
        return x
