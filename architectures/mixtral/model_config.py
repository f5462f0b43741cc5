"""MixtralConfig: the numbers of one Mixtral checkpoint, read once from config.json and frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from max_ray.huggingface import head_dim, required
from max_ray.nn.activation import activation_name
from max_ray.nn.rope import RopeConfig

_DEFAULT_THETA = 1_000_000.0


@dataclass(frozen=True)
class MixtralConfig:
    """Shapes of the whole model, before it is cut over ranks. intermediate_size: the width of one expert.

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
    sliding_window: int | None
    num_experts: int
    num_experts_per_token: int

    @property
    def widths(self) -> dict[str, int]:
        """Sizes that the ranks must divide, by their names in config.json."""
        return {"intermediate_size": self.intermediate_size}

    @classmethod
    def from_huggingface(cls, config: Any) -> MixtralConfig:
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
            rms_norm_eps=config.get("rms_norm_eps") or 1e-5,
            activation=activation_name(config),
            rope=RopeConfig.of_whole_heads(config, size, _DEFAULT_THETA),
            tie_word_embeddings=bool(config.get("tie_word_embeddings")),
            sliding_window=config.get("sliding_window"),
            num_experts=required(config, "num_local_experts"),
            num_experts_per_token=required(config, "num_experts_per_tok"),
        )
