"""The gpt-oss network (OpenAI 2025): attention with sinks, every other layer in a sliding window, and mixtures of
experts with a clamped activation and biases.

Axes: T new tokens of a ragged batch, N tokens whose logits are wanted, D hidden size, R rotated width, V vocabulary,
E experts, K experts a token, F width of one expert, M = T * K choices.
"""

from __future__ import annotations

import torch

from architectures.gpt_oss.model_config import GptOssConfig
from max_ray.distributed import TPGroup, all_reduce
from max_ray.interfaces import KVCacheInputs
from max_ray.nn import (
    Attention,
    Linear,
    Module,
    ParallelLMHead,
    RMSNorm,
    RotaryEmbedding,
    VocabParallelEmbedding,
    grouped_matmul,
    run_by_expert,
    softmax_top_k,
)
from max_ray.nn.linear import shard_range
from max_ray.weights.parameter import PartSpec


class GptOssExperts(Module):
    """All experts of a layer; weights are [E, in, out] as in a checkpoint, gate and up columns alternating."""

    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor
    down: torch.Tensor
    down_bias: torch.Tensor

    def __init__(self, config: GptOssConfig, tp: TPGroup, dtype: torch.dtype) -> None:
        self._config = config
        self._tp = tp
        experts, dim, width = config.num_experts, config.hidden_size, config.intermediate_size
        cut = shard_range(width, tp)
        start, stop = 2 * cut.start, 2 * cut.stop

        def add(name: str, shape: tuple[int, ...], spec: PartSpec) -> None:
            self.add_parameter(name, torch.empty(shape, dtype=dtype, device=tp.device), {"": spec})

        add("gate_up", (experts, dim, stop - start), PartSpec((experts, dim, 2 * width), 2, start, stop, 0))
        add("gate_up_bias", (experts, stop - start), PartSpec((experts, 2 * width), 1, start, stop, 0))
        add("down", (experts, len(cut), dim), PartSpec((experts, width, dim), 1, cut.start, cut.stop, 0))
        add("down_bias", (experts, dim), PartSpec.whole((experts, dim)))

    def forward(self, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """x [T, D], weights and experts [T, K] -> [T, D], summed over the ranks."""
        return all_reduce(run_by_expert(x, weights, experts, self._config.num_experts, self._run), self._tp)

    def _run(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """x [M, D] sorted by expert -> [M, D]: this rank's summand; the bias after the sum is rank 0's."""
        ends = counts.cumsum(0).to(torch.int32)
        expert_of_row = torch.searchsorted(ends, torch.arange(len(x), dtype=torch.int32, device=x.device), right=True)
        gate_up = grouped_matmul(x, self.gate_up, ends) + self.gate_up_bias[expert_of_row]
        y = grouped_matmul(self._gated(gate_up), self.down, ends)
        return y + self.down_bias[expert_of_row] if self._tp.rank == 0 else y

    def _gated(self, gate_up: torch.Tensor) -> torch.Tensor:
        """(up + 1) * gate * sigmoid(alpha * gate), of numbers clamped to the limit."""
        limit = self._config.gate_limit
        gate, up = gate_up[..., ::2].clamp(max=limit), gate_up[..., 1::2].clamp(-limit, limit)
        return (up + 1) * gate * torch.sigmoid(gate * self._config.gate_alpha)


class GptOssMoE(Module):
    """Each token goes to the experts that its router ranks highest: [T, D] -> [T, D]."""

    def __init__(self, config: GptOssConfig, tp: TPGroup, dtype: torch.dtype) -> None:
        self._top_k = config.num_experts_per_token
        self.router = Linear(config.hidden_size, config.num_experts, dtype=dtype, device=tp.device)
        self.experts = GptOssExperts(config, tp, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.experts(x, *softmax_top_k(self.router(x), self._top_k, renormalize=True))
        return y


class GptOssBlock(Module):
    """One transformer layer, pre-norm. The residual sum x + residual is left to the next norm, which fuses it."""

    def __init__(self, config: GptOssConfig, layer_index: int, tp: TPGroup, dtype: torch.dtype) -> None:
        dim, eps = config.hidden_size, config.rms_norm_eps
        self.attention_norm = RMSNorm(dim, eps, dtype=dtype, device=tp.device)
        self.attention = Attention(
            dim,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            layer_index,
            tp,
            bias=config.attention_bias,
            sinks=True,
            sliding_window=config.windows[layer_index],
            dtype=dtype,
        )
        self.moe_norm = RMSNorm(dim, eps, dtype=dtype, device=tp.device)
        self.moe = GptOssMoE(config, tp, dtype)

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


class GptOss(Module):
    """Token ids in, logits out. Weights are uninitialised until loaded."""

    def __init__(self, config: GptOssConfig, max_length: int, tp: TPGroup, dtype: torch.dtype) -> None:
        dim = config.hidden_size
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, dim, tp, dtype=dtype)
        self.layers = [GptOssBlock(config, i, tp, dtype) for i in range(config.num_layers)]
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
