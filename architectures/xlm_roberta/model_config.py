"""The numbers of one XLM-RoBERTa checkpoint, read once from config.json and frozen: XLMRobertaConfig, and for those
that rotate queries and keys in place of learned positions RotaryConfig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from architectures.bert.model_config import BertConfig
from max_ray.errors import ConfigError
from max_ray.huggingface import required
from max_ray.nn.activation import activation_name
from max_ray.nn.encoder import hidden_and_heads
from max_ray.nn.rope import RopeConfig

_THETA = 20_000.0  # of transformers' class
_PUBLISHED_THETA = 10_000.0  # of the code that published checkpoints come with


@dataclass(frozen=True)
class XLMRobertaConfig(BertConfig):
    """A BERT's numbers; of its positions the first `padding_id + 1` belong to no place in a text."""

    padding_id: int = 1

    @property
    def max_length(self) -> int:
        """Tokens that there are positions for."""
        return self.num_positions - self.padding_id - 1

    @classmethod
    def from_huggingface(cls, config: Any) -> XLMRobertaConfig:
        """From config.json as an attribute-style mapping. Raises ConfigError for a value that this family lacks."""
        return cls(**vars(BertConfig.from_huggingface(config)), padding_id=config.get("pad_token_id", 1))


@dataclass(frozen=True)
class RotaryConfig:
    """Shapes of a whole XLM-RoBERTa with a rope (Sturua et al. 2024, jina-embeddings-v3)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_token_types: int
    max_length: int
    layer_norm_eps: float
    activation: str
    rope: RopeConfig

    @property
    def widths(self) -> dict[str, int]:
        """Sizes that the ranks must divide, by their names in config.json."""
        return {"intermediate_size": self.intermediate_size}

    @classmethod
    def from_huggingface(cls, config: Any) -> RotaryConfig:
        """From config.json as an attribute-style mapping, of transformers (`jina_embeddings_v3`) or of the published
        code (`XLMRobertaLoRA`). Raises ConfigError for a value that this family lacks."""
        hidden_size, num_heads = hidden_and_heads(config)
        default = _THETA if config.get("model_type") == "jina_embeddings_v3" else _PUBLISHED_THETA
        rope = RopeConfig.of_whole_heads(config, hidden_size // num_heads, config.get("rotary_emb_base") or default)
        if rope.rope_type not in ("default", "linear"):
            raise ConfigError(
                f"config.json: rope_type {rope.rope_type!r} is not supported for XLM-RoBERTa with a rope."
            )
        return cls(
            vocab_size=required(config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=required(config, "intermediate_size"),
            num_layers=required(config, "num_hidden_layers"),
            num_heads=num_heads,
            num_token_types=config.get("type_vocab_size", 1),
            max_length=required(config, "max_position_embeddings"),
            layer_norm_eps=config.get("layer_norm_eps", 1e-5),
            activation=activation_name(config, default="gelu"),
            rope=rope,
        )


def is_rotary(config: Any) -> bool:
    """Whether config.json describes an XLM-RoBERTa with a rope."""
    return bool(config.get("model_type") == "jina_embeddings_v3" or config.get("position_embedding_type") == "rotary")
