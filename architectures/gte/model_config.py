"""GteConfig: the numbers of one GTE v1.5 checkpoint, read once from config.json and frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from max_ray.errors import ConfigError
from max_ray.huggingface import required
from max_ray.nn.activation import activation_name
from max_ray.nn.encoder import hidden_and_heads
from max_ray.nn.rope import RopeConfig

_THETA = 160_000.0  # of transformers' class
_PUBLISHED_THETA = 10_000.0  # of the code that published checkpoints come with
_PUBLISHED_VALUES: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("rope", None),
    "layer_norm_type": ("layer_norm",),
    "pack_qkv": (True,),
    "logn_attention_scale": (False,),
    "is_decoder": (False, None),
}
"""Values of the published code's settings that this family has."""


@dataclass(frozen=True)
class GteConfig:
    """Shapes of the whole model."""

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
    def from_huggingface(cls, config: Any) -> GteConfig:
        """From config.json as an attribute-style mapping, of transformers or of the published code (`NewModel`).
        Raises ConfigError for a value that this family lacks."""
        for name, values in _PUBLISHED_VALUES.items():
            if name in config and config.get(name) not in values:
                raise ConfigError(f"config.json: {name}={config.get(name)!r} is not supported for the GTE family.")
        hidden_size, num_heads = hidden_and_heads(config)
        return cls(
            vocab_size=required(config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=required(config, "intermediate_size"),
            num_layers=required(config, "num_hidden_layers"),
            num_heads=num_heads,
            num_token_types=config.get("type_vocab_size", 1),
            max_length=required(config, "max_position_embeddings"),
            layer_norm_eps=config.get("layer_norm_eps", 1e-12),
            activation=activation_name(config, default="gelu"),
            rope=_rope(config, hidden_size // num_heads),
        )


def _rope(config: Any, head_dim: int) -> RopeConfig:
    """The rotation; `ntk` of the published code (Su 2023, "NTK-aware") as the `linear` scaling that it equals."""
    scaling = dict(config.get("rope_scaling") or {})
    if (scaling.get("rope_type") or scaling.get("type")) == "ntk":
        if scaling.get("mixed_b") is not None:
            raise ConfigError("config.json: rope_scaling with mixed_b is not supported for the GTE family.")
        factor = float(required(scaling, "factor"))
        theta = float(config.get("rope_theta") or _PUBLISHED_THETA)
        linear = {"rope_type": "linear", "factor": factor ** (2 / head_dim), "rope_theta": theta * factor}
        config = {**config, "rope_scaling": linear}
    default = _THETA if config.get("model_type") == "gte" else _PUBLISHED_THETA
    rope = RopeConfig.of_whole_heads(config, head_dim, default)
    if rope.rope_type not in ("default", "linear"):
        raise ConfigError(f"config.json: rope_type {rope.rope_type!r} is not supported for the GTE family.")
    return rope
