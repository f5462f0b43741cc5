"""MistralConfig: the numbers of one Mistral checkpoint, read once from config.json and frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from max_ray.huggingface import head_dim, required
from max_ray.nn.activation import activation_name
from max_ray.nn.layer_types import FULL, SLIDING, layer_types, layer_windows
from max_ray.nn.rope import RopeConfig

_DEFAULT_WINDOW = 4096  # where config.json has no sliding_window at all; null there means none


@dataclass(frozen=True)
class MistralConfig:
    """Shapes of the whole model, before it is cut over ranks.

    windows: each layer's sliding window in tokens, None where it sees everything.
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
    windows: tuple[int | None, ...]

    @property
    def widths(self) -> dict[str, int]:
        """Sizes that the ranks must divide, by their names in config.json."""
        return {"intermediate_size": self.intermediate_size}

    @classmethod
    def mistral(cls, config: Any) -> MistralConfig:
        """From config.json of a Mistral, as an attribute-style mapping: all layers have the window, but where
        `layer_types` is given, which makes it a Ministral, as transformers has it. Raises ConfigError for a value that
        this family lacks."""
        if config.get("layer_types"):
            return cls.ministral(config)
        num_layers = required(config, "num_hidden_layers")
        return cls._read(config, (config.get("sliding_window", _DEFAULT_WINDOW),) * num_layers)

    @classmethod
    def ministral(cls, config: Any) -> MistralConfig:
        """The same of a Ministral: `layer_types` says which layers have the window, by default all."""
        num_layers = required(config, "num_hidden_layers")
        window = config.get("sliding_window", _DEFAULT_WINDOW)
        default = [FULL if window is None else SLIDING] * num_layers
        return cls._read(config, layer_windows(layer_types(config, num_layers, default), window))

    @classmethod
    def _read(cls, config: Any, windows: tuple[int | None, ...]) -> MistralConfig:
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
            windows=windows,
        )
