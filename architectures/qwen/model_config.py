"""QwenConfig: the numbers of one dense Qwen checkpoint, read once from config.json and frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from max_ray.huggingface import head_dim, required
from max_ray.nn.activation import activation_name
from max_ray.nn.layer_types import FULL, SLIDING, layer_types, layer_windows
from max_ray.nn.rope import RopeConfig

_QWEN3_HEAD_DIM = 128


@dataclass(frozen=True)
class QwenConfig:
    """Shapes of the whole model, before it is cut over ranks.

    qkv_bias, out_bias: of the attention's products. qk_norm: whether query and key heads are normalised.
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
    qkv_bias: bool
    out_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]

    @property
    def widths(self) -> dict[str, int]:
        """Sizes that the ranks must divide, by their names in config.json."""
        return {"intermediate_size": self.intermediate_size}

    @classmethod
    def qwen2(cls, config: Any) -> QwenConfig:
        """From config.json of a Qwen2, as an attribute-style mapping. Raises ConfigError for a value that this family
        lacks. Queries, keys and values always have a bias there."""
        return cls._read(config, head_dim(config), qkv_bias=True, out_bias=False, qk_norm=False)

    @classmethod
    def qwen3(cls, config: Any) -> QwenConfig:
        """The same of a Qwen3. Its heads have size 128 where config.json does not say."""
        bias = bool(config.get("attention_bias"))
        size = config.get("head_dim") or _QWEN3_HEAD_DIM
        return cls._read(config, size, qkv_bias=bias, out_bias=bias, qk_norm=True)

    @classmethod
    def _read(cls, config: Any, size: int, *, qkv_bias: bool, out_bias: bool, qk_norm: bool) -> QwenConfig:
        num_heads = required(config, "num_attention_heads")
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
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            qk_norm=qk_norm,
            windows=_windows(config),
        )


def _windows(config: Any) -> tuple[int | None, ...]:
    """`use_sliding_window` switches `sliding_window` on, for the layers from `max_window_layers` on unless
    `layer_types` names them."""
    num_layers = required(config, "num_hidden_layers")
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    first = num_layers if window is None else config.get("max_window_layers", 28)
    default = [FULL if layer < first else SLIDING for layer in range(num_layers)]
    return layer_windows(layer_types(config, num_layers, default), window)
