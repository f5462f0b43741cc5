"""Qwen3MoeConfig: the numbers of one Qwen3 mixture-of-experts checkpoint, read once from config.json and frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from max_ray.huggingface import head_dim, required
from max_ray.nn.activation import activation_name
from max_ray.nn.rope import RopeConfig


@dataclass(frozen=True)
class Qwen3MoeConfig:
    """Shapes of the whole model, before it is cut over ranks.

    expert_size: width of one expert; intermediate_size: of a dense feed-forward layer, where there are any
    (`dense_layers`, by number). renormalize: whether the weights of a token's experts are made to sum to 1.
    sliding_window: of all layers, in tokens; None where they see everything.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    activation: str
    rope: RopeConfig
    tie_word_embeddings: bool
    attention_bias: bool
    sliding_window: int | None
    num_experts: int
    num_experts_per_token: int
    expert_size: int
    renormalize: bool
    dense_layers: frozenset[int]

    @property
    def widths(self) -> dict[str, int]:
        """Sizes that the ranks must divide, by their names in config.json."""
        sparse = {"moe_intermediate_size": self.expert_size}
        return {**sparse, "intermediate_size": self.intermediate_size} if self.dense_layers else sparse

    @classmethod
    def from_huggingface(cls, config: Any) -> Qwen3MoeConfig:
        """From config.json as an attribute-style mapping. Raises ConfigError for a value that this family lacks."""
        num_heads = required(config, "num_attention_heads")
        size = head_dim(config)
        return cls(
            vocab_size=required(config, "vocab_size"),
            hidden_size=required(config, "hidden_size"),
            intermediate_size=required(config, "intermediate_size"),
            num_layers=required(config, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=config.get("num_key_value_heads") or num_heads,
            head_dim=size,
            rms_norm_eps=config.get("rms_norm_eps") or 1e-6,
            activation=activation_name(config),
            rope=RopeConfig.of_whole_heads(config, size),
            tie_word_embeddings=bool(config.get("tie_word_embeddings")),
            attention_bias=bool(config.get("attention_bias")),
            sliding_window=config.get("sliding_window", 4096) if config.get("use_sliding_window") else None,
            num_experts=config.get("num_experts") or required(config, "num_local_experts"),
            num_experts_per_token=required(config, "num_experts_per_tok"),
            expert_size=required(config, "moe_intermediate_size"),
            renormalize=bool(config.get("norm_topk_prob")),
            dense_layers=_dense_layers(config),
        )


def _dense_layers(config: Any) -> frozenset[int]:
    """`mlp_only_layers`, and all but every `decoder_sparse_step`-th layer."""
    step = config.get("decoder_sparse_step") or 1
    between = {layer for layer in range(required(config, "num_hidden_layers")) if (layer + 1) % step}
    return frozenset(between | set(config.get("mlp_only_layers") or ()))
