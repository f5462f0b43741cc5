"""The XLM-RoBERTa network (Conneau et al. 2019): a BERT whose positions begin behind the padding token's number; and
the one that rotates queries and keys in place of learned positions (Sturua et al. 2024, jina-embeddings-v3)."""

from __future__ import annotations

import torch

from architectures.xlm_roberta.model_config import RotaryConfig
from max_ray.distributed import TPGroup
from max_ray.nn.encoder import FeedForward, PostNormEncoder
from max_ray.nn.rope_encoder import RopeEncoder


class XLMRoberta(PostNormEncoder):
    """Token ids in, hidden states out: see PostNormEncoder."""


class RotaryXLMRoberta(RopeEncoder):
    """Token ids in, hidden states out: see RopeEncoder."""

    def __init__(self, config: RotaryConfig, max_length: int, tp: TPGroup, dtype: torch.dtype) -> None:
        def mlp() -> FeedForward:
            return FeedForward(config.hidden_size, config.intermediate_size, config.activation, tp, dtype=dtype)

        super().__init__(config, max_length, tp, dtype, mlp=mlp, attention_bias=True)
