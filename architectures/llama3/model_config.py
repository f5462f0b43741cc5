"""Llama3Config: the numbers of one Llama checkpoint, read once from config.json and frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from max_ray.errors import ConfigError
from max_ray.huggingface import head_dim, required
from max_ray.nn.activation import activation_name
from max_ray.nn.rope import RopeConfig


@dataclass(frozen=True)
class Llama3Config:
    """Shapes of the whole model, before it is cut over ranks."""

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
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    @property
    def widths(self) -> dict[str, int]:
        """Sizes that the ranks must divide, by their names in config.json."""
        return {"intermediate_size": self.intermediate_size}

    @classmethod
    def from_huggingface(cls, config: Any) -> Llama3Config:
        """From config.json as an attribute-style mapping. Raises ConfigError for a value that this family lacks."""
        if config.get("model_type") == "internlm3":
            config = _internlm3(config)
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
            mlp_bias=bool(config.get("mlp_bias")),
        )


def _internlm3(config: Any) -> dict[str, Any]:
    """InternLM3 is a Llama whose config.json calls the biases otherwise and has other defaults."""
    values = {"head_dim": 128, "rms_norm_eps": 1e-5, "num_key_value_heads": 2, **config}
    biases = {name: bool(config.get(name)) for name in ("qkv_bias", "bias")}
    if len(set(biases.values())) > 1:
        raise ConfigError(f"config.json: qkv_bias={biases['qkv_bias']} and bias={biases['bias']} differ.")
    return {**values, "attention_bias": biases["bias"], "mlp_bias": biases["bias"]}
