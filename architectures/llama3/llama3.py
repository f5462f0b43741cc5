"""The Llama network (Touvron et al. 2023; Llama Team 2024), written as for one device: the layers know their ranks."""

from __future__ import annotations

import torch

from architectures.llama3.model_config import Llama3Config
from max_ray.distributed import TPGroup
from max_ray.nn import Attention, GatedMLP, Transformer, TransformerBlock
from max_ray.nn.activation import gated


class Llama3Block(TransformerBlock):
    """One layer: see TransformerBlock."""

    def __init__(self, config: Llama3Config, layer_index: int, tp: TPGroup, dtype: torch.dtype) -> None:
        dim = config.hidden_size
        attention = Attention(
            dim,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            layer_index,
            tp,
            bias=config.attention_bias,
            dtype=dtype,
        )
        mlp = GatedMLP(
            dim, config.intermediate_size, tp, bias=config.mlp_bias, gate=gated(config.activation), dtype=dtype
        )
        super().__init__(config, attention, mlp, tp, dtype)


class Llama3(Transformer):
    """Token ids in, logits out: see Transformer."""

    def __init__(self, config: Llama3Config, max_length: int, tp: TPGroup, dtype: torch.dtype) -> None:
        layers = [Llama3Block(config, i, tp, dtype) for i in range(config.num_layers)]
        super().__init__(config, layers, max_length, tp, dtype)
