"""The DeepSeek network (DeepSeek-V2 and -V3, DeepSeek-AI 2024): latent attention, and mixtures of experts beside an
expert that every token goes to.

Axes: T new tokens of a ragged batch, D hidden size, E experts, K experts a token.
"""

from __future__ import annotations

import torch

from architectures.deepseek.model_config import DeepseekConfig, RoutingConfig
from max_ray.distributed import TPGroup, all_reduce
from max_ray.nn import (
    Experts,
    GatedMLP,
    LatentAttention,
    Linear,
    Module,
    Transformer,
    TransformerBlock,
    keep_best_groups,
)
from max_ray.nn.activation import gated


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
        scores = _sigmoid(logits) if config.sigmoid else logits.softmax(-1)  # [T, E]
        ranking = scores + self.bias if config.sigmoid else scores
        if config.num_groups > 1:
            ranking = keep_best_groups(ranking, config.num_groups, config.num_groups_kept, config.best_of_group)
        experts = ranking.topk(config.num_experts_per_token, dim=-1).indices
        weights = scores.gather(1, experts)
        if config.renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * config.scale, experts


def _sigmoid(x: torch.Tensor) -> torch.Tensor:
    """The sigmoid, on a CPU as a softmax of x and 0: torch's own takes another exponential for the numbers that fill no
    vector at the end, so that a token's scores would depend on how many tokens there are."""
    return x.sigmoid() if x.is_cuda else torch.stack((x, torch.zeros_like(x)), dim=-1).softmax(-1)[..., 0]


class DeepseekMoE(Module):
    """The chosen experts and the shared one: [T, D] -> [T, D], summed over the ranks once."""

    def __init__(self, config: DeepseekConfig, tp: TPGroup, dtype: torch.dtype, spread: bool) -> None:
        dim, num_experts = config.hidden_size, config.routing.num_experts
        self._tp = tp
        self.router = DeepseekRouter(config.routing, dim, tp)
        self.experts = Experts(
            num_experts,
            dim,
            config.expert_size,
            tp,
            spread=spread,
            reduce=False,
            gate=gated(config.activation),
            dtype=dtype,
        )
        self.shared = (
            GatedMLP(dim, config.shared_size, tp, reduce=False, gate=gated(config.activation), dtype=dtype)
            if config.shared_size
            else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.experts(x, *self.router(x))
        if self.shared is not None:
            y = y + self.shared(x)
        return all_reduce(y, self._tp)


class DeepseekBlock(TransformerBlock):
    """One layer: see TransformerBlock."""

    def __init__(self, config: DeepseekConfig, layer_index: int, tp: TPGroup, dtype: torch.dtype, spread: bool) -> None:
        dim = config.hidden_size
        attention = LatentAttention(config.attention, layer_index, tp, dtype)
        mlp: Module = (
            GatedMLP(dim, config.intermediate_size, tp, gate=gated(config.activation), dtype=dtype)
            if layer_index < config.num_dense_layers
            else DeepseekMoE(config, tp, dtype, spread)
        )
        super().__init__(config, attention, mlp, tp, dtype)


class Deepseek(Transformer):
    """Token ids in, logits out: see Transformer. spread: see Experts."""

    def __init__(self, config: DeepseekConfig, max_length: int, tp: TPGroup, dtype: torch.dtype, spread: bool) -> None:
        layers = [DeepseekBlock(config, i, tp, dtype, spread) for i in range(config.num_layers)]
        super().__init__(config, layers, max_length, tp, dtype)
