"""The Nomic BERT network (Nussbaum et al. 2024): post-norm layers as BERT's, with a rope in place of learned positions,
a gated feed-forward part, and no biases but in the norms."""

from __future__ import annotations

import torch

from architectures.nomic_bert.model_config import NomicBertConfig
from max_ray.distributed import TPGroup
from max_ray.nn import GatedMLP
from max_ray.nn.activation import gated
from max_ray.nn.rope_encoder import RopeEncoder


class NomicBert(RopeEncoder):
    """Token ids in, hidden states out: see RopeEncoder."""

    def __init__(self, config: NomicBertConfig, max_length: int, tp: TPGroup, dtype: torch.dtype) -> None:
        def mlp() -> GatedMLP:
            dim = config.hidden_size
            return GatedMLP(dim, config.intermediate_size, tp, gate=gated(config.activation), dtype=dtype)

        super().__init__(config, max_length, tp, dtype, mlp=mlp, attention_bias=False)
