"""The Mixtral network (Jiang et al. 2024): a Mistral whose feed-forward layers are mixtures of experts.

Axes: T new tokens of a ragged batch, N tokens whose logits are wanted, D hidden size, R rotated width, V vocabulary.
"""

from __future__ import annotations

import torch

from architectures.mixtral.model_config import MixtralConfig
from max_ray.distributed import TPGroup
from max_ray.interfaces import KVCacheInputs
from max_ray.nn import (
    Attention,
    Experts,
    Linear,
    Module,
    ParallelLMHead,
    RMSNorm,
    RotaryEmbedding,
    VocabParallelEmbedding,
    softmax_top_k,
)


class MixtralMoE(Module):
    """Each token goes to the experts that its router ranks highest: [T, D] -> [T, D]."""

    def __init__(self, config: MixtralConfig, tp: TPGroup, dtype: torch.dtype, spread: bool) -> None:
        dim, num_experts = config.hidden_size, config.num_experts
        self._top_k = config.num_experts_per_token
        self.router = Linear(dim, num_experts, bias=False, dtype=dtype, device=tp.device)
        self.experts = Experts(num_experts, dim, config.intermediate_size, tp, spread=spread, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.experts(x, *softmax_top_k(self.router(x), self._top_k, renormalize=True))
        return y


class MixtralBlock(Module):
    """One transformer layer, pre-norm. The residual sum x + residual is left to the next norm, which fuses it."""

    def __init__(self, config: MixtralConfig, layer_index: int, tp: TPGroup, dtype: torch.dtype, spread: bool) -> None:
        dim, eps = config.hidden_size, config.rms_norm_eps
        self.attention_norm = RMSNorm(dim, eps, dtype=dtype, device=tp.device)
        self.attention = Attention(
            dim,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            layer_index,
            tp,
            sliding_window=config.sliding_window,
            dtype=dtype,
        )
        self.moe_norm = RMSNorm(dim, eps, dtype=dtype, device=tp.device)
        self.moe = MixtralMoE(config, tp, dtype, spread)

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
        x, residual = self.moe_norm.add_and_norm(x, residual)
        return self.moe(x), residual


class Mixtral(Module):
    """Token ids in, logits out. Weights are uninitialised until loaded. spread: see Experts."""

    def __init__(self, config: MixtralConfig, max_length: int, tp: TPGroup, dtype: torch.dtype, spread: bool) -> None:
        dim = config.hidden_size
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, dim, tp, dtype=dtype)
        self.layers = [MixtralBlock(config, i, tp, dtype, spread) for i in range(config.num_layers)]
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
