"""DistilBertConfig: the numbers of one DistilBERT checkpoint, read once from config.json and frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from architectures.bert.model_config import BertConfig
from max_ray.huggingface import required
from max_ray.nn.activation import activation_name
from max_ray.nn.encoder import hidden_and_heads

_EPS = 1e-12  # of all its norms; config.json does not say


@dataclass(frozen=True)
class DistilBertConfig(BertConfig):
    """A BERT's numbers, without token types."""

    @property
    def widths(self) -> dict[str, int]:
        """Sizes that the ranks must divide, by their names in config.json."""
        return {"hidden_dim": self.intermediate_size}

    @classmethod
    def from_huggingface(cls, config: Any) -> DistilBertConfig:
        """From config.json as an attribute-style mapping. Raises ConfigError for a value that this family lacks.
        (Positions of sines are weights of the checkpoint, too.)"""
        names = {"hidden_size": required(config, "dim"), "num_attention_heads": required(config, "n_heads")}
        hidden_size, num_heads = hidden_and_heads(names)
        return cls(
            vocab_size=required(config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=required(config, "hidden_dim"),
            num_layers=required(config, "n_layers"),
            num_heads=num_heads,
            num_positions=required(config, "max_position_embeddings"),
            num_token_types=0,
            layer_norm_eps=_EPS,
            activation=activation_name(config, "activation", "gelu"),
        )
