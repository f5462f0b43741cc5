"""Granite 3 is a Llama with four multipliers: on the embedding, on q k^T, on what each half of a layer adds, and under
the logits. Its weights have a Llama's names and shapes, so that the Llama family's table and numbers serve here.

Axes: T new tokens of a ragged batch, N tokens whose logits are wanted, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from architectures.llama3.model_config import Llama3Config
from architectures.llama3.weight_adapters import safetensors_name_map
from max_ray.distributed import TPGroup
from max_ray.modeling import CausalLMModel
from max_ray.nn import (
    Attention,
    ForwardBatch,
    GatedMLP,
    Module,
    ParallelLMHead,
    RMSNorm,
    RotaryEmbedding,
    VocabParallelEmbedding,
)


@dataclass(frozen=True)
class GraniteConfig(Llama3Config):
    """A Llama's numbers and the multipliers."""

    embedding_multiplier: float = 1.0
    attention_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0

    @classmethod
    def from_huggingface(cls, config: Any) -> GraniteConfig:
        names = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
        multipliers: dict[str, Any] = {name: config.get(name, 1.0) for name in names}
        return cls(**vars(Llama3Config.from_huggingface(config)), **multipliers)


class GraniteBlock(Module):
    """One transformer layer, pre-norm: x + m * attention(norm(x)), then x + m * mlp(norm(x))."""

    def __init__(self, config: GraniteConfig, layer_index: int, tp: TPGroup, dtype: torch.dtype) -> None:
        dim = config.hidden_size
        self._multiplier = config.residual_multiplier
        self.attention_norm = RMSNorm(dim, config.rms_norm_eps, dtype=dtype, device=tp.device)
        self.attention = Attention(
            dim,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            layer_index,
            tp,
            bias=config.attention_bias,
            scale=config.attention_multiplier,
            dtype=dtype,
        )
        self.mlp_norm = RMSNorm(dim, config.rms_norm_eps, dtype=dtype, device=tp.device)
        self.mlp = GatedMLP(dim, config.intermediate_size, tp, bias=config.mlp_bias, dtype=dtype)

    def forward(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), batch) * self._multiplier
        x = x + self.mlp(self.mlp_norm(x)) * self._multiplier
        return x


class Granite(Module):
    """Token ids in, logits out."""

    def __init__(self, config: GraniteConfig, max_length: int, tp: TPGroup, dtype: torch.dtype) -> None:
        dim = config.hidden_size
        self._config = config
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, dim, tp, dtype=dtype)
        self.layers = [GraniteBlock(config, i, tp, dtype) for i in range(config.num_layers)]
        self.norm = RMSNorm(dim, config.rms_norm_eps, dtype=dtype, device=tp.device)
        tied_to = self.embed_tokens if config.tie_word_embeddings else None
        self.lm_head = ParallelLMHead(config.vocab_size, dim, tp, tied_to=tied_to, dtype=dtype)
        self.rotary = RotaryEmbedding(config.rope, max_length, dtype=dtype, device=tp.device)

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Logits [N, V]; the new keys and values go into `batch.kv`."""
        batch.cos_sin = self.rotary(batch.positions, batch.rope_lengths)
        x = self.embed_tokens(batch.tokens) * self._config.embedding_multiplier  # [T, D]
        for layer in self.layers:
            x = layer(x, batch)
        logits: torch.Tensor = self.lm_head(self.norm(x[batch.logit_indices]))
        return logits / self._config.logits_scaling


class GraniteModel(CausalLMModel):
    """One rank of a Granite."""

    weight_names = staticmethod(safetensors_name_map)

    @classmethod
    def config_of(cls, huggingface_config: Any) -> GraniteConfig:
        return GraniteConfig.from_huggingface(huggingface_config)

    def build_network(self, max_length: int, dtype: torch.dtype) -> Granite:
        return Granite(self.config_of(self.huggingface_config), max_length, self.tp, dtype)
