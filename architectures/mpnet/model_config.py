"""MPNetConfig: the numbers of one MPNet checkpoint, read once from config.json and frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from max_ray.errors import ConfigError
from max_ray.huggingface import required
from max_ray.nn.activation import activation
from max_ray.nn.encoder import hidden_and_heads

PADDING_ID = 1
"""The network's own: positions begin behind it, whatever pad_token_id says (so in Hugging Face's MPNet)."""

NUM_BUCKETS = 32


@dataclass(frozen=True)
class MPNetConfig:
    """Shapes of the whole model. num_positions: rows of the position table."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_positions: int
    layer_norm_eps: float
    activation: str

    @property
    def num_token_types(self) -> int:
        """This family has no table of types."""
        return 0

    @property
    def max_length(self) -> int:
        """Tokens that there are positions for."""
        return self.num_positions - PADDING_ID - 1

    @property
    def widths(self) -> dict[str, int]:
        """Sizes that the ranks must divide, by their names in config.json."""
        return {"intermediate_size": self.intermediate_size}

    @classmethod
    def from_huggingface(cls, config: Any) -> MPNetConfig:
        """From config.json as an attribute-style mapping. Raises ConfigError for a value that this family lacks."""
        num_buckets = config.get("relative_attention_num_buckets", NUM_BUCKETS)
        if num_buckets != NUM_BUCKETS:
            raise ConfigError(
                f"config.json: relative_attention_num_buckets={num_buckets!r}, but this family has {NUM_BUCKETS} only."
            )
        name = config.get("hidden_act") or "gelu"
        activation(name)
        hidden_size, num_heads = hidden_and_heads(config)
        return cls(
            vocab_size=required(config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=required(config, "intermediate_size"),
            num_layers=required(config, "num_hidden_layers"),
            num_heads=num_heads,
            num_positions=required(config, "max_position_embeddings"),
            layer_norm_eps=config.get("layer_norm_eps", 1e-12),
            activation=name,
        )
