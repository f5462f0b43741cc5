"""BertConfig: the numbers of one BERT checkpoint, read once from config.json and frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from max_ray.errors import ConfigError
from max_ray.huggingface import required
from max_ray.nn.activation import activation
from max_ray.nn.encoder import hidden_and_heads


@dataclass(frozen=True)
class BertConfig:
    """Shapes of the whole model, before it is cut over ranks. num_positions: rows of the position table."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_positions: int
    num_token_types: int
    layer_norm_eps: float
    activation: str

    @property
    def max_length(self) -> int:
        """Tokens that there are positions for."""
        return self.num_positions

    @property
    def widths(self) -> dict[str, int]:
        """Sizes that the ranks must divide, by their names in config.json."""
        return {"intermediate_size": self.intermediate_size}

    @classmethod
    def from_huggingface(cls, config: Any) -> BertConfig:
        """From config.json as an attribute-style mapping. Raises ConfigError for a value that this family lacks."""
        kind = config.get("position_embedding_type") or "absolute"
        if kind != "absolute":
            raise ConfigError(f"config.json: position_embedding_type={kind!r}, but this family has 'absolute' only.")
        if config.get("is_decoder") or config.get("add_cross_attention"):
            raise ConfigError("config.json describes a decoder (is_decoder or add_cross_attention), not an encoder.")
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
            num_token_types=config.get("type_vocab_size", 2),
            layer_norm_eps=config.get("layer_norm_eps", 1e-12),
            activation=name,
        )
