"""The dense Qwen network (Qwen2 technical report 2024, Qwen3 technical report 2025): a Llama whose queries, keys and
values have a bias (Qwen2), or whose query and key heads are normalised before the rotation (Qwen3).

Axes: T new tokens of a ragged batch, N tokens whose logits are wanted, D hidden size, R rotated width, V vocabulary.
"""

from __future__ import annotations

import torch

from architectures.qwen.model_config import QwenConfig
from max_ray.distributed import TPGroup
from max_ray.interfaces import KVCacheInputs
from max_ray.nn import (
    Attention,
    GatedMLP,
    Module,
    ParallelLMHead,
    RMSNorm,
    RotaryEmbedding,
    VocabParallelEmbedding,
)


class QwenBlock(Module):
    """One transformer layer, pre-norm. The residual sum x + residual is left to the next norm, which fuses it."""

    def __init__(self, config: QwenConfig, layer_index: int, tp: TPGroup, dtype: torch.dtype) -> None:
        dim, eps = config.hidden_size, config.rms_norm_eps

        def head_norm() -> RMSNorm | None:
            return RMSNorm(config.head_dim, eps, dtype=dtype, device=tp.device) if config.qk_norm else None

        self.attention_norm = RMSNorm(dim, eps, dtype=dtype, device=tp.device)
        self.attention = Attention(
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
        self.mlp_norm = RMSNorm(dim, eps, dtype=dtype, device=tp.device)
        self.mlp = GatedMLP(dim, config.intermediate_size, tp, dtype=dtype)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        cos_sin: torch.Tensor,
        kv: KVCacheInputs,
        qo_indptr: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x, residual [T, D] -> the same; residual is None before the first layer."""
        if residual is None:
            residual = x
            x = self.attention_norm(x)
        else:
            x, residual = self.attention_norm.add_and_norm(x, residual)
        x = self.attention(x, cos_sin, kv, qo_indptr)
        x, residual = self.mlp_norm.add_and_norm(x, residual)
        return self.mlp(x), residual


class Qwen(Module):
    """Token ids in, logits out. Weights are uninitialised until loaded."""

    def __init__(self, config: QwenConfig, max_length: int, tp: TPGroup, dtype: torch.dtype) -> None:
        dim = config.hidden_size
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, dim, tp, dtype=dtype)
        self.layers = [QwenBlock(config, i, tp, dtype) for i in range(config.num_layers)]
        self.norm = RMSNorm(dim, config.rms_norm_eps, dtype=dtype, device=tp.device)
        tied_to = self.embed_tokens if config.tie_word_embeddings else None
        self.lm_head = ParallelLMHead(config.vocab_size, dim, tp, tied_to=tied_to, dtype=dtype)
        self.rotary = RotaryEmbedding(config.rope, max_length, dtype=dtype, device=tp.device)

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        qo_indptr: torch.Tensor,
        logit_indices: torch.Tensor,
        kv: KVCacheInputs,
        rope_lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """tokens, positions [T], logit_indices [N] -> logits [N, V]; the new keys and values go into `kv`.

        rope_lengths: [T], where the rope depends on the sequence length (see RotaryEmbedding).
        """
        cos_sin = self.rotary(positions, rope_lengths)  # [T, R], for all layers
        x = self.embed_tokens(tokens)  # [T, D]
        residual = None
        for layer in self.layers:
            x, residual = layer(x, residual, cos_sin, kv, qo_indptr)
        x = x[logit_indices]  # [N, D]
        if residual is not None:
            x = x + residual[logit_indices]
        logits: torch.Tensor = self.lm_head(self.norm(x))
        return logits
