"""ModernBertConfig: the numbers of one ModernBERT checkpoint, read once from config.json and frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from max_ray.errors import ConfigError
from max_ray.huggingface import required
from max_ray.nn.activation import activation
from max_ray.nn.encoder import hidden_and_heads
from max_ray.nn.layer_types import FULL, SLIDING, layer_types
from max_ray.nn.rope import RopeConfig

_THETAS = {FULL: ("global_rope_theta", 160_000.0), SLIDING: ("local_rope_theta", 10_000.0)}


@dataclass(frozen=True)
class ModernBertConfig:
    """Shapes of the whole model. reach: how far a token of a SLIDING layer sees on either side. ropes: by kind of layer
    (FULL, SLIDING)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    max_length: int
    norm_eps: float
    norm_bias: bool
    attention_bias: bool
    mlp_bias: bool
    activation: str
    layer_types: tuple[str, ...]
    reach: int
    ropes: dict[str, RopeConfig]

    @property
    def widths(self) -> dict[str, int]:
        """Sizes that the ranks must divide, by their names in config.json."""
        return {"intermediate_size": self.intermediate_size}

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @classmethod
    def from_huggingface(cls, config: Any) -> ModernBertConfig:
        """From config.json as an attribute-style mapping. Raises ConfigError for a value that this family lacks."""
        name = config.get("hidden_activation") or "gelu"
        activation(name)
        hidden_size, num_heads = hidden_and_heads(config)
        num_layers = required(config, "num_hidden_layers")
        every = config.get("global_attn_every_n_layers") or 3
        default = [SLIDING if layer % every else FULL for layer in range(num_layers)]
        return cls(
            vocab_size=required(config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=required(config, "intermediate_size"),
            num_heads=num_heads,
            max_length=config.get("max_position_embeddings") or 8192,
            norm_eps=config.get("norm_eps", 1e-5),
            norm_bias=bool(config.get("norm_bias")),
            attention_bias=bool(config.get("attention_bias")),
            mlp_bias=bool(config.get("mlp_bias")),
            activation=name,
            layer_types=layer_types(config, num_layers, default),
            reach=config.get("sliding_window") or config.get("local_attention", 128) // 2,
            ropes={kind: _rope(config, kind, hidden_size // num_heads) for kind in (FULL, SLIDING)},
        )


def _rope(config: Any, kind: str, head_dim: int) -> RopeConfig:
    """The rope of one kind of layer: `rope_parameters` by kind (transformers 5), or a theta for each (before)."""
    parameters = dict((config.get("rope_parameters") or {}).get(kind) or {})
    key, default = _THETAS[kind]
    theta = parameters.pop("rope_theta", None) or config.get(key) or default
    rope_type = parameters.pop("rope_type", None) or "default"
    if rope_type != "default" or config.get("rope_scaling"):
        raise ConfigError(f"config.json: the rope of {kind} layers is scaled, but this family has plain ones only.")
    return RopeConfig(head_dim, float(theta), config.get("max_position_embeddings") or 8192)
