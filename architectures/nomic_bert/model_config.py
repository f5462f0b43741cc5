"""NomicBertConfig: the numbers of one Nomic BERT checkpoint, read once from config.json and frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from max_ray.errors import ConfigError
from max_ray.huggingface import required
from max_ray.nn.activation import activation_name
from max_ray.nn.encoder import hidden_and_heads
from max_ray.nn.rope import RopeConfig

_THETA = 1000.0
_OLD_NAMES = {
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "intermediate_size": "n_inner",
    "layer_norm_eps": "layer_norm_epsilon",
    "rope_theta": "rotary_emb_base",
}
"""Names of transformers -> those of the code that published checkpoints come with."""

_OLD_VALUES: dict[str, tuple[Any, ...]] = {
    "activation_function": ("swiglu",),
    "prenorm": (False,),
    "parallel_block": (False,),
    "use_rms_norm": (False, None),
    "qkv_proj_bias": (False,),
    "mlp_fc1_bias": (False,),
    "mlp_fc2_bias": (False,),
    "rotary_emb_fraction": (1.0,),
    "rotary_emb_interleaved": (False,),
    "rotary_emb_scale_base": (None,),
    "rotary_scaling_factor": (None,),
    "causal": (False,),
    "num_experts": (0, None),
}
"""Values of that code's settings that this family has."""


@dataclass(frozen=True)
class NomicBertConfig:
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

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @classmethod
    def from_huggingface(cls, config: Any) -> NomicBertConfig:
        """From config.json as an attribute-style mapping, under the names of transformers or of the published code.
        Raises ConfigError for a value that this family lacks. Texts are as long as those of the training."""
        for name, values in _OLD_VALUES.items():
            if name in config and config.get(name) not in values:
                raise ConfigError(
                    f"config.json: {name}={config.get(name)!r} is not supported for the Nomic BERT family."
                )
        numbers = {**config, **{new: config.get(old) for new, old in _OLD_NAMES.items() if old in config}}
        hidden_size, num_heads = hidden_and_heads(numbers)
        if numbers.get("head_dim") not in (None, hidden_size // num_heads):
            raise ConfigError(f"config.json: head_dim={numbers['head_dim']} is not hidden_size / num_attention_heads.")
        length = numbers.get("max_trained_positions") or numbers.get("max_position_embeddings") or 2048
        rope = RopeConfig.of_whole_heads(
            {**numbers, "max_position_embeddings": length}, hidden_size // num_heads, _THETA
        )
        if rope.rope_type != "default":
            raise ConfigError(f"config.json: rope_type {rope.rope_type!r} is not supported for the Nomic BERT family.")
        return cls(
            vocab_size=required(config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=required(numbers, "intermediate_size"),
            num_layers=required(numbers, "num_hidden_layers"),
            num_heads=num_heads,
            num_token_types=numbers.get("type_vocab_size") or 2,
            max_length=int(length),
            layer_norm_eps=numbers.get("layer_norm_eps") or 1e-12,
            activation=activation_name(numbers),
            rope=rope,
        )
