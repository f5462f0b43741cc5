"""The Mistral network (Jiang et al. 2023): a Llama whose layers, or some of them, see a sliding window."""

from __future__ import annotations

import torch

from architectures.mistral.model_config import MistralConfig
from max_ray.distributed import TPGroup
from max_ray.nn import Attention, GatedMLP, Transformer, TransformerBlock
from max_ray.nn.activation import gated


class MistralBlock(TransformerBlock):
    """One layer: see TransformerBlock."""

    def __init__(self, config: MistralConfig, layer_index: int, tp: TPGroup, dtype: torch.dtype) -> None:
        dim = config.hidden_size
        attention = Attention(
            dim,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            layer_index,
            tp,
            sliding_window=config.windows[layer_index],
            dtype=dtype,
        )
        mlp = GatedMLP(dim, config.intermediate_size, tp, gate=gated(config.activation), dtype=dtype)
        super().__init__(config, attention, mlp, tp, dtype)


class Mistral(Transformer):
    """Token ids in, logits out: see Transformer."""

    def __init__(self, config: MistralConfig, max_length: int, tp: TPGroup, dtype: torch.dtype) -> None:
        layers = [MistralBlock(config, i, tp, dtype) for i in range(config.num_layers)]
        super().__init__(config, layers, max_length, tp, dtype)
