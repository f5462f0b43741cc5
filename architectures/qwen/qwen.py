"""The dense Qwen network (Qwen2 technical report 2024, Qwen3 technical report 2025): a Llama whose queries, keys and
values have a bias (Qwen2), or whose query and key heads are normalised before the rotation (Qwen3).
"""

from __future__ import annotations

import torch

from architectures.qwen.model_config import QwenConfig
from max_ray.distributed import TPGroup
from max_ray.nn import Attention, GatedMLP, RMSNorm, Transformer, TransformerBlock
from max_ray.nn.activation import gated


class QwenBlock(TransformerBlock):
    """One layer: see TransformerBlock."""

    def __init__(self, config: QwenConfig, layer_index: int, tp: TPGroup, dtype: torch.dtype) -> None:
        dim, eps = config.hidden_size, config.rms_norm_eps

        def head_norm() -> RMSNorm | None:
            return RMSNorm(config.head_dim, eps, dtype=dtype, device=tp.device) if config.qk_norm else None

        attention = Attention(
            dim,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            layer_index,
            tp,
            bias=config.qkv_bias,
            out_bias=config.out_bias,
            q_norm=head_norm(),
            k_norm=head_norm(),
            sliding_window=config.windows[layer_index],
            dtype=dtype,
        )
        mlp = GatedMLP(dim, config.intermediate_size, tp, gate=gated(config.activation), dtype=dtype)
        super().__init__(config, attention, mlp, tp, dtype)


class Qwen(Transformer):
    """Token ids in, logits out: see Transformer."""

    def __init__(self, config: QwenConfig, max_length: int, tp: TPGroup, dtype: torch.dtype) -> None:
        layers = [QwenBlock(config, i, tp, dtype) for i in range(config.num_layers)]
        super().__init__(config, layers, max_length, tp, dtype)
