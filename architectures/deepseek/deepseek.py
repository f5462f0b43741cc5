"""The DeepSeek network (DeepSeek-V2 and -V3, DeepSeek-AI 2024): latent attention, and mixtures of experts beside an
expert that every token goes to.

Axes: T new tokens of a ragged batch, N tokens whose logits are wanted, D hidden size, R rotated width, V vocabulary,
E experts, K experts a token.
"""

from __future__ import annotations

import torch

from architectures.deepseek.model_config import DeepseekConfig, RoutingConfig
from max_ray.distributed import TPGroup, all_reduce
from max_ray.interfaces import KVCacheInputs
from max_ray.nn import (
    Experts,
    GatedMLP,
    LatentAttention,
    Linear,
    Module,
    ParallelLMHead,
    RMSNorm,
    RotaryEmbedding,
    VocabParallelEmbedding,
    keep_best_groups,
)


class DeepseekRouter(Module):
    """Tokens [T, D] -> (weights float32 [T, K], experts [T, K]). Scores are computed in float32."""

    bias: torch.Tensor

    def __init__(self, config: RoutingConfig, dim: int, tp: TPGroup) -> None:
        self._config = config
        self.scores = Linear(dim, config.num_experts, bias=False, dtype=torch.float32, device=tp.device)
        if config.sigmoid:
            self.add_parameter("bias", torch.zeros(config.num_experts, dtype=torch.float32, device=tp.device))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        config = self._config
        logits = self.scores(x.float())
        scores = logits.sigmoid() if config.sigmoid else logits.softmax(-1)  # [T, E]
        ranking = scores + self.bias if config.sigmoid else scores
        if config.num_groups > 1:
            ranking = keep_best_groups(ranking, config.num_groups, config.num_groups_kept, config.best_of_group)
        experts = ranking.topk(config.num_experts_per_token, dim=-1).indices
        weights = scores.gather(1, experts)
        if config.renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * config.scale, experts


class DeepseekMoE(Module):
    """The chosen experts and the shared one: [T, D] -> [T, D], summed over the ranks once."""

    def __init__(self, config: DeepseekConfig, tp: TPGroup, dtype: torch.dtype, spread: bool) -> None:
        dim, num_experts = config.hidden_size, config.routing.num_experts
        self._tp = tp
        self.router = DeepseekRouter(config.routing, dim, tp)
        self.experts = Experts(num_experts, dim, config.expert_size, tp, spread=spread, reduce=False, dtype=dtype)
        self.shared = GatedMLP(dim, config.shared_size, tp, reduce=False, dtype=dtype) if config.shared_size else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.experts(x, *self.router(x))
        if self.shared is not None:
            y = y + self.shared(x)
        return all_reduce(y, self._tp)


class DeepseekBlock(Module):
    """One transformer layer, pre-norm. The residual sum x + residual is left to the next norm, which fuses it."""

    def __init__(self, config: DeepseekConfig, layer_index: int, tp: TPGroup, dtype: torch.dtype, spread: bool) -> None:
        dim, eps = config.hidden_size, config.rms_norm_eps
        self.attention_norm = RMSNorm(dim, eps, dtype=dtype, device=tp.device)
        self.attention = LatentAttention(config.attention, layer_index, tp, dtype)
        self.mlp_norm = RMSNorm(dim, eps, dtype=dtype, device=tp.device)
        self.mlp: Module = (
            GatedMLP(dim, config.intermediate_size, tp, dtype=dtype)
            if layer_index < config.num_dense_layers
            else DeepseekMoE(config, tp, dtype, spread)
        )

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


class Deepseek(Module):
    """Token ids in, logits out. Weights are uninitialised until loaded. spread: see Experts."""

    def __init__(self, config: DeepseekConfig, max_length: int, tp: TPGroup, dtype: torch.dtype, spread: bool) -> None:
        dim = config.hidden_size
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, dim, tp, dtype=dtype)
        self.layers = [DeepseekBlock(config, i, tp, dtype, spread) for i in range(config.num_layers)]
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
    ) -> torch.Tensor:
        """tokens, positions [T], logit_indices [N] -> logits [N, V]; the new latents go into `kv`."""
        cos_sin = self.rotary(positions)  # [T, R], for all layers
        x = self.embed_tokens(tokens)  # [T, D]
        residual = None
        for layer in self.layers:
            x, residual = layer(x, residual, cos_sin, kv, qo_indptr)
        x = x[logit_indices]  # [N, D]
        if residual is not None:
            x = x + residual[logit_indices]
        logits: torch.Tensor = self.lm_head(self.norm(x))
        return logits
